"""`vitnas export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from nas.cli.options import DynamicBatch, InGraph, MaxDrop, Model, Opset, Probabilities, Quiet, Verbose
from nas.errors import UserError
from nas.export.options import OPSET, FileOptions, FilePrecision
from nas.export.quantize import MAX_DROP

app = typer.Typer()


@app.command(
    short_help="Write a network as ONNX.",
    epilog="Example:  vitnas export levit_128s --weights timm --out levit\n\n"
    "Example:  vitnas export runs/pets --out pets --dynamic-batch --preprocess-in-graph --probabilities",
)
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write arch.json, model.onnx and model.safetensors to.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="timm, or a PyTorch or safetensors file in timm's, the official or vitnas's naming.  "
            "[default: the folder's own]"
        ),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes.  [default: the network's own]")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to check the file on, and to calibrate and judge int8: a folder, torch/NAME, hfds/NAME or "
            "wds/SHARDS.  [default: those of the run, where they are here; else photographs]"
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per inference.  [default: 1]")] = None,
    dynamic_batch: DynamicBatch = False,
    preprocess_in_graph: InGraph = False,
    opset: Opset = OPSET,
    probabilities: Probabilities = False,
    precision: Annotated[str, typer.Option(help="fp32, fp16, or int8, which --data calibrates and judges.")] = "fp32",
    max_drop: MaxDrop = MAX_DROP,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write a network as ONNX, BatchNorm folded, checked against PyTorch on images.

    int8 is judged on the validation images, against fp32; if it costs more than --max-drop, nothing is written.

    Exit codes: 0 done, 2 bad input.
    """
    from nas.evaluate.export import export as write

    if dynamic_batch and batch_size is not None:
        raise UserError(f"--batch-size {batch_size} and --dynamic-batch: give one of them")
    options = FileOptions(
        batch_size=None if dynamic_batch else 1 if batch_size is None else batch_size,
        in_graph=preprocess_in_graph,
        opset=opset,
        probabilities=probabilities,
        precision=cast(FilePrecision, precision),
    )
    print(write(model, out, weights, num_classes, options, data, max_drop))
