"""The latency that a trial measured, as a record that its study keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from nas.measure.budget import LatencyBudget, Limits, Verdict
from nas.measure.samples import HOPELESS, MAX_ROUNDS, PRECISION, SURE_ROUNDS

if TYPE_CHECKING:
    from nas.measure.samples import Measurement

Pair = tuple[float, float]


def pair(low: float | None, high: float | None) -> Pair | None:
    """An interval of two ends; None where one is not known."""
    return None if low is None or high is None else (low, high)


@dataclass(frozen=True)
class TrialLatency:
    """What a trial measured, as the study keeps it; in the trials of earlier versions some of it is None."""

    latency_ms: float
    """Median of all samples, as the next ones in ms."""
    latency_p95_ms: float | None
    latency_ci_low_ms: float | None
    """Ends of the median's 95% interval; None where fewer than `SURE_ROUNDS` rounds were measured."""
    latency_ci_high_ms: float | None
    samples: int | None
    """Timed inferences."""
    rounds: int | None
    reference_ms: float | None
    """Median latency of the reference network in the same rounds."""
    reference_drift: float | None
    """How far that moved within the trial, as a share of it."""
    throughput: float
    """Images a second."""
    source: str
    """Where it is from: measured, reused (an earlier trial of the same network), or cache with a date."""
    memory_mb: float | None = None
    """As `nas.measure.samples.Measurement` has it, as the next two."""
    file_mb: float | None = None
    energy_mj: float | None = None
    precision: str | None = None
    """That it was measured in; None in studies of earlier versions."""
    by_precision: Mapping[str, float] | None = None
    """Of a search of several precisions: the latencies in ms in those that were measured, this one included."""

    @classmethod
    def of(cls, found: Measurement, throughput: float, source: str, precision: str) -> Self:
        """Of a measurement at the batch size of the latency."""
        rounds = len(found.rounds_ms)
        low, high = found.ci_ms if rounds >= SURE_ROUNDS else (None, None)
        return cls(
            latency_ms=found.p50_ms,
            latency_p95_ms=found.p95_ms,
            latency_ci_low_ms=low,
            latency_ci_high_ms=high,
            samples=found.n,
            rounds=rounds,
            reference_ms=found.reference_p50_ms,
            reference_drift=found.reference_drift,
            throughput=throughput,
            source=source,
            memory_mb=found.memory_mb,
            file_mb=found.file_mb,
            energy_mj=found.energy_mj,
            precision=precision,
        )

    @classmethod
    def read(cls, detail: Mapping[str, object]) -> Self:
        """From the attribute `detail` of a trial."""
        kept: dict[str, Any] = {field.name: detail.get(field.name) for field in fields(cls)}
        return cls(**kept | {"source": kept["source"] or ""})

    @property
    def ci_ms(self) -> Pair | None:
        """The 95% interval of the median; None where it was measured briefly."""
        return pair(self.latency_ci_low_ms, self.latency_ci_high_ms)

    def verdict(self, budget_ms: float) -> Verdict:
        """What it says of a budget; measured briefly, one far over it is surely over."""
        if self.ci_ms is None:
            return Verdict.OVER if self.latency_ms > HOPELESS * budget_ms else Verdict.UNSURE
        return LatencyBudget(budget_ms).judge(self.ci_ms)

    @property
    def is_exact(self) -> bool:
        """Whether measuring it again would hardly tell more: its interval is as narrow as in a closing run, or was not
        after the most rounds."""
        if self.ci_ms is None:
            return False
        low, high = self.ci_ms
        return (high - low) / 2 <= PRECISION * self.latency_ms or (self.rounds or 0) >= MAX_ROUNDS

    def excess(self, budget_ms: float) -> float:
        """How far the latency is above a budget, as a share of the budget; at most 0 where it is met."""
        return self.latency_ms / budget_ms - 1

    def holds(self, budget_ms: float) -> bool:
        """Whether the interval of the median holds a budget, so that it cannot be told whether the budget is met."""
        return self.ci_ms is not None and self.verdict(budget_ms) == Verdict.UNSURE

    def over(self, limits: Limits) -> tuple[str, ...]:
        """The limits beside the latency that it does not meet."""
        return limits.over(self.memory_mb, self.file_mb)

    def to_json(self) -> dict[str, float | str | Mapping[str, float] | None]:
        return asdict(self)
