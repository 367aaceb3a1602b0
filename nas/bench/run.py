"""`vitnas bench`: networks side by side on one device, in every combination of what is asked for, in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.bench.files import Calibration, Files
from nas.bench.report import SETTINGS, varying, worded
from nas.bench.request import plan

if TYPE_CHECKING:
    from nas.bench.report import Row
    from nas.bench.request import BenchRequest, Cell, Plan, Progress, Waiting


from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.files import scratch
from nas.measure.device import compare, device_lock
from nas.measure.protocol import Interrupted
from nas.measure.reasons import plain
from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.samples import BUSY_SPREAD, SURE_ROUNDS, MeasureError, Measurement, paired_ratio, quanta
from nas.process import TOLD_S, WorkerError

if TYPE_CHECKING:
    from nas.networks.targets import Target


UNFOLDED = "On PyTorch timm's networks keep the BatchNorms that timm cannot fold; ours are folded. ONNX folds both."


@dataclass
class Found:
    """rows: of what could be measured, as JSON and the table tell it. failed: what could not, with its error; errors: a
    line for each of them. interrupted: whether Ctrl-C ended it before its last round."""

    rows: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False


def run_bench(
    options: BenchRequest,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    planned: Plan | None = None,
) -> Found:
    """Measure all networks in all combinations in one interleaved run; ratios are to the first row.

    say: told what is waited for, in a line. planned: what `plan` made of the options, if it was called before. Ctrl-C
    ends the run with the rounds made until then.

    Raises:
        KeyboardInterrupt: there were none.
        UserError: as `plan`, or calibration images that cannot be had or that nothing uses; nothing has been measured
            then.
    """
    found, many, planned = Found(), options.throughput_at, planned or plan(options)
    targets, inputs, cells, sizes = planned.targets, planned.inputs, planned.cells, planned.sizes
    for label in targets:
        if sum(target.label == label for target in options.targets) > 1:
            found.notes.append(f"{label} is named more than once: measured once.")
    batches = {cell: (cell[0], replace(cell[1], batch_size=many or cell[1].batch_size)) for cell in cells}
    every = list(dict.fromkeys([*cells, *batches.values()]))

    results: dict[Cell, Measurement | MeasureError] = {}
    with scratch() as folder, device_lock(options.settings[0].device):
        calibration = Calibration(options, folder, found.notes)
        paths: dict[str, Path] = {}
        waiting = _teller(say)
        with Files(folder, targets, inputs, options, calibration, waiting) as files:
            for i, cell in enumerate(every):
                progress(f"exporting {cell[0]}", i, len(every))
                try:
                    paths[str(i)] = files.of(*cell)
                except WorkerError as error:
                    results[cell] = MeasureError(f"cannot be prepared: {plain(str(error))}")
        settings = {name: every[int(name)][1] for name in paths}
        try:
            told = compare(
                paths,
                settings,
                options.rounds,
                lambda *done: progress("measuring, rounds", *done),
                options.timeout_s,
                lambda name, *waited: waiting(every[int(name)][0], *waited),
            )
        except Interrupted as interrupt:
            if not interrupt.done:
                raise
            told, found.interrupted = interrupt.results, True
            few = ": intervals cover less than 95%" * (interrupt.done < SURE_ROUNDS)
            found.notes.append(f"Interrupted: {interrupt.done} of {options.rounds} rounds were made{few}.")
    for name, result in told.items():
        label, own = every[int(name)]
        if isinstance(result, MeasureError):
            given, why = inputs.get(label), plain(str(result))
            inside = own.batch_size > 1 and given is not None and given.batch_size is None and " node " in why
            hint = f"; it may be made for batch 1 inside: leave out batch {own.batch_size}" * inside
            result = MeasureError(why + hint)
        results[label, own] = result

    differing = varying([asdict(settings) for _, settings in every])
    first: Measurement | None = None
    for label, settings in every:
        result = results[label, settings]
        if isinstance(result, MeasureError):
            where = ", ".join(worded(name, getattr(settings, name)) for name in differing)
            found.errors.append(f"{label}{where and f' ({where})'}: {result}")
            failure = {"model": label, "resolution": sizes[label], **_of(settings), "error": str(result)}
            found.failed.append(failure)
    if found.interrupted:
        found.notes += found.errors
    for cell in cells:
        result, batch = results[cell], batches[cell]
        if isinstance(result, Measurement):
            first = first or result
            row = {"model": cell[0], "resolution": sizes[cell[0]], **_row(cell[1], result, first)}
            found.rows.append(row | _throughput(results[batch], batch[1].batch_size))
    found.notes += [
        f"{label} holds weights of float16: a CPU without arithmetic of float16 computes in fp32."
        for label, given in inputs.items()
        if given.half
    ]
    found.notes += [trained_elsewhere(target) for target in targets.values() if target.trained_at]
    if line := unequal({row["model"]: row["resolution"] for row in found.rows}, options.targets):
        found.notes.append(line)
    if any(targets[label].timm and RUNTIMES[settings.runtime].artifact == "module" for label, settings in cells):
        found.notes.append(UNFOLDED)
    waiting = any(row["waiting"] for row in found.rows)
    spreads = [(result.spread, cell[0]) for cell, result in results.items() if isinstance(result, Measurement)]
    spread, label = max(spreads, default=(0, ""))
    if spread > BUSY_SPREAD and not waiting:
        found.notes.append(
            f"This machine was busy: the rounds of {label} varied by {spread:.0%}; run again on a quiet machine."
        )
    return found


def trained_elsewhere(target: Target) -> str:
    """A line on a network that was trained at another resolution than it is measured at."""
    return f"{target.label}: trained at {target.trained_at} px, measured at {target.arch.resolution} px."


def unequal(sizes: Mapping[str, int | str | None], targets: Iterable[Target]) -> str | None:
    """A line where networks, by label, have other resolutions than the first, with what makes them equal; or None."""
    told = {label: size for label, size in sizes.items() if size is not None}
    first = next(iter(told), "")
    usual = told.get(first)
    others = {label: size for label, size in told.items() if size != usual}
    if not others:
        return None
    said = []
    for size in dict.fromkeys(others.values()):
        labels = [label for label in others if others[label] == size]
        said.append(f"{' and '.join(labels)} run{'s' * (len(labels) == 1)} at {size} px")
    rest = first if len(told) == len(others) + 1 else "the others"
    able = any(each.label in others and each.resolution is None and each.onnx is None for each in targets)
    hint = f": add @{usual}" if able and isinstance(usual, int) else ""
    return f"{', '.join(said)}, {rest} at {usual} px{hint}."


def _teller(say: Callable[[str], None]) -> Waiting:
    """Tells of every network once, and again where it is waited for longer."""
    told: set[str] = set()

    def waiting(label: str, waited_s: float, most_s: float) -> None:
        if label not in told or waited_s > TOLD_S:
            told.add(label)
            say(f"waiting for {label}: no answer for {waited_s:.0f} s, will give up after {most_s:.0f} s (--timeout)")

    return waiting


def _of(settings: Settings) -> Row:
    return {name: getattr(settings, name) for name in SETTINGS}


def _row(settings: Settings, result: Measurement, first: Measurement) -> Row:
    """waiting: whether its samples are waiting times (see `quanta`); there is no ratio to or of such ones."""
    ratio, interval = paired_ratio(result, first)
    told = not quanta(result) and not quanta(first)
    return {
        **_of(settings),
        "latency_ms": result.p50_ms,
        "p95_ms": result.p95_ms,
        "ci": list(result.ci_ms),
        "samples": result.n,
        "ratio": ratio if told else None,
        "ratio_ci": list(interval) if told else None,
        "waiting": quanta(result),
    }


def _throughput(result: Measurement | MeasureError, batch_size: int) -> Row:
    measured = isinstance(result, Measurement)
    return {"throughput": result.throughput(batch_size) if measured else None, "throughput_batch": batch_size}


# ------------------------------------------------------------------------------------------------ ONNX files


# ------------------------------------------------------------------------------------------------ files to measure


# ------------------------------------------------------------------------------------------------ CSV and plot
