"""The closing run: the finalists of a search once more, side by side in one interleaved run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserError
from nas.export.artifact import Exporter
from nas.export.side_by_side import Longer, Results, measure_side_by_side
from nas.measure.budget import LatencyBudget, Verdict
from nas.measure.protocol import Interrupted
from nas.measure.runtime import Settings
from nas.measure.samples import AGAIN, PRECISION, SLOWED, MeasureError, Measurement, paired_ratio
from nas.quality.candidate import Kind
from nas.search.log import keep_samples
from nas.search.rivals import rivals_of, told_of, top1_of
from nas.search.rows import (
    ACCURACY,
    ClosingRow,
    OutsideRow,
    Timed,
    Trial,
    best_of,
    choose,
    finalists_of,
    known,
    network_of,
    peers_of,
    rank,
    role_of,
)

if TYPE_CHECKING:
    import numpy as np

    from nas.networks.targets import Target
    from nas.networks.timm_network import TimmNetwork
    from nas.search.request import SearchRequest
    from search_spaces import Arch

CLOSING_ROUNDS = 30
MOST_ROUNDS = 120
"""In all, of a network that is measured longer."""
THROUGHPUT_ROUNDS = 10


class ClosingInterrupted(KeyboardInterrupt):
    """Ctrl-C while some networks were measured longer. final, outside: as `closing_run` returns them, by then."""

    def __init__(self, final: list[ClosingRow], outside: list[OutsideRow]) -> None:
        super().__init__()
        self.final, self.outside = final, outside


def closing_run(
    request: SearchRequest,
    rows: Sequence[Trial],
    calibration: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[list[ClosingRow], list[OutsideRow]]:
    """Measure the finalists once more, side by side with `request.against`, or with the networks of timm's that
    `rivals_of` names, in one interleaved run; where no trial is within the budget, the latter alone.

    Measured longer: finalists whose interval holds the budget, and that would win if they fitted; and all that may be
    within the budget and whose latency is not known to `PRECISION`, where `MOST_ROUNDS` may be enough for it.

    Args:
        calibration: images for int8.
        note: told of those that stay unsure or imprecise, or cannot be measured longer.

    Returns:
        Rows of the final table, best first: those that surely fit, those that may, the others; rows of the outside
        networks, whose ratios are to the first of those.

    Raises:
        ClosingInterrupted: Ctrl-C, once all networks had been measured side by side.
    """
    finalists = finalists_of(rows, request.budget_ms) if any(row.feasible for row in rows) else []
    run = _ClosingRun(request, rows, {row.label: row for row in finalists}, progress, note)
    if not run.every:
        return [], []
    interrupted = False
    with Exporter(calibration) as exporter:
        try:
            run.results = run.measure(exporter, run.every, run.unsure_or_worth_longer)
            run.measure_again_if_slowed(exporter)
            run.look_again(exporter)
        except KeyboardInterrupt as interrupt:  # plain where it comes while files are exported
            if not run.results:
                if not isinstance(interrupt, Interrupted) or interrupt.done < CLOSING_ROUNDS:
                    raise
                run.results = interrupt.results
            interrupted = True
        if run.many and not interrupted:
            run.batches = run.measure_batches(exporter, run.many)
    run.keep()
    run.tell_unsure()
    final = run.final()
    outside = run.beside(final)
    if run.rivals:
        outside = told_of(outside)
    if interrupted:
        raise ClosingInterrupted(final, outside)
    run.tell_imprecise([*final, *outside])
    return final, outside


def is_due(request: SearchRequest, rows: Sequence[Trial]) -> bool:
    """Whether a closing run has anything to measure."""
    return any(row.feasible for row in rows) or bool(rivals_of(request, rows))


@dataclass
class _ClosingRun:
    """trials: all of the search. finalists: by their labels. results: at the batch size of the latency; batches: at
    that of the throughput, where it has its own. first_again: by the labels of networks that were measured in a later
    run, what the first of the table took in the same rounds."""

    request: SearchRequest
    trials: Sequence[Trial]
    finalists: dict[str, Trial]
    progress: Callable[[int, int], None] | None
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        self.results: Results = {}
        self.batches: Results = {}
        self.first_again: Results = {}
        self.networks = {label: network_of(row) for label, row in self.finalists.items()}
        self.rivals = rivals_of(self.request, self.trials)
        self.outside, self.refused = outside_of((*self.request.against, *self.rivals), self.finalists)

    @property
    def every(self) -> dict[str, Arch | TimmNetwork]:
        """The finalists and the networks outside of the search."""
        return self.networks | self.outside

    @property
    def many(self) -> int | None:
        """The batch size of the throughput, where it has its own."""
        return self.request.throughput_at

    def settings_of(self, label: str, batch_size: int) -> Settings:
        """Of a finalist in the precision of its trial; of a network outside of the search in the first."""
        row, settings = self.finalists.get(label), self.request.settings
        precision = (row and row.precision) or settings.precision
        return replace(settings, batch_size=batch_size, precision=precision)

    def measure(
        self,
        exporter: Exporter,
        networks: Mapping[str, Arch | TimmNetwork],
        longer: Callable[[Results], Sequence[str]],
    ) -> Results:
        """One interleaved run at the batch size of the latency. longer: which networks are measured longer after it."""
        return self._side_by_side(
            exporter,
            networks,
            self.request.settings.batch_size,
            CLOSING_ROUNDS,
            Longer(longer, MOST_ROUNDS, lambda label, why: self.note(f"{label} could not be measured longer: {why}")),
        )

    def measure_batches(self, exporter: Exporter, batch_size: int) -> Results:
        """One interleaved run of all networks for the throughput."""
        return self._side_by_side(exporter, self.every, batch_size, THROUGHPUT_ROUNDS)

    def _side_by_side(
        self,
        exporter: Exporter,
        networks: Mapping[str, Arch | TimmNetwork],
        batch_size: int,
        rounds: int,
        longer: Longer | None = None,
    ) -> Results:
        settings = {label: self.settings_of(label, batch_size) for label in networks}
        return measure_side_by_side(
            {label: (network, settings[label]) for label, network in networks.items()},
            lambda each, stem: exporter.write(*each, stem),
            settings,
            rounds,
            self.request.folder,
            self.progress,
            longer,
        )

    def look_again(self, exporter: Exporter) -> None:
        """Measure further networks of timm's, beside the first of the table, as long as `rivals_of` names some."""
        if not self.rivals:
            return
        final = self.final()
        first = next((row.label for row in final if not row.error), None)
        while more := rivals_of(self.request, self.trials, self.beside(final)):
            found, _ = outside_of(more, self.finalists)
            if not found:
                return
            beside = {first: self.networks[first]} if first else {}
            results = self.measure(exporter, found | beside, self.worth_longer)
            if first:
                self._keep({"closing": first, "beside": [*found]}, results[first])
                self.first_again |= dict.fromkeys(found, results.pop(first))
            self.rivals += more
            self.outside |= found
            self.results |= results

    def measure_again_if_slowed(self, exporter: Exporter) -> None:
        """Where the finalists take longer than in their trials, and one that fitted there no longer does, the machine
        is slower than it was: the run is repeated, and the fastest counts."""
        for _ in range(AGAIN):
            before = self.slower(self.results)
            if before < SLOWED or not self.lost(self.results):
                return
            self.note(
                f"in the closing run the networks took {before:.2f} times as long as in their trials: the machine was "
                "slower, so they are measured again"
            )
            again = self.measure(exporter, self.every, self.unsure_or_worth_longer)
            failed = any(
                isinstance(again[label], MeasureError) and isinstance(found, Measurement)
                for label, found in self.results.items()
            )
            if self.slower(again) < before and not failed:
                self.results = again

    def slower(self, results: Mapping[str, Measurement | MeasureError]) -> float:
        """How many times the latencies of their trials finalists take: the median, 1 where none is measured."""
        return statistics.median(
            [
                result.p50_ms / row.latency_ms
                for label, row in self.finalists.items()
                if isinstance(result := results[label], Measurement) and row.latency_ms
            ]
            or [1.0]
        )

    def lost(self, results: Mapping[str, Measurement | MeasureError]) -> bool:
        """Whether a finalist that met the budget in its trial does not surely meet it."""
        return any(
            row.feasible
            and isinstance(result := results[label], Measurement)
            and _fields(self.request, result)["verdict"] != Verdict.FITS
            for label, row in self.finalists.items()
        )

    def unsure(self, results: Mapping[str, Measurement | MeasureError]) -> list[str]:
        """Those that may fit and rank before all that surely do, best first; of ready networks also those that rank
        before all ready ones that surely do: the best is what others are compared with."""
        found = []
        for label, row in self.finalists.items():
            result = results[label]
            if isinstance(result, MeasureError):
                found.append(replace(row, verdict=None))
            else:
                verdict = _fields(self.request, result)["verdict"]
                found.append(replace(row, latency_ms=result.p50_ms, latency_p95_ms=result.p95_ms, verdict=verdict))
        ready = [row for row in found if row.kind == Kind.READY]
        return list(dict.fromkeys([*_open(found), *_open(ready)]))

    def imprecise(self, results: Mapping[str, Measurement | MeasureError]) -> list[str]:
        """Those that may fit and whose latency is not known to `PRECISION`."""
        return [
            label
            for label, result in results.items()
            if isinstance(result, Measurement)
            and _half_width(result) > PRECISION
            and _fields(self.request, result)["verdict"] != Verdict.OVER
        ]

    def worth_longer(self, results: Mapping[str, Measurement | MeasureError]) -> list[str]:
        """Of those, where `MOST_ROUNDS` may be enough: an interval narrows with the square root of the rounds."""
        return [
            label
            for label in self.imprecise(results)
            if isinstance(result := results[label], Measurement)
            and _half_width(result) * math.sqrt(len(result.rounds_ms) / MOST_ROUNDS) <= PRECISION
        ]

    def unsure_or_worth_longer(self, results: Mapping[str, Measurement | MeasureError]) -> list[str]:
        return list(dict.fromkeys([*self.unsure(results), *self.worth_longer(results)]))

    def tell_unsure(self) -> None:
        for label in self.unsure(self.results):
            result = self.results[label]
            assert isinstance(result, Measurement)
            low, high = result.ci_ms
            self.note(
                f"{label} may be within {self.request.budget_ms:g} ms or over it, also after {len(result.rounds_ms)} "
                f"rounds: 95% {low:.2f} to {high:.2f} ms"
            )

    def tell_imprecise(self, rows: Sequence[Timed]) -> None:
        imprecise = self.imprecise(self.results)
        told = [
            f"{row.label} (+-{_half_width(result):.1%})"
            for row in rows
            if row.label in imprecise and isinstance(result := self.results[row.label], Measurement)
        ]
        if told:
            self.note(f"latencies that are not known to {PRECISION:.0%}: {', '.join(told)}")

    def final(self) -> list[ClosingRow]:
        return ordered([ClosingRow.of(row, **self._timed(label)) for label, row in self.finalists.items()])

    def beside(self, final: Sequence[ClosingRow]) -> list[OutsideRow]:
        """Rows of the outside networks; ratios are to the first of the final table that was measured."""
        beside = next((row.label for row in final if not row.error), "")
        first = self.results.get(beside)
        rows = []
        for label, network in self.outside.items():
            row = OutsideRow(
                label=label, resolution=network.resolution, published_top1=top1_of(label), **self._timed(label)
            )
            result, other = self.results[label], self.first_again.get(label, first)
            if isinstance(result, Measurement) and isinstance(other, Measurement):
                ratio, (low, high) = paired_ratio(together(result), together(other))
                row = replace(row, ratio=ratio, ratio_low=low, ratio_high=high, beside=beside)
            rows.append(row)
        return rows + [OutsideRow(label=label, error=error) for label, error in self.refused.items()]

    def keep(self) -> None:
        """Keep the samples of all networks."""
        for label, result in self.results.items():
            self._keep({"closing": label}, result)
        for label, result in self.batches.items():
            self._keep({"closing": label, "batch_size": self.many}, result)

    def _keep(self, what: dict[str, object], result: Measurement | MeasureError) -> None:
        if isinstance(result, Measurement):
            keep_samples(self.request.folder, {**what, **result.to_dict()})

    def _timed(self, label: str) -> dict[str, Any]:
        """A network's fields of `Timed`."""
        result, request = self.results[label], self.request
        if isinstance(result, MeasureError):
            return {"error": str(result)}
        throughput = None
        batch = self.batches.get(label) if self.many else result
        if isinstance(batch, Measurement):
            throughput = batch.throughput(self.many or request.settings.batch_size)
        return _fields(request, result) | {
            "rounds_alone": max(0, len(result.rounds_ms) - CLOSING_ROUNDS),
            "throughput": throughput,
            "precision": self.settings_of(label, 1).precision,
        }


