"""`vitnas runs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json, Quiet, Verbose

app = typer.Typer()


@app.command(short_help="List the runs under runs/.", epilog="Example:  vitnas runs --json")
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """List runs: kind, budget, the best network, state, size on disk, last change; by their files alone.

    Exit codes: 0 done, 2 no such folder.
    """
    from nas.cli.run_list import list_runs, show_runs

    rows = list_runs(folder)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        show_runs(rows, folder)
