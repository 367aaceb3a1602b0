"""`vitnas evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json, Quiet, Threads, Verbose, WeightsFrom

app = typer.Typer()


@app.command(
    short_help="Judge networks on images, as they are deployed.",
    epilog="Example:  vitnas evaluate runs/pets/best/model.onnx --data ./images --out runs/pets-evaluated\n\n"
    "Example:  vitnas evaluate model.onnx model.int8.onnx --data ./images --runtime onnxruntime --runtime openvino\n\n"
    "Example:  vitnas evaluate model.onnx --data ./images --runtime openvino --precision fp32 --precision bf16\n\n"
    "Example:  vitnas evaluate theirs.onnx --data ./images --labels labels.txt --preprocess try",
)
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help=".onnx files, runs' folders (their model.onnx), .safetensors files, published names, timm/NAME or "
            "hf-hub:REPO."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images: a folder of <class>/ folders, or of val/ and train/; torch/NAME, hfds/NAME or wds/SHARDS. "
            "Class folders are matched by name.  [required]"
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, val, test or all.  [default: val, or else test; without these, what was not trained on]"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Images at most, picked at random.  [default: all]")] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="onnxruntime, openvino or torch (a run's model.safetensors); repeatable.  [default: onnxruntime for "
            "ONNX files and for folders that hold one, else torch]"
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, or bf16 on openvino and torch, where the CPU has it; repeatable. A file of int8 or fp16 is "
            "judged as it is.  [default: fp32]"
        ),
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            help="How images become the input of an ONNX file that does not say it: imagenet, inception, clip, none, "
            "raw, key=value pairs, a preprocess.json; or try, which compares the usual ways."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="A file with a name a line, in the order of the outputs, for networks without class names."),
    ] = None,
    threads: Threads = None,
    throughput: Annotated[
        bool, typer.Option("--throughput/--no-throughput", help="Measure latency and images a second, too.")
    ] = True,
    weights_from: WeightsFrom = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and evaluate.json.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Judge networks on images, as they are deployed: the file itself, on its runtime, at its precision.

    Prints top-1 and top-5 with 95% intervals, the calibration error, the worst classes and, of several networks,
    whether they differ on the same images (McNemar's exact test). --out writes a page with the most confident mistakes.

    Exit codes: 0 done, 2 bad input, 130 Ctrl-C.
    """
    from nas.cli.progress import load
    from nas.errors import UserError
    from nas.evaluate.classes import read_labels
    from nas.evaluate.request import EvaluateRequest

    if data is None:
        raise UserError("give the images to judge on: --data FOLDER")
    request = EvaluateRequest(
        models=models or (),
        data=data,
        runtimes=runtime or (),
        preprocess=preprocess,
        labels=None if labels is None else read_labels(labels),
        split=split,
        limit=limit,
        threads=threads,
        throughput=throughput,
        weights_from=weights_from,
        folder=out,
        precisions=precision or (),
    )
    request.check()
    from nas.evaluate.networks import needs_torch, open_networks

    if not needs_torch(request):
        open_networks(request, threads=1)  # PyTorch takes long to load: what is wrong is told before
    load("nas.evaluate.run", quiet)
    from nas.cli.progress import watch_phases
    from nas.evaluate.run import evaluate as run_evaluate
    from nas.evaluate.table import show_evaluation

    with watch_phases(quiet) as (progress, say):
        result = run_evaluate(request, progress, say)
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        show_evaluation(result)
        if out is None:
            print("The most confident mistakes: --out FOLDER shows them, --json lists them.")
    if out is not None and not as_json:
        print(f"Report: {out / 'report.html'}")
    if result.interrupted:
        raise KeyboardInterrupt
