"""The command line. Every verb imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.errors import DiskFull, UserError

EPILOG = (
    "Examples:\n\n"
    "  vitnas search --latency-budget 2ms --device cpu\n\n"
    "  vitnas bench efficientvit_m0 shvit_s1 runs/cpu-onnxruntime-2ms-all\n\n"
    "  vitnas dashboard"
)

log = logging.getLogger("nas")
app = typer.Typer(
    name="vitnas",
    help="Find the vision transformer for your device, under a latency budget measured on it.",
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="Device to measure on: cpu, cuda, or ssh://[user@]host[:port][/cuda].")]
RUNTIMES = "onnxruntime, openvino, torch, torch.compile, cudagraphs or tensorrt"
DEFAULT_RUNTIME = "[default: onnxruntime on cpu, torch on cuda]"
RuntimeName = Annotated[str | None, typer.Option(help=f"{RUNTIMES}.  {DEFAULT_RUNTIME}")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.  [default: the physical cores this process may use]")]
TrainThreads = Annotated[
    int | None, typer.Option(help="CPU threads of trainings.  [default: the CPUs that nobody else uses, as it goes]")
]
BatchSize = Annotated[int, typer.Option(help="Images per inference.")]
PRECISIONS = "fp32, tf32, bf16, fp16 or int8, as the runtime can"
Precision = Annotated[str, typer.Option(help=f"{PRECISIONS}.")]
TRAINING_OPTIONS = ("train_images", "epochs", "final_epochs", "seeds", "validate", "train_threads")
Data = Annotated[
    str | None,
    typer.Option(
        help="Images: a folder (train/<class>/ beside val/<class>/, or <class>/), torch/NAME, hfds/NAME or "
        "wds/SHARDS.  [default: digits, a demo]"
    ),
]
SEEDS = {"min": 0, "max": 2**32 - 1}  # as all generators in use take them


def be_verbose(verbose: bool) -> bool:
    """Let the loggers of this package speak."""
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    return verbose


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Tell where the time goes, and tracebacks of what fails.", callback=be_verbose
    ),
]


def be_quiet(quiet: bool) -> bool:
    """Let the loggers of this package tell errors only; --verbose prevails."""
    if quiet and log.level == logging.NOTSET:
        log.setLevel(logging.ERROR)
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tell results and errors only.", callback=be_quiet)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Model = Annotated[str, typer.Argument(help="A published name, an arch.json, or a run's folder.")]


VERSIONS = ("vitnas", "torch", "onnxruntime", "optuna")


def tell_version(asked: bool) -> None:
    """Print the versions of this program and of what its figures depend on."""
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    told = []
    for name in VERSIONS:
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            told.append(f"{name} not installed")
    print(", ".join([*told, f"Python {sys.version.split()[0]}"]))
    raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Tell the versions and exit.", callback=tell_version, is_eager=True)
    ] = False,
) -> None:
    """Find the vision transformer for your device, under a latency budget measured on it."""


@app.command(
    short_help="Search networks that meet a latency budget.",
    epilog="Example:  vitnas search --latency-budget 2ms --data ./images --resolution 128\n\n"
    "Example:  vitnas search --latency-budget 2ms --family shvit --family levit --trials 200",
)
def search(
    context: typer.Context,
    latency_budget: Annotated[str, typer.Option(help="Latency with its unit: 2ms, 1.5ms, 800us.")],
    device: Device = "cpu",
    family: Annotated[list[str] | None, typer.Option(help="Family to search; repeatable.  [default: all five]")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to train candidates on: a folder (train/<class>/ beside val/<class>/, or <class>/), "
            "torch/NAME, hfds/NAME or wds/SHARDS.  [default: none, and only size is judged]"
        ),
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="How networks are judged: prior (by size), train, inherit (from --parent), supernet, or auto."
        ),
    ] = "auto",
    parent: Annotated[
        str | None, typer.Option(help="Trained network to inherit from: a folder with weights, or a published name.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trials the study shall hold in all, those of earlier runs included.  [default: 100; 40 with --data]"
        ),
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="Start no trial after this time: 90s, 10m, 1h.")] = None,
    study: Annotated[
        str | None, typer.Option(help="Study name.  [default: from device, runtime, budget and families]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the run's folder.")] = Path("runs"),
    batch_size: BatchSize = 1,
    threads: Threads = None,
    runtime: RuntimeName = None,
    precision: Precision = "fp32",
    throughput_at: Annotated[
        int | None, typer.Option(help="Batch size whose throughput is searched for.  [default: that of the latency]")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Network to measure beside the result: a published name, an arch.json, timm/NAME; repeatable."
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure anew what was measured on this machine before.")
    ] = False,
    sampler: Annotated[
        str, typer.Option(help="auto, gp, tpe, nsga2 or random. With --data, auto is the tier's own surrogate.")
    ] = "auto",
    storage: Annotated[
        str | None, typer.Option(help="Database URL for workers on several machines.  [default: a journal in the run]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler, of splits and of trainings.", **SEEDS)] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of the networks' head.  [default: the data's, or 1000]")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Input resolution of all networks, in px.  [default: it is searched]")
    ] = None,
    train_images: Annotated[
        int, typer.Option(help="Images of --data that candidates are trained on at most.")
    ] = 10_000,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs a candidate is trained at most.  [default: 9; inherit 3, supernet 30]")
    ] = None,
    final_epochs: Annotated[int, typer.Option(help="Epochs of the trainings at the end.")] = 30,
    seeds: Annotated[int, typer.Option(help="Seeds of the trainings at the end.")] = 3,
    train_threads: TrainThreads = None,
    validate: Annotated[
        int, typer.Option(help="Train so many held-out networks fully, to measure how well the tier ranks; 0: none.")
    ] = 0,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Search networks that meet a latency budget on this device, as measured on it.

    With --data candidates are trained on your images, and at the end the winner and a published network are trained
    fully, by one recipe. The same command continues its study. Ctrl-C ends it cleanly, with the report written.

    Exit codes: 0 a network surely fits, 1 none does or a step at the end failed, 2 bad input, 130 Ctrl-C.
    """
    from nas.units import parse_budget, parse_duration

    budget_ms = parse_budget(latency_budget)
    timeout_s = parse_duration(timeout) if timeout else None
    if trials is not None and trials < 1:
        raise UserError(f"--trials is {trials}: give 1 or more")
    if num_classes is not None and not 1 <= num_classes <= 100_000:
        raise UserError(f"--num-classes is {num_classes}: give 1 to 100000")
    if resolution is not None and (resolution % 32 or not 32 <= resolution <= 512):
        raise UserError(f"--resolution is {resolution}: give a multiple of 32 from 32 to 512")
    settings = settings_of(runtime, device, threads, batch_size, precision)
    if throughput_at is not None:
        settings_of(runtime, device, threads, throughput_at, precision)
    families = families_of(family)
    tier = tier_of(quality, data, parent)
    lessons = None
    if tier == "prior":
        for name in TRAINING_OPTIONS:
            if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE":
                raise UserError(f"--{name.replace('_', '-')} needs --data: without images nothing is trained")
    else:
        from nas.quality.schooling import DEFAULT_EPOCHS, Lessons

        last = DEFAULT_EPOCHS[tier] if epochs is None else epochs
        lessons = Lessons(data or "", train_images, last, final_epochs, seeds, validate, parent)
        lessons.check()
        families = inheriting(parent, families, family) if tier == "inherit" else families

    from nas.cli.progress import load, waiting

    load("nas.search.loop" if lessons is None else "nas.training.engine", quiet)
    from nas.cli.display import show_result
    from nas.cli.progress import watch
    from nas.networks.targets import find_target
    from nas.search.loop import Options, default_study, interruptible, storage_of
    from nas.search.loop import search as run_search
    from nas.search.outcome import exit_code, finish_run
    from nas.study.storage import storage_errors
    from nas.study.trials import sweep
    from nas.threads import training_threads

    beside = tuple(find_target(network) for network in against or ())
    for target in beside:
        if target.onnx:
            raise UserError(f"--against {target.label}: give a published name, an arch.json or timm/NAME")
    name = study or default_study(
        {
            "settings": settings,
            "budget_ms": budget_ms,
            "families": families,
            "quality": tier,
            "throughput_at": throughput_at,
            "resolution": resolution,
            "num_classes": num_classes,
        }
    )
    if not name.strip(".") or "/" in name or "\0" in name:
        raise UserError(f"--study {name!r} cannot be a folder's name")
    images = None
    if lessons is not None:
        from nas.data.dataset import open_data
        from nas.quality.schooling import parent_weights

        with waiting(f"reading {data}", quiet):
            images = open_data(data, resolution or 224, num_classes, seed or 0, parent_weights(parent))
        num_classes = len(images.classes)
    options = Options(
        budget_ms=budget_ms,
        settings=settings,
        families=families,
        trials=trials or (40 if lessons else 100),
        timeout_s=timeout_s,
        study=name,
        out=out,
        storage=storage,
        sampler=sampler,
        seed=seed,
        num_classes=num_classes or 1000,
        quality=tier,
        resolution=resolution,
        lessons=lessons,
        throughput_at=throughput_at,
        against=beside,
        cache=not no_cache,
    )
    with watch(options, images, quiet) as (progress, say, phase), training_threads(train_threads, say):
        found, run = run_search(options, progress, say, phase, images)
        with storage_errors(storage_of(options)), interruptible():
            result = finish_run(options, found, run, command_line(), phase, say)
            sweep(found)
    show_result(result, options.folder, as_json, verbose, data)
    if as_json:
        print(json.dumps({key: result[key] for key in result if key != "trials"} | {"folder": str(options.folder)}))
    if result["interrupted"] and not result["failures"]:
        raise KeyboardInterrupt
    raise typer.Exit(exit_code(result))


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
    from nas.cli.runs import list_runs, show_runs

    rows = list_runs(folder)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        show_runs(rows, folder)


