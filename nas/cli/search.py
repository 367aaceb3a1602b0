"""`vitnas search`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from nas.cli.options import (
    PRECISIONS,
    SEEDS,
    BatchSize,
    Device,
    DynamicBatch,
    InGraph,
    Json,
    MaxDrop,
    Opset,
    Probabilities,
    Quiet,
    RuntimeName,
    Threads,
    TrainThreads,
    Verbose,
    WeightsFrom,
    command_line,
    file_options,
)
from nas.errors import UserError, unknown
from nas.export.options import OPSET
from nas.export.quantize import MAX_DROP

app = typer.Typer()


AUTO = "auto"
TRAINING_OPTIONS = (
    *("train_images", "epochs", "final_epochs", "seeds", "validate"),
    *("train_device", "train_threads", "train_processes", "workers", "only"),
)


@app.command(
    short_help="Search networks that meet a latency budget.",
    epilog="Example:  vitnas search --latency-budget 2ms --data ./images\n\n"
    "Example:  vitnas search --latency-budget 2ms --data ./images --weights-from ./checkpoints --resolution 128\n\n"
    "Example:  vitnas search --latency-budget 2ms --data ./images --from-scratch\n\n"
    "Example:  vitnas search --latency-budget 2ms --family shvit --family levit --trials 200",
)
def search(
    context: typer.Context,
    latency_budget: Annotated[str, typer.Option(help="Latency with its unit: 2ms, 1.5ms, 800us.")],
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Peak memory of a network's process above the runtime alone: 64MB.  [default: no limit]"),
    ] = None,
    size_budget: Annotated[str | None, typer.Option(help="Size of the ONNX file: 4MB.  [default: no limit]")] = None,
    device: Device = "cpu",
    family: Annotated[list[str] | None, typer.Option(help="Family to search; repeatable.  [default: all five]")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to judge and train candidates on: a folder (train/<class>/ and val/<class>/, or <class>/), "
            "torch/NAME, hfds/NAME or wds/SHARDS.  [default: none; networks are judged by size]"
        ),
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="How networks are judged: prior (by size), race (pretrained ones first), train (from scratch), "
            "inherit (from --parent), supernet, or auto."
        ),
    ] = "auto",
    weights_from: WeightsFrom = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train every candidate from random weights.")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="What the final trainings of a race learn from, if a trial shows that it helps: a published name, "
            "timm/NAME, a folder with weights, or none.  [default: the best parent that was tuned, or a ready network]"
        ),
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="Trained network to inherit from: a folder with weights, or a published name.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Total number of trials, earlier runs included.  [default: 100; 40 with --data]"),
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="Start no trial after this time: 90s, 10m, 1h.")] = None,
    study: Annotated[
        str | None, typer.Option(help="Study name.  [default: from device, runtime, budget and other settings]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the run's folder.")] = Path("runs"),
    batch_size: BatchSize = 1,
    threads: Threads = None,
    runtime: RuntimeName = None,
    precision: Annotated[
        str,
        typer.Option(help=f"{PRECISIONS}; auto, with --data: of each network the first that surely meets the budget."),
    ] = "fp32",
    max_drop: MaxDrop = MAX_DROP,
    throughput_at: Annotated[
        int | None, typer.Option(help="Batch size whose throughput is maximised too.  [default: that of the latency]")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Network to measure next to the result: a published name, an arch.json, a run's folder, timm/NAME, "
            "hf-hub:REPO; repeatable.  [default: without --data, the best of timm's small CNNs within the budget]"
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Ignore cached latencies.")] = False,
    sampler: Annotated[str, typer.Option(help="auto (vitnas's own), gp, tpe, nsga2 or random.")] = "auto",
    storage: Annotated[
        str | None,
        typer.Option(
            help="Database URL for workers on several machines.  [default: a journal in the run]",
            envvar="VITNAS_STORAGE",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler, of splits and of trainings.", **SEEDS)] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of the networks' head.  [default: the data's, or 1000]")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Input resolution of all networks, in px.  [default: it is searched]")
    ] = None,
    train_images: Annotated[
        int, typer.Option(help="Maximum number of images of --data to train candidates on.")
    ] = 10_000,
    epochs: Annotated[
        int | None,
        typer.Option(help="Maximum number of epochs of a candidate.  [default: 3; from scratch 9, supernet 30]"),
    ] = None,
    final_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of the final trainings.  [default: 30; a race 3 to 30, for about 24,000 images]"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds of the final trainings.")] = 3,
    train_device: Annotated[
        str | None,
        typer.Option(
            help="Where networks train: cpu, cuda, cuda:0,cuda:1.  [default: every GPU that is visible, or the CPU]"
        ),
    ] = None,
    train_threads: TrainThreads = None,
    train_processes: Annotated[
        int,
        typer.Option(
            help="Processes that make each final training together: one a GPU of --train-device, or all on the CPU."
        ),
    ] = 1,
    workers: Annotated[
        str,
        typer.Option(
            help="Processes to start that train what this one measures: a number, or auto: one a training device where "
            "there are several or --device is on another machine."
        ),
    ] = "auto",
    only: Annotated[
        str | None,
        typer.Option(
            help="measure: others train what this process measures. train: train what others have measured, without "
            "--device. Both share the folder or --storage."
        ),
    ] = None,
    validate: Annotated[
        int, typer.Option(help="Held-out networks to train fully, to measure how well the tier ranks; 0: none.")
    ] = 0,
    dynamic_batch: DynamicBatch = False,
    preprocess_in_graph: InGraph = False,
    opset: Opset = OPSET,
    probabilities: Probabilities = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Search networks that meet a latency budget on this device, as measured on it.

    With --data pretrained networks come first: published ones, and smaller ones cut from them, are tuned on your
    images; with --from-scratch all begin with random weights. At the end the best are trained fully. The same command
    continues its study. Ctrl-C ends it cleanly, with the report written.

    Exit codes: 0 a network surely fits, 1 none does or a step at the end failed, 2 bad input, 130 Ctrl-C.
    """
    from nas.measure.budget import Limits
    from nas.measure.device import settings_for, unchecked_settings
    from nas.units import parse_budget, parse_duration, parse_size

    budget_ms = parse_budget(latency_budget)
    limits = Limits(
        memory_mb=parse_size("--memory-budget", memory_budget) if memory_budget else None,
        file_mb=parse_size("--size-budget", size_budget) if size_budget else None,
    )
    timeout_s = parse_duration(timeout) if timeout else None
    first = "fp32" if precision == AUTO else precision
    settings = (
        unchecked_settings(runtime, device, threads, batch_size, first)
        if only == "train"
        else settings_for(runtime, device, threads, batch_size, first)
    )
    families = families_of(family)
    tier = tier_of(quality, data, parent, from_scratch)
    if weights_from is not None and tier != "race":
        without = f"--quality {quality}" if quality != "auto" else "--from-scratch" if from_scratch else "--parent"
        raise UserError(
            "--weights-from needs --data: images to tune pretrained networks on"
            if data is None
            else f"--weights-from gives pretrained weights, which {without} does not use: leave out one of them"
        )
    if teacher is not None and tier != "race":
        raise UserError("--teacher teaches in the final trainings of a race: give --data, without another --quality")
    plan = None
    if tier == "prior":
        for name in TRAINING_OPTIONS:
            if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE":
                raise UserError(f"--{name.replace('_', '-')} needs --data: without images nothing is trained")
    else:
        from nas.quality.plan import DEFAULT_EPOCHS, TrainingPlan

        last = DEFAULT_EPOCHS[tier] if epochs is None else epochs
        plan = TrainingPlan(
            data or "", train_images, last, final_epochs, seeds, validate, parent, num_classes, weights_from, teacher
        )
        families = inheriting(parent, families, family) if tier == "inherit" else families

    from nas.networks.targets import find_target
    from nas.search.folder import epochs_in
    from nas.search.precision import ladder, named_ladder
    from nas.search.request import SearchRequest

    request = SearchRequest(
        budget_ms=budget_ms,
        settings=settings,
        lower=(named_ladder if only == "train" else ladder)(settings)[1:] if precision == AUTO else (),
        families=families,
        trials=(40 if plan else 100) if trials is None else trials,
        timeout_s=timeout_s,
        study=study or "",
        out=out,
        storage=storage,
        sampler=sampler,
        seed=seed,
        num_classes=1000 if num_classes is None else num_classes,
        quality=tier,
        resolution=resolution,
        plan=plan,
        throughput_at=throughput_at,
        against=tuple(find_target(network) for network in against or ()),
        max_drop=max_drop,
        cache=not no_cache,
        limits=limits,
        train_devices=tuple(filter(None, (train_device or "").split(","))),
        train_threads=train_threads,
        train_processes=train_processes,
        workers=workers_of(workers),
        only=only_of(only),
        file=file_options(
            dynamic_batch=dynamic_batch, in_graph=preprocess_in_graph, opset=opset, probabilities=probabilities
        ),
    )
    if plan is not None and tier == "race" and epochs is None and (begun := epochs_in(request.folder)):
        request = replace(request, plan=replace(plan, epochs=begun))
    request.check()

    from nas.cli.progress import load, waiting

    load("nas.search.loop" if plan is None else "nas.training.engine", quiet)
    from nas.cli.display import show_result
    from nas.cli.progress import watch, watch_phases
    from nas.search.run import read_images
    from nas.search.run import search as run_search

    if request.only == "train":
        from nas.files import tell
        from nas.search.helping import await_search, train_measured

        await_search(request, tell)
    with waiting(f"reading {data}", quiet or plan is None):
        images = read_images(request)
    if request.only == "train":
        with watch_phases(quiet) as (phase, say):
            made = train_measured(request, say, phase, images=images)
        if as_json:
            print(json.dumps({"trainings": made, "folder": str(request.folder)}))
        return
    with watch(request, images, quiet) as (progress, say, phase):
        outcome = run_search(request, progress, say, phase, images=images, command=command_line())
    show_result(outcome, request.folder, as_json, verbose, data)
    if as_json:
        print(json.dumps(outcome.to_json() | {"folder": str(request.folder)}))
    if outcome.interrupted and not outcome.failures:
        raise KeyboardInterrupt
    raise typer.Exit(outcome.exit_code)


