"""optuna-dashboard on a study, with Optuna 5's constraints shown.

optuna-dashboard 0.21 reads a trial's constraints from the list that Optuna 4 stored; Optuna 5
stores one number per name, so the dashboard takes every trial for one that fits. It is therefore
given a storage whose trials carry that list as well. Nothing of it is written.
"""

from __future__ import annotations

import contextlib
import copy
import errno
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from nas.errors import UserError
from nas.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Container
    from wsgiref.types import WSGIApplication

    from optuna.trial import FrozenTrial, TrialState


def serve(storage: str | Path, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Print the dashboard's address and serve it until Ctrl-C.

    The dashboard has no login and can delete studies: keep `host` a local one.

    Args:
        storage: a journal file or database URL that exists already.
        port: 0 for any free one.

    Raises:
        UserError: the storage cannot be read, or the address cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}: give 1 to 65535, or 0 for any free one")
    application = app(storage)
    try:
        server = make_server(host, port, application, _Server, _QuietHandler)
    except OSError as error:
        hint = "; take another --port" if error.errno == errno.EADDRINUSE else ""
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error
    with server:
        address = f"http://{host}:{server.server_port}/dashboard"
        print(f"dashboard: {address} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def app(storage: str | Path) -> WSGIApplication:
    """The dashboard of `storage` as a WSGI callable."""
    import optuna_dashboard

    shown = open_storage(storage, read_only=True)
    stored_trials = shown.get_all_trials

    def get_all_trials(
        study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [_with_constraint_list(t) for t in stored_trials(study_id, deepcopy, states)]

    shown.get_all_trials = get_all_trials  # type: ignore[method-assign]
    return optuna_dashboard.wsgi(shown)


def _with_constraint_list(trial: FrozenTrial) -> FrozenTrial:
    constraints = trial.constraints
    if not constraints:
        return trial
    shown = copy.copy(trial)
    shown.system_attrs = {**trial.system_attrs, "constraints": list(constraints.values())}
    return shown


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        """One line per request on the terminal helps nobody."""
