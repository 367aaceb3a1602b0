"""`vitnas show`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nas.cli.options import Json, Quiet, Verbose

app = typer.Typer()


@app.command(short_help="Show what a network or a run is.", epilog="Example:  vitnas show runs/cpu-onnxruntime-2ms-all")
def show(
    model: Annotated[
        str,
        typer.Argument(help="A published name, an arch.json, a run's folder, timm/NAME, hf-hub:REPO, or a .onnx file."),
    ],
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show a network: its stages along the five axes, and the data, classes, accuracy and latency of its run.

    Exit codes: 0 done, 2 bad input.
    """
    from nas.cli.facts import facts_of
    from nas.cli.facts import show as show_facts
    from nas.networks.targets import find_target

    facts = facts_of(find_target(model))
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        show_facts(facts)
