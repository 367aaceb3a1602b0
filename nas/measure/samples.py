"""Samples of a latency, and the statistics made of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from nas.units import counted

MIN_ROUNDS, MAX_ROUNDS = 8, 30


FEWEST_ROUNDS = 3  # where the budget is far away, or time runs out


SURE_ROUNDS = 6  # the fewest whose interval covers 95%


PRECISION = 0.02  # half-width of the interval over the median
SEARCH_PRECISION = 0.05  # the same of a search's trials, whose best are measured again


HOPELESS = 1.5  # times the budget


CONFIDENCE = 0.95


BUSY_SPREAD = 0.25  # of round medians (`Measurement.spread`), from which on the machine is called busy


QUANTA = 2.0  # median over the fastest sample, above which most samples wait for a CPU (1.3 on a quiet machine)


SLOWED, AGAIN = 1.15, 2
"""Where the machine was so many times slower than usual, and a network is over its budget for that, it is measured
again, so often at most."""


class MeasureError(RuntimeError):
    """A network that could not be measured: one line that says why."""


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95% confidence interval of the median, by order statistics.

    The k-th smallest and k-th largest of n values enclose the median unless fewer than k of them fall
    on one of its sides, so the coverage is 1 - 2 P(Binomial(n, 1/2) < k); k is the largest that keeps
    it at 95%. Under 6 values none does: the smallest and largest, 75% for 3 (David and Nagaraja, Order
    Statistics, section 7.1).
    """
    n, k, tail = len(values), 0, 0.0
    while 2 * (tail + math.comb(n, k) / 2**n) <= 1 - CONFIDENCE:
        tail += math.comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics (numpy's default)."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_ratio(one: Measurement, other: Measurement) -> tuple[float, tuple[float, float]]:
    """Latency of `one` over that of `other`, and its 95% interval, from rounds of one interleaved run.

    The two ran within the same second in each round, so the ratio of a round's medians is free of the machine's drift.
    """
    pairs = zip(_medians(one.rounds_ms), _medians(other.rounds_ms), strict=True)
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), median_interval(ratios)


def quanta(measurement: Measurement) -> bool:
    """Whether most samples are turns of the scheduler, waited for, and not the network's own time.

    Of a network whose CPUs another process uses too, a few samples still fall between two of its turns.
    """
    return measurement.p50_ms > QUANTA * min(_samples(measurement.rounds_ms))


def quanta_line(described: Mapping[str, Any], figures: str = "these figures") -> str:
    """What `quanta` means on a machine, described by `nas.measure.hardware`. figures: those that it is true of."""
    usable, threads, share = described["usable_cpus"], described["threads"], described.get("busy_share")
    some = f"{share * usable:.1f} of " if share else "some of "
    at = f"at {counted(threads, 'thread')} a network waits for them"
    fewer = "use --threads 1, or " if threads > 1 else ""
    return (
        f"other processes keep {some}{counted(usable, 'CPU')} busy: {at}, so {figures} are waiting times, not "
        f"speed; {fewer}stop them (`top` shows which)"
    )


@dataclass
class Measurement:
    """Every timed inference of one network, and of the reference beside it, in milliseconds."""

    rounds_ms: list[list[float]] = field(default_factory=list)
    reference_rounds_ms: list[list[float]] = field(default_factory=list)
    load_s: float = 0.0  # until the network was ready: what was left of the process start, its session
    wall_s: float = 0.0  # all of it, load_s included
    memory_mb: float | None = None
    """Peak resident memory of its process, less that after its runtime has run a network of one number, in 10^6 bytes;
    None, as the next two, where it is not known."""
    file_mb: float | None = None
    """Size of the ONNX file; None of a network that PyTorch builds."""
    energy_mj: float | None = None
    """Of an image, in millijoules: of the CPU packages or of the GPU, idle power included."""
    unread: list[str] = field(default_factory=list)
    """Why memory or energy cannot be read, a line each."""

    @property
    def n(self) -> int:
        """Timed inferences."""
        return sum(map(len, self.rounds_ms))

    @property
    def p50_ms(self) -> float:
        """Median of all samples."""
        return statistics.median(_samples(self.rounds_ms))

    @property
    def p95_ms(self) -> float:
        return quantile(_samples(self.rounds_ms), 0.95)

    @property
    def ci_ms(self) -> tuple[float, float]:
        """95% interval of the median latency, from the rounds' medians (see `median_interval`).

        Samples of one round share the machine's mood and are not independent; the rounds' medians
        nearly are, so they are what is counted. Where the median of all samples lies outside (a
        machine that jumps between two speeds), the interval is widened to hold it.
        """
        return _interval(self.rounds_ms)

    def throughput(self, batch_size: int) -> float:
        """Images a second at the median latency of a batch."""
        return 1000 * batch_size / self.p50_ms

    @property
    def reference_p50_ms(self) -> float | None:
        """The reference's median; None where there was none (`compare`)."""
        return statistics.median(_samples(self.reference_rounds_ms)) if self._has_reference else None

    @property
    def reference_drift(self) -> float | None:
        """How far the machine moved meanwhile: (p90 - p10) / median of the reference's round medians."""
        if not self._has_reference:
            return None
        return _spread(self.reference_rounds_ms)

    @property
    def spread(self) -> float:
        """As `reference_drift`, of the network itself: how far the machine moved in a run without a reference."""
        return _spread(self.rounds_ms)

    @property
    def _has_reference(self) -> bool:
        return bool(self.reference_rounds_ms)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        return cls(**fields)


def enough(rounds_ms: list[list[float]], budget_ms: float | None = None, precision: float = PRECISION) -> bool:
    """Whether to stop measuring: the latency is known, or known to be over the budget, or there are MAX_ROUNDS."""
    return len(rounds_ms) >= MAX_ROUNDS or is_decided(rounds_ms, budget_ms, precision)


def is_decided(rounds_ms: list[list[float]], budget_ms: float | None = None, precision: float = PRECISION) -> bool:
    """Whether these rounds tell the latency to within `precision`, or tell that it is over the budget.

    It is over the budget where its whole 95% interval is; with fewer than SURE_ROUNDS, where it is HOPELESS times over.
    """
    if len(rounds_ms) < FEWEST_ROUNDS:
        return False
    low, high = _interval(rounds_ms)
    if budget_ms is not None and low > (budget_ms if len(rounds_ms) >= SURE_ROUNDS else HOPELESS * budget_ms):
        return True
    precise = (high - low) / 2 <= precision * statistics.median(_samples(rounds_ms))
    return len(rounds_ms) >= MIN_ROUNDS and precise


def _interval(rounds_ms: list[list[float]]) -> tuple[float, float]:
    low, high = median_interval(_medians(rounds_ms))
    median = statistics.median(_samples(rounds_ms))
    return min(low, median), max(high, median)


def _spread(rounds_ms: list[list[float]]) -> float:
    medians = _medians(rounds_ms)
    return (quantile(medians, 0.9) - quantile(medians, 0.1)) / statistics.median(medians)


def _samples(rounds_ms: list[list[float]]) -> list[float]:
    return [sample for samples in rounds_ms for sample in samples]


def _medians(rounds_ms: list[list[float]]) -> list[float]:
    return [statistics.median(samples) for samples in rounds_ms]
