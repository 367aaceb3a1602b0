"""`vitnas bench`: networks side by side on one device, in every combination of what is asked for, in one run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.bench.files import Calibration, Files
from nas.bench.report import worded
from nas.bench.request import Cell, plan
from nas.bench.result import SETTINGS, BenchFailure, BenchResult, BenchRow, varying
from nas.evaluate.precision import judging
from nas.export.side_by_side import measure_side_by_side
from nas.files import scratch
from nas.measure.protocol import Interrupted
from nas.measure.reasons import plain
from nas.measure.runtime import LOWER, RUNTIMES
from nas.measure.samples import BUSY_SPREAD, SURE_ROUNDS, MeasureError, Measurement, paired_ratio, quanta
from nas.process import TOLD_S, WorkerError

if TYPE_CHECKING:
    from nas.bench.request import BenchRequest, Plan, Progress, Waiting
    from nas.evaluate.precision import Price
    from nas.export.onnx_input import OnnxInput
    from nas.measure.runtime import Settings
    from nas.networks.targets import Target

Results = dict[Cell, Measurement | MeasureError]
Prices = Mapping[tuple[str, str, str], "Price"]
"""By label, runtime that judges, and precision."""


class Unprepared(MeasureError):
    """A network whose file cannot be made."""


UNFOLDED = "On PyTorch timm's networks keep the BatchNorms that timm cannot fold; ours are folded. ONNX folds both."


def bench(
    request: BenchRequest,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    planned: Plan | None = None,
) -> BenchResult:
    """Measure all networks in all combinations in one interleaved run; ratios are to the first row.

    say: called with a line on what is waited for. planned: what `plan` made of the request, if it was called before.
    Ctrl-C ends the run with the rounds made until then.

    Raises:
        KeyboardInterrupt: there were none.
        UserError: as `BenchRequest.check` and `plan`, or calibration images that cannot be had or that nothing uses;
            nothing has been measured then.
    """
    if planned is None:
        request.check()
        planned = plan(request)
    notes = [
        f"{label} is named more than once: measured once."
        for label in planned.targets
        if sum(target.label == label for target in request.targets) > 1
    ]
    waiting = _teller(say)
    with scratch() as folder:
        calibration = Calibration(request, folder, notes)
        with Files(folder, planned.targets, planned.inputs, request, calibration, waiting, notes) as files:
            found, done = _measure(list(planned.every), files, request, progress, waiting)
    results = {cell: _explained(cell, result, planned.inputs.get(cell.label)) for cell, result in found.items()}
    failed, errors = _failures(planned, results)
    if interrupted := done < request.rounds:
        few = ": intervals cover less than 95%" * (done < SURE_ROUNDS)
        notes += [f"Interrupted: {done} of {request.rounds} rounds were made{few}.", *errors]
    rows = _rows(planned, results, files.prices)
    return BenchResult(rows, failed, errors, notes + _notes(request, planned, results, rows), interrupted)


def _measure(
    cells: Sequence[Cell], files: Files, request: BenchRequest, progress: Progress, waiting: Waiting
) -> tuple[Results, int]:
    """Results of the interleaved run, and its whole rounds, fewer than asked for after Ctrl-C."""
    by_name = {str(i): cell for i, cell in enumerate(cells)}
    prepared = itertools.count()

    def export(cell: Cell, _: Path) -> Path:
        progress(f"exporting {cell.label}", next(prepared), len(cells))
        try:
            return files.of(cell.label, cell.settings)
        except WorkerError as error:
            raise Unprepared(f"cannot be prepared: {plain(str(error))}") from None

    done = request.rounds
    try:
        found = measure_side_by_side(
            by_name,
            export,
            {name: cell.settings for name, cell in by_name.items()},
            request.rounds,
            progress=lambda *rounds: progress("measuring, rounds", *rounds),
            timeout_s=request.timeout_s,
            waiting=lambda name, *waited: waiting(by_name[name].label, *waited),
        )
    except Interrupted as interrupt:
        if not interrupt.done:
            raise
        found, done = interrupt.results, interrupt.done
    return {by_name[name]: result for name, result in found.items()}, done


def _explained(cell: Cell, result: Measurement | MeasureError, given: OnnxInput | None) -> Measurement | MeasureError:
    """A result whose error is in plain words, with what may be done."""
    if isinstance(result, Measurement | Unprepared):
        return result
    why, batch = plain(str(result)), cell.settings.batch_size
    inside = batch > 1 and given is not None and given.batch_size is None and " node " in why
    return MeasureError(why + f"; it may be made for batch 1 inside: leave out batch {batch}" * inside)


def _failures(planned: Plan, results: Results) -> tuple[list[BenchFailure], list[str]]:
    """What could not be measured, and a line for each."""
    failed, lines = [], []
    differing = varying([cell.settings for cell in planned.every])
    for cell in planned.every:
        result = results[cell]
        if isinstance(result, MeasureError):
            where = ", ".join(worded(name, getattr(cell.settings, name)) for name in differing)
            lines.append(f"{cell.label}{where and f' ({where})'}: {result}")
            failed.append(BenchFailure(**_combination(planned, cell), error=str(result)))
    return failed, lines


def _rows(planned: Plan, results: Results, prices: Prices) -> list[BenchRow]:
    rows = []
    first: Measurement | None = None
    for cell in planned.cells:
        result = results[cell]
        if isinstance(result, Measurement):
            first = first or result
            row = _row(planned, cell, result, first, results)
            rows.append(_judged(row, prices))
    return rows


def _row(planned: Plan, cell: Cell, result: Measurement, first: Measurement, results: Results) -> BenchRow:
    """There is no ratio to or of waiting times, and no throughput of them."""
    ratio, interval = paired_ratio(result, first)
    waiting = quanta(result)
    comparable = not waiting and not quanta(first)
    batch = planned.throughput_cell(cell)
    fast, batch_size = results[batch], batch.settings.batch_size
    return BenchRow(
        **_combination(planned, cell),
        latency_ms=result.p50_ms,
        p95_ms=result.p95_ms,
        ci=result.ci_ms,
        samples=result.n,
        ratio=ratio if comparable else None,
        ratio_ci=interval if comparable else None,
        waiting=waiting,
        throughput=fast.throughput(batch_size) if isinstance(fast, Measurement) and not quanta(fast) else None,
        throughput_batch=batch_size,
        memory_mb=result.memory_mb,
        file_mb=result.file_mb,
        energy_mj=result.energy_mj,
    )


def _judged(row: BenchRow, prices: Prices) -> BenchRow:
    """With its accuracy, where that is known."""
    runtime = judging(row.runtime)
    if row.precision == "fp32":
        beside = (prices.get((row.model, runtime, precision)) for precision in LOWER)
        price = next(filter(None, beside), None)
        return replace(row, top1=price.float_top1) if price else row
    price = prices.get((row.model, runtime, row.precision))
    if price is None or RUNTIMES[row.runtime].artifact != "onnx":
        return row
    return replace(row, top1=price.top1, drop=price.drop, drop_ci=price.drop_ci, within=price.within)


def _combination(planned: Plan, cell: Cell) -> dict[str, Any]:
    """The fields of `Combination`."""
    fields = {name: getattr(cell.settings, name) for name in SETTINGS}
    return {"model": cell.label, "resolution": planned.sizes[cell.label], **fields}


def _notes(request: BenchRequest, planned: Plan, results: Results, rows: list[BenchRow]) -> list[str]:
    """What a reader of the rows has to know."""
    notes = [
        f"{label} holds weights of float16: a CPU without arithmetic of float16 computes in fp32."
        for label, given in planned.inputs.items()
        if given.half
    ]
    measured = [result for result in results.values() if isinstance(result, Measurement)]
    notes += dict.fromkeys(f"{line[:1].upper()}{line[1:]}." for result in measured for line in result.unread)
    notes += filter(None, map(trained_elsewhere, planned.targets.values()))
    if line := unequal({row.model: row.resolution for row in rows}, request.targets):
        notes.append(line)
    if any(planned.targets[label].timm and _is_module(settings) for label, settings in planned.cells):
        notes.append(UNFOLDED)
    notes += dict.fromkeys(
        f"{cell.label}: its throughput at batch {cell.settings.batch_size} is not told, as it waited for CPUs that "
        "other processes use."
        for cell in map(planned.throughput_cell, planned.cells)
        if cell not in planned.cells and isinstance(found := results[cell], Measurement) and quanta(found)
    )
    spreads = [(result.spread, cell.label) for cell, result in results.items() if isinstance(result, Measurement)]
    spread, label = max(spreads, default=(0, ""))
    if spread > BUSY_SPREAD and not any(row.waiting for row in rows):
        notes.append(
            f"This machine was busy: the rounds of {label} varied by {spread:.0%}; run again on a quiet machine."
        )
    return notes


def _is_module(settings: Settings) -> bool:
    return RUNTIMES[settings.runtime].artifact == "module"


def trained_elsewhere(target: Target) -> str | None:
    """A line on a network that was trained at another resolution than it is measured at."""
    if target.trained_at is None or target.network is None:
        return None
    return f"{target.label}: trained at {target.trained_at} px, measured at {target.network.resolution} px."


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