def workers_of(text: str) -> int | None:
    """--workers; None: auto.

    Raises:
        UserError: no such number.
    """
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UserError(f"--workers {text!r}: give a number, or auto")
    return int(text)


def only_of(text: str | None) -> Literal["measure", "train"] | None:
    """--only.

    Raises:
        UserError: another word.
    """
    match text:
        case None | "measure" | "train":
            return text
    raise UserError(f"--only {text!r}: give measure or train")


def tier_of(quality: str, data: str | None, parent: str | None, from_scratch: bool = False) -> str:
    """The tier that `--quality` names, or that the data, the parent and --from-scratch allow."""
    from nas.quality.tiers import TIERS

    if quality not in ("auto", *TIERS):
        raise UserError(f"--quality {quality!r}: choose auto, {', '.join(TIERS)}")
    asked = [
        option
        for option, given in (
            ("--parent", parent is not None),
            ("--from-scratch", from_scratch),
            (f"--quality {quality}", quality not in ("auto", "prior")),
        )
        if given
    ]
    if data is None:
        if asked:
            raise UserError(f"{asked[0]} needs --data: images to train on")
        return "prior"
    if from_scratch and (parent is not None or quality not in ("auto", "train", "supernet")):
        other = "--parent" if parent is not None else f"--quality {quality}"
        raise UserError(f"--from-scratch and {other}: give one of them")
    if quality == "auto":
        return "inherit" if parent is not None else "train" if from_scratch else "race"
    if quality == "inherit" and parent is None:
        raise UserError("--quality inherit needs --parent: a folder with trained weights, or a published name")
    if parent is not None and quality != "inherit":
        raise UserError(f"--quality {quality} inherits nothing: leave out --parent, or give --quality inherit")
    if quality == "prior":
        raise UserError("--quality prior trains nothing: leave out --data, or give --num-classes alone")
    return quality


def inheriting(parent: str | None, families: tuple[str, ...], named: list[str] | None) -> tuple[str, ...]:
    """The parent's family, which must be among those named."""
    from nas.networks.targets import find_arch

    family = find_arch(parent or "").family
    if named and family not in families:
        raise UserError(f"--parent {parent} is of the family {family}, which --family leaves out")
    return (family,)


def families_of(names: list[str] | None) -> tuple[str, ...]:
    """Checked family names, in the registry's order."""
    from search_spaces.registry import FAMILIES

    for name in names or ():
        if name not in FAMILIES:
            raise unknown("family", name, FAMILIES)
    return tuple(name for name in FAMILIES if not names or name in names)
