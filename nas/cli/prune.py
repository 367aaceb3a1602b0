"""`vitnas prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import (
    SEEDS,
    BatchSize,
    Data,
    Device,
    DynamicBatch,
    InGraph,
    Json,
    MaxDrop,
    Opset,
    Precision,
    Probabilities,
    Quiet,
    RuntimeName,
    Threads,
    TrainThreads,
    Verbose,
    command_line,
    file_options,
)
from nas.export.options import OPSET
from nas.export.quantize import MAX_DROP

app = typer.Typer()


@app.command(
    short_help="Shrink a trained network to a budget.",
    epilog="Examples:\n\n  vitnas prune --model efficientvit_m4\n\n"
    "  vitnas prune --model levit_192 --data ./images --latency-budget 0.6x --finetune 3",
)
def prune(
    model: Annotated[
        str, typer.Option(help="A published name, an arch.json, a run's folder, timm/NAME or hf-hub:REPO.")
    ],
    macs: Annotated[
        str | None, typer.Option(help="Budget: 0.5x of its MACs, or 150M.  [default: 0.5x, without another budget]")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Budget: 0.5x of its parameters, or 4M.")] = None,
    latency_budget: Annotated[str | None, typer.Option(help="Budget as measured here: 1.5ms or 0.6x.")] = None,
    data: Data = None,
    unlabelled: Annotated[
        str | None,
        typer.Option(help="In place of --data, a folder of images without labels: the network's answers label them."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="timm, or a PyTorch or safetensors file.  [default: the folder's own, or the published ones]"
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes the data must have; with --unlabelled, those of --weights.")
    ] = None,
    reallocate: Annotated[
        bool, typer.Option("--reallocate/--no-reallocate", help="Widen what matters with what is saved elsewhere.")
    ] = True,
    axes: Annotated[str, typer.Option(help="Axes that may change.")] = "ffn,qk,v,heads,embed,blocks",
    criterion: Annotated[
        str | None,
        typer.Option(
            help="taylor, taylor2, features (without labels), magnitude, random or torch-pruning.  "
            "[default: taylor, or features with --unlabelled]"
        ),
    ] = None,
    multiple_of: Annotated[int, typer.Option(help="Widths stay multiples of this.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds of scoring and cutting.")] = 3,
    compensate: Annotated[
        bool,
        typer.Option("--compensate/--no-compensate", help="Refit the layers to their outputs before a cut."),
    ] = True,
    finetune: Annotated[float, typer.Option(help="Epochs of fine-tuning afterwards; 0 for none.")] = 1.0,
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill",
            help="Fine-tune with the unpruned network as teacher.  [default: unless it is first trained here]",
        ),
    ] = None,
    control: Annotated[
        bool,
        typer.Option("--control/--no-control", help="Fine-tune the unpruned network in the same way, for comparison."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of splits, samples and training.", **SEEDS)] = 0,
    device: Device = "cpu",
    runtime: RuntimeName = None,
    threads: Threads = None,
    batch_size: BatchSize = 1,
    precision: Precision = "fp32",
    max_drop: MaxDrop = MAX_DROP,
    dynamic_batch: DynamicBatch = False,
    preprocess_in_graph: InGraph = False,
    opset: Opset = OPSET,
    probabilities: Probabilities = False,
    train_threads: TrainThreads = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.  [default: one in runs/]")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Shrink a network to a budget by Taylor importance, and move parameters to where they matter.

    The same command continues an interrupted run after its last finished round.

    Exit codes: 0 done and within the budget, 1 done but over it as measured, too close to it to tell, or infeasible in
    its precision, or a step at its end failed, 2 bad input, 130 Ctrl-C.
    """
    from nas.cli.progress import load
    from nas.measure.device import settings_for

    load("nas.prune.run", quiet)
    from nas.cli.progress import watch_phases
    from nas.prune.images import compute_device
    from nas.prune.request import PruneRequest, default_folder, kinds_of, parse_pruning_budget
    from nas.prune.run import prune as run_prune
    from nas.prune.screen import show_prune
    from nas.threads import training_threads

    budget = parse_pruning_budget(macs, params, latency_budget)
    request = PruneRequest(
        model=model,
        budget=budget,
        settings=settings_for(runtime, device, threads, batch_size, precision),
        folder=out or default_folder(model, budget),
        reallocate=reallocate,
        kinds=kinds_of(axes),
        criterion=criterion or "",
        multiple_of=multiple_of,
        rounds=rounds,
        compensate=compensate,
        finetune=finetune,
        distill=distill,
        control=control,
        data=data,
        unlabelled=unlabelled,
        weights=weights,
        num_classes=num_classes,
        seed=seed,
        max_drop=max_drop,
        file=file_options(
            dynamic_batch=dynamic_batch, in_graph=preprocess_in_graph, opset=opset, probabilities=probabilities
        ),
    )
    request.check()
    with watch_phases(quiet) as (progress, say), training_threads(train_threads, say, compute_device(request.settings)):
        found = run_prune(request, progress, say, command=command_line())
    show_prune(found, request.folder, to_stderr=as_json)
    if as_json:
        print(json.dumps(found.to_json() | {"folder": str(request.folder)}))
    raise typer.Exit(0 if found.met and not found.failures else 1)
