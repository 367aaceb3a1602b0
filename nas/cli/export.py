"""`vitnas export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import BatchSize, Model, Quiet, Verbose

app = typer.Typer()


@app.command(
    short_help="Write a network as ONNX.", epilog="Example:  vitnas export levit_128s --weights timm --out levit"
)
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write arch.json, model.onnx and model.safetensors to.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="timm, or a PyTorch or safetensors file in timm's, the official or our naming.  "
            "[default: the folder's own]"
        ),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes.  [default: the network's own]")] = None,
    batch_size: BatchSize = 1,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a network as ONNX (BatchNorm folded, static shapes), checked against PyTorch.

    Exit codes: 0 done, 2 bad input.
    """
    from nas.export.folder import export as write

    print(write(model, out, weights, num_classes, batch_size))