@app.command(short_help="List the published networks.", epilog="Example:  vitnas models --json")
def models(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure those not yet measured here; Ctrl-C keeps what is done."),
    ] = False,
    device: Device = "cpu",
    runtime: RuntimeName = None,
    threads: Threads = None,
    batch_size: BatchSize = 1,
    precision: Precision = "fp32",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """List the published networks: parameters, MACs, resolution, published top-1, and latency where measured here.

    Exit codes: 0 done, 1 some could not be measured, 2 bad input, 130 Ctrl-C: what was measured is kept.
    """
    from nas.cli.models import archs, list_rows, show_rows

    settings, networks, failed = settings_of(runtime, device, threads, batch_size, precision), archs(), {}
    if measure:
        from nas.bench.known import fill
        from nas.cli.progress import watch_phases
        from nas.measure.cache import known

        unknown = {name: arch for name, arch in networks.items() if known(arch, settings) is None}
        with watch_phases(quiet) as (progress, _):
            failed = fill(unknown, settings, lambda name, *done: progress(f"measuring {name}", *done))
    rows = list_rows(networks, settings)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        show_rows(rows, settings)
    for why in dict.fromkeys(failed.values()):
        names = ", ".join(name for name, reason in failed.items() if reason == why)
        print(f"{names} could not be measured: {why}", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


@app.command(short_help="Show what a network or a run is.", epilog="Example:  vitnas show runs/cpu-onnxruntime-2ms-all")
def show(
    model: Annotated[str, typer.Argument(help="A published name, an arch.json, a run's folder, or a .onnx file.")],
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show a network: its stages along the five axes, and the data, classes, accuracy and latency of its run.

    Exit codes: 0 done, 2 bad input.
    """
    from nas.cli.show import facts_of
    from nas.cli.show import show as show_facts
    from nas.networks.targets import find_target

    facts = facts_of(find_target(model))
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        show_facts(facts)


@app.command(
    short_help="Measure networks side by side.",
    epilog="Example:  vitnas bench levit_128s shvit_s1@160 timm/lcnet_075 runs/cpu-onnxruntime-2ms-all\n\n"
    "Example:  vitnas bench efficientvit_m0 timm/lcnet_075 --runtime onnxruntime --runtime openvino --precision fp32 "
    "--precision int8 --data ./images\n\n"
    "Example:  vitnas bench mine.onnx --shape images=1x3x224x224 --throughput-at 64 --csv bench.csv --plot bench.png",
)
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Published names, arch.json files, runs' folders, timm/NAME or .onnx files; each with @PX for another "
            "input resolution."
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Input resolution, in px, of all networks without @PX.  [default: their own]")
    ] = None,
    device: Device = "cpu",
    runtime: Annotated[list[str] | None, typer.Option(help=f"{RUNTIMES}; repeatable.  {DEFAULT_RUNTIME}")] = None,
    precision: Annotated[list[str] | None, typer.Option(help=f"{PRECISIONS}; repeatable.  [default: fp32]")] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Images per inference; repeatable.  [default: 1, or what an .onnx file is fixed at]"),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="CPU threads; repeatable.  [default: the physical cores this process may use]"),
    ] = None,
    throughput_at: Annotated[
        int | None, typer.Option(help="Batch size to tell the throughput of.  [default: that of the latency]")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of an .onnx file's dynamic input, as images=1x3x224x224, its first size the batch unless "
            "--batch-size says another; repeatable."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images that int8 is calibrated on, as for `vitnas train`.  [default: noise]")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="papers: the speed claims of the five papers, measured here.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds; every network is timed in each.  [default: 30; 6 with --suite]")
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            help="Time for a network to load and warm up, and for each of its rounds: 90s, 10m.  [default: 10m]"
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies: a .png, .svg or .pdf.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure networks side by side, in every combination of runtimes, precisions, batch sizes and threads.

    All in one interleaved run; ratios are to the first row. --json prints results (with their resolution and
    throughput_batch), failed (with their error), hardware and notes. Ctrl-C tells the rounds made until then.

    Exit codes: 0 all were measured, 2 bad input, or some could not be measured (the others are told), 130 Ctrl-C.
    """
    import itertools

    from nas.cli.progress import load

    load("nas.bench.run", quiet)
    from nas.bench.run import PLOTS, TIMEOUT_S, Options, check_output, parse_shape, plan, run_bench, to_csv, to_plot
    from nas.bench.table import show_bench
    from nas.cli.progress import watch_phases
    from nas.files import replace_file
    from nas.measure.device import device_lock
    from nas.measure.hardware import busy_line, describe
    from nas.measure.protocol import MAX_ROUNDS, SURE_ROUNDS, quanta_line
    from nas.networks.targets import find_target
    from nas.units import parse_duration

    if rounds is None:
        rounds = SURE_ROUNDS if suite else MAX_ROUNDS
    if rounds < SURE_ROUNDS:
        raise UserError(f"--rounds is {rounds}: give {SURE_ROUNDS} or more, for intervals of 95%")
    if suite is not None:
        asked = [
            (runtime, "--runtime"),
            (precision, "--precision"),
            (batch_size, "--batch-size"),
            (threads, "--threads"),
        ]
        for given, option in asked:
            if given and len(given) > 1:
                raise UserError(f"{option} can be given once with --suite")
        for given, option in (
            (models, "networks"),
            (data, "--data"),
            (resolution, "--resolution"),
            (throughput_at, "--throughput-at"),
            (shape, "--shape"),
            (timeout, "--timeout"),
            (plot, "--plot"),
        ):
            if given:
                raise UserError(f"--suite brings its own networks: leave out {option}")
        one = [given[0] if given else None for given, _ in asked]
        settings = settings_of(one[0], device, one[3], one[2] or 1, one[1] or "fp32")
        run_suite(suite, settings, rounds, csv, as_json, quiet)
        return
    if not models:
        raise UserError("name the networks to measure: published names, timm/NAME, arch.json or .onnx files")
    asked = list(itertools.product(runtime or [None], precision or ["fp32"], batch_size or [1], threads or [None]))
    settings = [settings_of(run, device, thread, batch, kind) for run, kind, batch, thread in asked]
    if throughput_at is not None:
        for run, kind, _, thread in asked:
            settings_of(run, device, thread, throughput_at, kind)
    if csv:
        check_output("--csv", csv)
    if plot:
        check_output("--plot", plot, PLOTS)
    options = Options(
        targets=[find_target(model, resolution) for model in models],
        settings=list(dict.fromkeys(settings)),
        rounds=rounds,
        own_batch=not batch_size,
        throughput_at=throughput_at,
        shapes=dict(map(parse_shape, shape or ())),
        data=data,
        timeout_s=parse_duration(timeout) if timeout else TIMEOUT_S,
    )
    planned = plan(options)
    with device_lock(device):  # what another vitnas does there is not this machine's load
        hardware = describe(max(settings, key=lambda each: each.threads))
    with watch_phases(quiet) as (progress, say):
        found = run_bench(options, progress, say, planned)
    waiting = any(row["waiting"] for row in found.rows)
    line = quanta_line(hardware, "the figures marked waiting") if waiting else busy_line(hardware)
    if line:
        found.notes.insert(0, f"{line[:1].upper()}{line[1:]}.")
    if as_json:
        told = {"results": found.rows, "failed": found.failed, "hardware": hardware, "notes": found.notes}
        print(json.dumps(told, indent=1))
    elif found.rows:
        show_bench(found.rows, found.notes)
    if found.rows and csv:
        replace_file(csv, to_csv(found.rows, found.failed))
    if found.rows and plot:
        replace_file(plot, to_plot(found.rows, plot.suffix))
    if found.interrupted:
        raise KeyboardInterrupt
    if found.errors:
        raise UserError("; ".join(found.errors))


@app.command(
    short_help="Shrink a trained network to a budget.",
    epilog="Examples:\n\n  vitnas prune --model efficientvit_m4\n\n"
    "  vitnas prune --model levit_192 --data ./images --latency-budget 0.6x --finetune 3 --distill",
)
def prune(
    model: Annotated[str, typer.Option(help="A published name, an arch.json, a run's folder, or timm/NAME.")],
    macs: Annotated[
        str | None, typer.Option(help="Budget: 0.5x of its MACs, or 150M.  [default: 0.5x, without another budget]")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Budget: 0.5x of its parameters, or 4M.")] = None,
    latency_budget: Annotated[str | None, typer.Option(help="Budget as measured here: 1.5ms or 0.6x.")] = None,
    data: Data = None,
    weights: Annotated[
        str | None,
        typer.Option(help="timm, or a PyTorch or safetensors file.  [default: the folder's own, or timm's]"),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes the data must have.")] = None,
    reallocate: Annotated[
        bool, typer.Option("--reallocate/--no-reallocate", help="Widen what matters with what is saved elsewhere.")
    ] = True,
    axes: Annotated[str, typer.Option(help="What may change.")] = "ffn,qk,v,heads,embed,blocks",
    criterion: Annotated[
        str, typer.Option(help="Importance: taylor, taylor2, magnitude, random or torch-pruning.")
    ] = "taylor",
    multiple_of: Annotated[int, typer.Option(help="Widths stay multiples of this.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds of scoring and cutting.")] = 3,
    finetune: Annotated[float, typer.Option(help="Epochs of fine-tuning afterwards; 0 for none.")] = 1.0,
    distill: Annotated[bool, typer.Option("--distill", help="Fine-tune with the unpruned network as teacher.")] = False,
    control: Annotated[
        bool,
        typer.Option("--control/--no-control", help="Fine-tune the unpruned network alike, to compare with."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of splits, samples and training.", **SEEDS)] = 0,
    device: Device = "cpu",
    runtime: RuntimeName = None,
    threads: Threads = None,
    batch_size: BatchSize = 1,
    precision: Precision = "fp32",
    train_threads: TrainThreads = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.  [default: one in runs/]")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Shrink a network to a budget by Taylor importance, and move parameters to where they matter.

    The same command continues an interrupted run after its last finished round.

    Exit codes: 0 done and within the budget, 1 done but over it as measured or too close to it to tell,
    or a step at its end failed, 2 bad input, 130 Ctrl-C.
    """
    from nas.cli.progress import load

    load("nas.prune.run", quiet)
    from nas.cli.progress import watch_phases
    from nas.prune.images import compute_device
    from nas.prune.run import Options, default_folder, kinds_of, parse_pruning_budget
    from nas.prune.run import prune as run_prune
    from nas.prune.screen import show_prune
    from nas.threads import training_threads

    budget = parse_pruning_budget(macs, params, latency_budget)
    options = Options(
        model=model,
        budget=budget,
        settings=settings_of(runtime, device, threads, batch_size, precision),
        folder=out or default_folder(model, budget),
        reallocate=reallocate,
        kinds=kinds_of(axes),
        criterion=criterion,
        multiple_of=multiple_of,
        rounds=rounds,
        finetune=finetune,
        distill=distill,
        control=control,
        data=data,
        weights=weights,
        num_classes=num_classes,
        seed=seed,
    )
    options.check()
    with watch_phases(quiet) as (progress, say), training_threads(train_threads, say, compute_device(options.settings)):
        found = run_prune(options, command_line(), say, progress)
    show_prune(found, options.folder, to_stderr=as_json)
    if as_json:
        print(json.dumps(found | {"folder": str(options.folder)}))
    raise typer.Exit(0 if found["budget"]["met"] and not found.get("failures") else 1)


@app.command(
    short_help="Train a network on your images.",
    epilog="Examples:\n\n  vitnas train efficientvit_m0 --data ./images --resolution 128\n\n"
    "  vitnas train levit_192 --weights timm --data ./images\n\n"
    "  torchrun --nproc-per-node 8 -m nas.cli train levit_192 --data ./imagenet --recipe levit "
    "--teacher timm/regnety_160.deit_in1k --precision bf16",
)
def train(
    model: Model,
    data: Data = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="quick, finetune, or a published one: levit, efficientvit, evit, shvit, sepvit.  [default: quick; "
            "finetune from weights]"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.  [default: the recipe's]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images an update, of all processes.  [default: the recipe's]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate.  [default: the recipe's, scaled with the batch size]")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Input resolution in px.  [default: the network's]")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Start from timm's, from a PyTorch or safetensors file, or from none.  [default: the folder's own; "
            "none]"
        ),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes the data must have.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Distil from timm/NAME, a published name, or a folder with weights.")
    ] = None,
    teacher_weights: Annotated[
        str | None, typer.Option(help="The teacher's weights, a file.  [default: timm's, or the folder's own]")
    ] = None,
    distillation: Annotated[
        str | None, typer.Option(help="hard (the teacher's choice) or soft (its logits).  [default: the recipe's]")
    ] = None,
    oracle: Annotated[
        str | None, typer.Option(help="For EViT: a trained DeiT of its depth that lends weights and chooses tokens.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast).")] = "fp32",
    accumulate: Annotated[int, typer.Option(help="Parts in which an update's images come.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode images.  [default: 0 on cpu, else up to 8]")
    ] = None,
    train_threads: TrainThreads = None,
    seed: Annotated[int, typer.Option(help="Seed of splits, weights and training.", **SEEDS)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.  [default: one in runs/]")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on images; the accuracy told is that of the last epoch's weights, never of the best one.

    A run's folder begins with its own weights. The same command continues an interrupted training where it was.

    Exit codes: 0 done, 1 the training or its ONNX file failed (weights of the last good epoch are kept) or the disk is
    full, 2 bad input, 130 Ctrl-C.
    """
    from nas.cli.progress import load

    load("nas.training.engine", quiet)
    from nas.cli.display import show_train
    from nas.cli.progress import watch_images
    from nas.threads import training_threads
    from nas.training.run import Options, check_device, choose_recipe, default_folder, default_workers, starting_weights
    from nas.training.run import train as run_train

    begun_with = starting_weights(model, weights, out)
    chosen = choose_recipe(
        recipe or ("quick" if begun_with is None else "finetune"), epochs, batch_size, lr, distillation
    )
    device = check_device(device)
    options = Options(
        model=model,
        recipe=chosen,
        device=device,
        folder=out or default_folder(model, chosen.name),
        data=data,
        resolution=resolution,
        num_classes=num_classes,
        weights=begun_with,
        teacher=teacher,
        teacher_weights=teacher_weights,
        oracle=oracle,
        precision=precision,
        accumulate=accumulate,
        compiled=compiled,
        workers=default_workers(device) if workers is None else workers,
        seed=seed,
    )
    options.check()
    with watch_images(chosen.epochs, quiet) as (progress, say), training_threads(train_threads, say, device):
        found = run_train(options, command_line(), say, progress)
    if "final" in found:
        show_train(found, options.folder, to_stderr=as_json)
        if as_json:
            print(json.dumps(found | {"folder": str(options.folder)}))
    raise typer.Exit(1 if found["error"] else 0)


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
    from nas.export.artifact import export_folder
    from nas.networks.targets import find_arch, find_target

    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: give 1 or more")
    arch = find_arch(model)
    given = weights or find_target(model).weights
    print(export_folder(arch, out, given and str(given), num_classes, batch_size))


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


def run_suite(name: str, settings: Any, rounds: int, csv: Path | None, as_json: bool, quiet: bool) -> None:
    """`vitnas bench --suite NAME`."""
    from nas.bench.papers import papers_csv, papers_table, run_papers
    from nas.bench.run import check_output
    from nas.cli.progress import watch_phases
    from nas.files import replace_file
    from nas.measure.device import device_lock
    from nas.measure.hardware import busy_line, describe
    from nas.report.tables import console_of

    if name != "papers":
        raise UserError(f"unknown suite {name!r}: choose papers")
    if csv:
        check_output("--csv", csv)
    with device_lock(settings.device):
        hardware = describe(settings)
    with watch_phases(quiet) as (progress, say):
        if line := busy_line(hardware):
            say(line)
        found = run_papers(settings, rounds, lambda done, total: progress("claims", done, total), say)
    if as_json:
        print(json.dumps(found | {"hardware": hardware}, indent=1))
    else:
        console_of().print(papers_table(found["rows"]))
    if csv:
        replace_file(csv, papers_csv(found["rows"]))
    if found["interrupted"] == "interrupted":
        raise KeyboardInterrupt
    if found["interrupted"]:
        raise UserError(found["interrupted"])


def storage_named(run: str | None) -> str | Path:
    """The storage of a run named on the command line, or of the newest one under runs/."""
    if run is not None and "://" in run:
        return run
    if run is None:
        journals = sorted(Path("runs").glob("*/study.journal"), key=lambda path: path.stat().st_mtime)
        if not journals:
            raise UserError("there is no run under runs/ here: name a run's folder, a journal or a database URL")
        return journals[-1]
    from nas.cli.show import kind_of

    path = Path(run) / "study.journal" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        if path.name == "study.journal" and (kind := kind_of(path.parent)) in ("training", "pruning"):
            raise UserError(f"{run} is a {kind}, not a search: `vitnas show {shlex.quote(run)}` tells of it")
        raise UserError(f"{path}: no such journal; for a study in a database give its URL")
    return path


def settings_of(runtime: str | None, device: str, threads: int | None, batch_size: int, precision: str = "fp32") -> Any:
    """Checked measuring settings with their defaults filled in."""
    from nas.measure.device import check_settings, default_threads, device_kind
    from nas.measure.runtime import Settings

    settings = Settings(
        runtime=runtime or ("torch" if device_kind(device) == "cuda" else "onnxruntime"),
        device=device,
        threads=default_threads(device) if threads is None else threads,
        batch_size=batch_size,
        precision=precision,
    )
    check_settings(settings)
    return settings


def tier_of(quality: str, data: str | None, parent: str | None) -> str:
    """The tier that `--quality` names, or that the data and the parent allow."""
    from nas.quality.tiers import TIERS

    if quality not in ("auto", *TIERS):
        raise UserError(f"--quality {quality!r}: choose auto, {', '.join(TIERS)}")
    if data is None and (parent is not None or quality not in ("auto", "prior")):
        raise UserError(
            f"{'--parent' if parent is not None else f'--quality {quality}'} needs --data: images to train on"
        )
    if quality == "auto":
        return "prior" if data is None else "train" if parent is None else "inherit"
    if quality == "inherit" and parent is None:
        raise UserError("--quality inherit needs --parent: a folder with trained weights, or a published name")
    if parent is not None and quality != "inherit":
        raise UserError(f"--quality {quality} inherits nothing: leave out --parent, or give --quality inherit")
    if quality == "prior" and data is not None:
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
    import difflib

    from search_spaces.registry import FAMILIES

    for name in names or ():
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(FAMILIES)}"
            raise UserError(f"unknown family {name!r}: {hint}")
    return tuple(name for name in FAMILIES if not names or name in names)


def command_line() -> str:
    """The command as typed, without passwords."""
    from nas.text import mask_url

    words = [word if "://" not in word else mask_url(word) for word in sys.argv[1:]]
    return shlex.join(["vitnas", *words])


def main() -> None:
    """Run the command line; errors are one line on standard error and exit code 2, of a full disk 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended, files are whole
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of it
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        log.debug("traceback", exc_info=True)
        fail(str(error), 1 if isinstance(error, DiskFull) else 2)
    except KeyboardInterrupt:
        goes_on = sys.argv[1:2] in (["search"], ["prune"], ["train"])
        print("interrupted" + f"; to go on: {command_line()}" * goes_on, file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        log.debug("traceback", exc_info=True)
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        fail(error.format_message())


def fail(message: str, code: int = 2) -> None:
    """Print one line and exit with a code."""
    print("vitnas: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
