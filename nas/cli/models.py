"""`vitnas models`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from nas.cli.options import BatchSize, Device, Json, Precision, Quiet, RuntimeName, Threads, Verbose

app = typer.Typer()


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
    from nas.cli.model_list import archs, list_rows, show_rows
    from nas.measure.device import settings_for

    settings, networks, failed = settings_for(runtime, device, threads, batch_size, precision), archs(), {}
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
