"""`vitnas bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from nas.cli.options import DEFAULT_RUNTIME, PRECISIONS, RUNTIMES, Device, Json, MaxDrop, Quiet, Verbose
from nas.errors import UserError
from nas.export.quantize import MAX_DROP

if TYPE_CHECKING:
    from nas.measure.runtime import Settings

app = typer.Typer()


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
            help="Published names, arch.json files, runs' folders, timm/NAME, hf-hub:REPO or .onnx files; each with "
            "@PX for another input resolution."
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
        int | None, typer.Option(help="Batch size to measure the throughput at.  [default: that of the latency]")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of an .onnx file's dynamic input, as images=1x3x224x224, its first size the batch unless "
            "--batch-size says another; repeatable."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images that int8 is calibrated on, and that judge int8, fp16 and bf16 of networks trained on their "
            "classes; as for `vitnas train`.  [default: noise]"
        ),
    ] = None,
    max_drop: MaxDrop = MAX_DROP,
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
    csv: Annotated[Path | None, typer.Option(help="CSV file to write the table to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies: a .png, .svg or .pdf.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure networks side by side, in every combination of runtimes, precisions, batch sizes and threads.

    All in one interleaved run; ratios are to the first row. --json prints results (with their resolution and
    throughput_batch), failed (with their error), hardware and notes. After Ctrl-C they are of the rounds made so
    far; those of a device behind ssh are lost.

    Exit codes: 0 all were measured, 2 bad input, or some could not be measured (the others are shown), 130 Ctrl-C.
    """
    import itertools
    from dataclasses import replace

    from nas.cli.progress import load
    from nas.measure.device import settings_for

    load("nas.bench.run", quiet)
    from nas.bench.report import PLOTS, to_csv, to_plot
    from nas.bench.request import TIMEOUT_S, BenchRequest, check_rounds, plan
    from nas.bench.run import bench as run_bench
    from nas.bench.shapes import parse_shapes
    from nas.bench.table import show_bench
    from nas.cli.progress import watch_phases
    from nas.files import check_output, replace_file
    from nas.measure.device import device_lock
    from nas.measure.hardware import busy_line, describe
    from nas.measure.samples import MAX_ROUNDS, SURE_ROUNDS, quanta_line
    from nas.networks.targets import find_target
    from nas.units import parse_duration

    if rounds is None:
        rounds = SURE_ROUNDS if suite else MAX_ROUNDS
    check_rounds(rounds)
    if suite is not None:
        settings = suite_settings(
            device,
            {"runtime": runtime, "precision": precision, "batch-size": batch_size, "threads": threads},
            {
                "networks": models or None,
                "--data": data,
                "--max-drop": None if max_drop == MAX_DROP else max_drop,
                "--resolution": resolution,
                "--throughput-at": throughput_at,
                "--shape": shape or None,
                "--timeout": timeout,
                "--plot": plot,
            },
        )
        run_suite(suite, settings, rounds, csv, as_json, quiet)
        return
    every = [
        settings_for(run, device, thread, batch, kind)
        for run, kind, batch, thread in itertools.product(
            cast("list[str | None]", runtime) or [None],
            precision or ["fp32"],
            batch_size or [1],
            cast("list[int | None]", threads) or [None],
        )
    ]
    if csv:
        check_output("--csv", csv, inputs=models or ())
    if plot:
        check_output("--plot", plot, PLOTS)
    request = BenchRequest(
        targets=[find_target(model, resolution) for model in models or ()],
        settings=list(dict.fromkeys(every)),
        rounds=rounds,
        own_batch=not batch_size,
        throughput_at=throughput_at,
        shapes=parse_shapes(shape or ()),
        data=data,
        max_drop=max_drop,
        timeout_s=parse_duration(timeout) if timeout else TIMEOUT_S,
    )
    request.check()
    planned = plan(request)
    with device_lock(device):  # what another vitnas does there is not this machine's load
        hardware = describe(max(every, key=lambda each: each.threads))
    with watch_phases(quiet) as (progress, say):
        found = run_bench(request, progress, say, planned)
    waiting = any(row.waiting for row in found.rows)
    line = quanta_line(hardware, "the figures marked waiting") if waiting else busy_line(hardware)
    if line:
        found = replace(found, notes=[f"{line[:1].upper()}{line[1:]}.", *found.notes])
    if as_json:
        print(json.dumps(found.to_json() | {"hardware": hardware}, indent=1))
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


def suite_settings(device: str, once: Mapping[str, list[Any] | None], others: Mapping[str, object]) -> Settings:
    """The settings of `bench --suite`.

    Args:
        once: options that may be given once, by name; None: not given.
        others: what a suite brings itself, by how the user calls it; None: not given.

    Raises:
        UserError: an option more than once, or one that a suite brings itself.
    """
    from nas.measure.device import settings_for

    for name, given in once.items():
        if given and len(given) > 1:
            raise UserError(f"--{name} can be given once with --suite")
    for name, value in others.items():
        if value is not None:
            raise UserError(f"--suite brings its own networks: leave out {name}")
    first = {name: given[0] if given else None for name, given in once.items()}
    return settings_for(
        first["runtime"], device, first["threads"], first["batch-size"] or 1, first["precision"] or "fp32"
    )


def run_suite(name: str, settings: Any, rounds: int, csv: Path | None, as_json: bool, quiet: bool) -> None:
    """`vitnas bench --suite NAME`."""
    from nas.bench.papers import papers_csv, papers_table, run_papers
    from nas.cli.progress import watch_phases
    from nas.files import check_output, replace_file
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
        print(json.dumps(found.to_json() | {"hardware": hardware}, indent=1))
    else:
        console_of().print(papers_table(found.rows))
    if csv:
        replace_file(csv, papers_csv(found.rows))
    if found.interrupted == "interrupted":
        raise KeyboardInterrupt
    if found.interrupted:
        raise UserError(found.interrupted)
