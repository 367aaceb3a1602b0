"""The precisions of a search: which one a network is tried in, and how fast others may be.

With `--precision auto` a trial measures its network in one precision after the other, by the accuracy that is expected,
until it surely meets the budget: a larger network in int8 competes with a smaller one in fp32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Self

from nas.errors import UserError, reason
from nas.intervals import Interval
from nas.measure import samples
from nas.measure.budget import Verdict
from nas.measure.device import check_settings, device_kind
from nas.measure.remote import LinkLost
from nas.measure.runtime import LOWER, RUNTIMES, Settings
from nas.measure.samples import PRECISION, SEARCH_PRECISION, MeasureError
from nas.process import WorkerError
from nas.study.ledger import Ledger, ledger_of

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.quality.tier import Estimate
    from nas.search.latency import TrialLatency
    from nas.search.request import SearchRequest

ORDER = ("fp32", "tf32", "fp16", "bf16", "int8")
"""By the accuracy that is expected, highest first."""
RATIOS = {"tf32": (0.5, 0.9), "fp16": (0.35, 0.7), "bf16": (0.4, 0.8), "int8": (0.4, 0.95)}
"""Of a latency to that in fp32, at least and likely, before a search has measured some. Of bf16 and int8: from seven
networks of five families on two runtimes at 64 px, on a CPU with AMX (docs/results/int8.md); the others are guesses."""
HOPELESS = 0.5
"""A measured network is not tried in a precision where even this times the least ratio would not do: larger images and
other CPUs may gain more than is known."""
TELLING = 3
"""Networks measured in two precisions whose ratios say the least that there is,"""
LESS = 0.8
"""less than which, times this, is not expected."""
EXPECTED_DROP = {"int8": 0.2, "bf16": 0.1}
"""Points of top-1 that a network is ranked lower by, until its file is judged: about the mean drops of those seven
networks. Of nearly every one the drop cannot be told from 0; fp16's has not been measured."""


def ladder(settings: Settings) -> tuple[str, ...]:
    """The precisions that a runtime can compute in on the settings' device, in `ORDER`."""
    found = []
    for precision in named_ladder(settings):
        try:
            check_settings(replace(settings, precision=precision))
        except UserError:  # this machine has no instructions for it
            continue
        found.append(precision)
    return tuple(found)


def named_ladder(settings: Settings) -> tuple[str, ...]:
    """The precisions of a runtime on some device of the settings' kind, in `ORDER`."""
    able = RUNTIMES[settings.runtime].precisions[device_kind(settings.device)]
    return tuple(precision for precision in ORDER if precision in able)


@dataclass(frozen=True)
class Faster:
    """How fast networks are in the precisions of a search, as far as its trials tell."""

    precisions: Sequence[str]
    """Those of the search, in order."""
    seen: Sequence[tuple[str, Mapping[str, float]]] = ()
    """Of each network that was measured: its family, and its latencies by precision, the first included."""

    @classmethod
    def of_study(cls, precisions: Sequence[str], study: optuna.Study) -> Self:
        return cls(precisions) if len(precisions) == 1 else cls.of_trials(precisions, ledger_of(study))

    @classmethod
    def of_trials(cls, precisions: Sequence[str], trials: Ledger) -> Self:
        return cls(precisions, [each for each in trials.read(_by_precision) if each is not None])

    def likely(self, precision: str, family: str) -> float:
        """The ratio of a latency to that in the first precision: the median of the family, else of all."""
        medians = self._medians[precision]
        return medians.get(family, medians[""])

    def least(self, precision: str) -> float:
        """The ratio that is not undercut, as far as is known."""
        found = [ratio for _, ratio in self._ratios(precision)]
        return LESS * min(found) if len(found) >= TELLING else RATIOS[precision][0]

    def fastest_ms(self, family: str, by_precision: Mapping[str, float]) -> float:
        """The likely latency of a measured network in its fastest precision."""
        first = by_precision[self.precisions[0]]
        open_ones = (precision for precision in self.precisions if precision not in by_precision)
        return min(*by_precision.values(), *(first * self.likely(each, family) for each in open_ones), first)

    def ratio(self, family: str = "") -> float:
        """A network's likely latency in its fastest precision over that in the first.

        Args:
            family: "" for any.
        """
        return min([1.0, *(self.likely(each, family) for each in self.precisions[1:])])

    @property
    def leeway(self) -> float:
        """How many times less than such a likely latency it may be."""
        least = min((self.least(each) for each in self.precisions[1:]), default=1.0)
        return max(1.0, self.ratio() / least)

    @cached_property
    def _medians(self) -> Mapping[str, Mapping[str, float]]:
        """By precision, the median ratio of each family, and of all by the name ""."""
        found: dict[str, dict[str, float]] = {}
        for precision in self.precisions[1:]:
            ratios: dict[str, list[float]] = {"": []}
            for family, ratio in self._ratios(precision):
                for whose in {family, ""}:
                    ratios.setdefault(whose, []).append(ratio)
            found[precision] = {
                whose: statistics.median(known or [RATIOS[precision][1]]) for whose, known in ratios.items()
            }
        return found

    def _ratios(self, precision: str) -> list[tuple[str, float]]:
        first = self.precisions[0]
        return [(family, each[precision] / each[first]) for family, each in self.seen if precision in each]


