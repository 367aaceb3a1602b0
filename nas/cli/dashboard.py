"""`vitnas dashboard`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Quiet, Verbose
from nas.errors import UserError

app = typer.Typer()


@app.command(
    short_help="Look at a search in the browser.",
    epilog="Example:  vitnas dashboard runs/cpu-onnxruntime-2ms-all --port 8090",
)
def dashboard(
    run: Annotated[
        str | None, typer.Argument(help="A run's folder, a journal, or a database URL.  [default: the newest in runs/]")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; anyone who reaches it can change the study.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Look at a study in optuna-dashboard, with its latency constraint shown.

    Ctrl-C ends it. Exit codes: 0 ended, 2 bad input.
    """
    from nas.search.dashboard import serve

    serve(storage_named(run), host, port)


def storage_named(run: str | None) -> str | Path:
    """The storage of a run named on the command line, or of the newest one under runs/."""
    if run is not None and "://" in run:
        return run
    if run is None:
        journals = sorted(Path("runs").glob("*/study.journal"), key=lambda path: path.stat().st_mtime)
        if not journals:
            raise UserError("there is no run under runs/ here: name a run's folder, a journal or a database URL")
        return journals[-1]
    from nas.cli.facts import kind_of

    path = Path(run) / "study.journal" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        if path.name == "study.journal" and (kind := kind_of(path.parent)) in ("training", "pruning"):
            raise UserError(f"{run} is a {kind}, not a search: `vitnas show {shlex.quote(run)}` shows it")
        raise UserError(f"{path}: no such journal; for a study in a database give its URL")
    return path