def _half_width(result: Measurement) -> float:
    """Of the 95% interval, as a share of the median."""
    low, high = result.ci_ms
    return (high - low) / 2 / result.p50_ms


def _fields(request: SearchRequest, result: Measurement) -> dict[str, Any]:
    """Of `Timed`, those that are a measurement's own."""
    over, (low, high) = request.limits.over(result.memory_mb, result.file_mb), result.ci_ms
    return {
        "latency_ms": result.p50_ms,
        "latency_p95_ms": result.p95_ms,
        "verdict": Verdict.OVER if over else LatencyBudget(request.budget_ms).judge(result.ci_ms),
        "ci_low_ms": low,
        "ci_high_ms": high,
        "samples": result.n,
        "memory_mb": result.memory_mb,
        "file_mb": result.file_mb,
        "energy_mj": result.energy_mj,
        "over": over,
    }


def timed_anew(request: SearchRequest, final: Sequence[ClosingRow], row: ClosingRow, file: bytes) -> list[ClosingRow]:
    """The table, ordered anew, where a network is shipped as a file of other operators than the one that was timed:
    that file is timed, alone, in as many rounds.

    Raises:
        MeasureError: it cannot be timed.
        KeyboardInterrupt: Ctrl-C.
    """

    def written(content: bytes, stem: Path) -> Path:
        path = stem.with_suffix(".onnx")
        path.write_bytes(content)
        return path

    settings = replace(request.settings, precision=row.precision or request.settings.precision)
    result = measure_side_by_side({row.label: file}, written, settings, CLOSING_ROUNDS, request.folder)[row.label]
    if isinstance(result, MeasureError):
        raise result
    keep_samples(request.folder, {"closing": row.label, "anew": True, **result.to_dict()})
    own = _fields(request, result) | {"rounds_alone": len(result.rounds_ms)}
    if ACCURACY in row.over:
        own |= {"verdict": Verdict.OVER, "over": (*own["over"], ACCURACY)}
    if not request.throughput_at:
        own["throughput"] = result.throughput(settings.batch_size)
    rows = [replace(each, **own) if each.label == row.label else each for each in final]
    return ordered([replace(each, role=role_of(each)) for each in rows])