def _by_precision(trial: FrozenTrial) -> tuple[str, Mapping[str, float]] | None:
    """The family and the latencies of a network that was measured in several."""
    latencies = trial.user_attrs.get("detail", {}).get("by_precision")
    return (trial.user_attrs.get("family", ""), latencies) if latencies else None


def first_that_fits(
    request: SearchRequest,
    faster: Faster,
    family: str,
    measure: Callable[[str, float], TrialLatency],
    note: Callable[[str], None],
) -> TrialLatency:
    """The latency of a network in the first precision in which it surely meets the budget, and the limits. A median
    below the budget is not enough, as a later run may show it above: it is measured more exactly then. In none, the
    first of those with a median below the budget, else the first of those whose interval holds it, else the nearest.
    A precision that is most likely not fast enough is not measured.

    Args:
        measure: the latency in a precision, to within a half-width of its interval as a share of it.
        note: told of a precision in which the network cannot be measured; its failure in the first one is raised.
    """
    if not request.lower:
        return measure(request.settings.precision, SEARCH_PRECISION)
    found: dict[str, TrialLatency] = {}
    for precision in request.precisions:
        if found:
            first = found[request.settings.precision]
            if first.latency_ms * HOPELESS * faster.least(precision) > request.budget_ms:
                continue
        try:
            found[precision] = measure(precision, SEARCH_PRECISION)
            if _chance(request, found[precision]) == Chance.LIKELY and not found[precision].is_exact:
                found[precision] = _more_exact(found[precision], precision, measure, note)
        except LinkLost:
            raise
        except (MeasureError, WorkerError) as error:
            if not found:
                raise
            note(f"not measured in {precision}: {reason(error)}")
            continue
        if _chance(request, found[precision]) == Chance.SURE:
            best = found[precision]
            break
    else:
        best = min(found.values(), key=lambda each: _order(request, each))
    return replace(best, by_precision={precision: each.latency_ms for precision, each in found.items()})


def _more_exact(
    found: TrialLatency,
    precision: str,
    measure: Callable[[str, float], TrialLatency],
    note: Callable[[str], None],
) -> TrialLatency:
    """The latency measured once more, to `PRECISION`; what there is where that fails."""
    try:
        return measure(precision, PRECISION)
    except LinkLost:
        raise
    except (MeasureError, WorkerError) as error:
        note(f"not measured more exactly in {precision}: {reason(error)}")
        return found


class Chance(IntEnum):
    """Whether a network meets the budget and the limits, as far as a measurement tells."""

    SURE = 0
    """Its interval does; of one measured briefly, a latency far below."""
    LIKELY = 1
    """Its median does."""
    POSSIBLE = 2
    """Its interval holds the budget."""
    NONE = 3


def _chance(request: SearchRequest, latency: TrialLatency) -> Chance:
    budget_ms, verdict = request.budget_ms, latency.verdict(request.budget_ms)
    if latency.over(request.limits):
        return Chance.NONE
    if verdict == Verdict.FITS or (latency.ci_ms is None and latency.latency_ms * samples.HOPELESS <= budget_ms):
        return Chance.SURE
    if latency.excess(budget_ms) <= 0:
        return Chance.LIKELY
    return Chance.POSSIBLE if latency.holds(budget_ms) else Chance.NONE


def _order(request: SearchRequest, latency: TrialLatency) -> tuple[Chance, float]:
    """Lowest first: what is kept where nothing is sure; with an equal chance the earlier precision."""
    chance = _chance(request, latency)
    if chance != Chance.NONE:
        return chance, 0.0
    limits = request.limits.excess(latency.memory_mb, latency.file_mb)
    return chance, max(latency.excess(request.budget_ms), *limits.values(), -1.0)


def expected_drop(precision: str | None, by_precision: Mapping[str, float] | None) -> float:
    """Points of top-1 that a network is ranked lower by: in a search of one precision all lose alike, so none."""
    return EXPECTED_DROP.get(precision or "", 0.0) if by_precision else 0.0


def as_shipped(estimate: Estimate, latency: TrialLatency) -> Estimate:
    """An estimate of the weights in fp32, less what the precision is expected to cost."""
    return less(estimate, expected_drop(latency.precision, latency.by_precision))


def less(estimate: Estimate, drop: float) -> Estimate:
    """An estimate, lower by so many points of top-1."""
    if not drop:
        return estimate
    interval = Interval(estimate.interval.low - drop, estimate.interval.high - drop).clipped()
    value, score = (max(0.0, each - drop) for each in (estimate.value, estimate.score))
    return replace(estimate, value=value, interval=interval, score=score)


def lowers(precisions: Iterable[str]) -> bool:
    """Whether networks are measured in precisions that are judged beside fp32."""
    return any(each in LOWER for each in precisions)
