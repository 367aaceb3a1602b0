"""A storage behind a server, a database or a proxy of one, whose calls wait for a lost server."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nas.files import tell
from nas.study.database import engine_of, is_proxy
from nas.study.errors import driver_reason
from nas.study.exclusive import exclusive
from nas.text import mask_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from optuna.storages import BaseStorage
    from optuna.trial import TrialState


T = TypeVar("T")
PATIENCE_S = 600
"""How long a lost server is waited for."""
PAUSES_S = (0.2, 5.0)
"""Seconds between attempts: the first pause, and the longest."""


class PatientStorage:
    """A server's storage whose calls wait for a lost server, PATIENCE_S at most; told as it goes and as it is back.

    An answer may be lost after the server has acted on it, so that each call must bear to be made twice: attributes
    and parameters are then stored again, whether a trial was told is looked up, and trials are made in `alone` only.
    Only the main thread waits: a lease that cannot be extended now is extended at the next beat.
    """

    def __init__(self, storage: BaseStorage, url: str) -> None:
        self._storage, self._url = storage, url
        self._server = "storage proxy" if is_proxy(url) else "database"
        self._alone: int | None = None
        self._gave_up = False
        if not is_proxy(url):
            import sqlalchemy

            sqlalchemy.event.listen(engine_of(storage), "checkout", self._keep_connection)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        return partial(self.wait, found) if callable(found) else found

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; a second attempt is content with what the first one stored."""
        attempts = 0

        def store() -> bool:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                trial = self._storage.get_trial(trial_id)
                if trial.state == state and (values is None or trial.values == list(values)):
                    return True
            return self._storage.set_trial_state_values(trial_id, state, values)

        return self.wait(store)

    def wait(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The call's result, made again as long as the server is lost."""
        try:
            result = call(*args, **kwargs)
        except database_errors() as error:
            here = threading.current_thread() is threading.main_thread() and self._alone is None
            if self._gave_up or not here or not is_lost(error):
                raise
            return self._outlast(error, partial(call, *args, **kwargs))
        self._gave_up = False
        return result

    def _outlast(self, error: Exception, call: Callable[[], T]) -> T:
        """The call's result once the server is back. Ctrl-C ends this wait and spares what it leads to another."""
        self._gave_up = True
        lost, pause = time.monotonic(), PAUSES_S[0]
        tell(
            f"the {self._server} {mask_url(self._url)} is away ({driver_reason(error, self._url)}): it is waited for, "
            f"{PATIENCE_S / 60:g} minutes at most"
        )
        while time.monotonic() + pause < lost + PATIENCE_S:
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])
            try:
                result = call()
            except database_errors() as again:
                if not is_lost(again):
                    raise
                error = again
            else:
                self._gave_up = False
                tell(f"the {self._server} is back after {time.monotonic() - lost:.0f} s")
                return result
        raise error

    def decide(self, action: Callable[[], T]) -> T:
        """The result of `action`, called in `holding`."""
        with self.holding():
            return action()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the storage's lock. The calls that this thread makes meanwhile end with it: on a database, they all use
        the connection that holds it."""
        with exclusive(self._storage) as connection:
            sessions = None if connection is None else cast(Any, self._storage)._backend.scoped_session
            if sessions is not None:
                sessions.remove()
                sessions(bind=connection)
            self._alone = threading.get_ident()
            try:
                yield
            finally:
                self._alone = None
                if sessions is not None:
                    sessions.remove()

    def _keep_connection(self, *_: Any) -> None:
        if self._alone == threading.get_ident():
            raise ConnectionError("the connection that held the lock was lost")


def database_errors() -> tuple[type[Exception], ...]:
    """The errors of a server's storage."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError, StorageInternalError, ConnectionError


def is_lost(error: Exception) -> bool:
    """Whether there is no connection to the server any more, or it is stopping or starting."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError):
        return isinstance(cause, ConnectionError | PendingRollbackError)  # the latter where Optuna asked once more
    code = getattr(cause.orig, "sqlstate", None)
    refused = isinstance(cause, OperationalError) and (code is None or code.startswith("57P"))
    return cause.connection_invalidated or refused