def _open(rows: Sequence[Trial]) -> list[str]:
    """Labels of those that may fit and rank before all that surely do."""
    sure = choose([row for row in rows if row.verdict == Verdict.FITS])
    return [row.label for row in rows if row.verdict == Verdict.UNSURE and (sure is None or rank(row) < rank(sure))]


def outside_of(
    against: Sequence[Target], finalists: Mapping[str, Trial]
) -> tuple[dict[str, Arch | TimmNetwork], dict[str, str]]:
    """Networks to measure beside the finalists: named without @PX, at the resolution of the best of those.

    Returns:
        By their labels, those that are no finalists, and why others cannot run at that resolution.
    """
    best = best_of([row for row in finalists.values() if row.feasible] or list(finalists.values()))
    networks = {label: network_of(row) for label, row in finalists.items()}
    found: dict[str, Arch | TimmNetwork] = {}
    refused: dict[str, str] = {}
    for target in against:
        label = target.label if target.label not in networks else f"{target.label} (as named)"
        try:
            sized = target if target.resolution or best is None else target.at(known(best.resolution))
        except UserError as error:
            refused[label] = str(error)
            continue
        network = sized.network
        if network is not None and network not in networks.values():
            found[label] = network
    return found, refused


def ordered(final: Sequence[ClosingRow]) -> list[ClosingRow]:
    """Best first, with the roles of the winner and of the families' winners; see `choose`. Of a parent's children that
    are equally good, as far as is known, the largest goes first."""
    sure, unsure = (
        _largest_first(sorted((row for row in final if row.verdict == verdict), key=rank))
        for verdict in (Verdict.FITS, Verdict.UNSURE)
    )
    roles: dict[str, str] = {}
    families: set[str] = set()
    for row in sure or unsure[:1]:
        if row.family not in families:
            roles[row.label] = "family winner" if families else "winner"
        families.add(row.family)
    others = [row for row in final if row.verdict not in (Verdict.FITS, Verdict.UNSURE)]
    rows = sure + unsure + sorted(others, key=lambda row: -row.quality)
    return [replace(row, role=roles.get(row.label, row.role)) for row in rows]


def without(final: Sequence[ClosingRow], row: ClosingRow, what: str) -> list[ClosingRow]:
    """The table, ordered anew, where a network is over something else than the budget."""
    left = [
        replace(each, verdict=Verdict.OVER, over=(*each.over, what)) if each.label == row.label else each
        for each in final
    ]
    return ordered([replace(each, role=role_of(each)) for each in left])


def _largest_first(rows: list[ClosingRow]) -> list[ClosingRow]:
    """Networks, best first, with the largest of each parent's best (`peers_of`) in the place of the best one."""
    for place in dict.fromkeys((row.parent, row.resolution) for row in rows if row.parent):
        best = next(row for row in rows if (row.parent, row.resolution) == place)
        largest = peers_of(best, rows)[0] if best.selects and not best.guessed else best
        if largest is not best:
            rows = [row for row in rows if row is not largest]
            rows.insert(rows.index(best), largest)
    return rows


def together(result: Measurement) -> Measurement:
    """The rounds that all networks have made in turn."""
    return replace(result, rounds_ms=result.rounds_ms[:CLOSING_ROUNDS])
