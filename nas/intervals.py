"""95% confidence intervals of what vitnas prints: accuracies in percent, differences in points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nas.units import counted

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """low, high: its ends, in the unit of what it is for."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def clipped(self, low: float = 0.0, high: float = 100.0) -> Interval:
        """The part within what is possible."""
        return Interval(min(max(self.low, low), high), min(max(self.high, low), high))


def of_share(percent: float, total: int) -> Interval:
    """Wilson's score interval of an accuracy in percent that was counted on `total` images (Wilson 1927).

    Raises:
        ValueError: total is not positive.
    """
    from scipy.stats import binomtest

    if total < 1:
        raise ValueError("an accuracy needs at least one image")
    found = binomtest(min(max(round(percent / 100 * total), 0), total), total)
    low, high = found.proportion_ci(LEVEL, method="wilson")
    return Interval(100 * float(low), 100 * float(high))


def of_mean(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of independent values, such as one accuracy a seed; None of fewer than two."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half)


def of_error(value: float, error: float, freedom: float = math.inf) -> Interval:
    """The interval of a value whose standard error is known, or was estimated with so many degrees of freedom."""
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Interval(value - half, value + half)


def joined(value: float, *parts: Interval | None) -> Interval:
    """The interval of a value with several independent sources of error, each given as the interval it alone would
    have (method of variance estimates recovery: distances to the ends add in squares; Zou and Donner 2008)."""
    known = [part for part in parts if part is not None]
    low = math.sqrt(sum(max(value - part.low, 0) ** 2 for part in known))
    high = math.sqrt(sum(max(part.high - value, 0) ** 2 for part in known))
    return Interval(value - low, value + high)


def of_difference(
    first: float, first_interval: Interval, second: float, second_interval: Interval, correlation: float = 0.0
) -> Interval:
    """The interval of first minus second (Zou and Donner 2008). correlation: of the two estimates, 0 where they are
    independent; of two accuracies on the same images, that of their answers (Newcombe 1998, method 10)."""

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 + other**2 - 2 * correlation * one * other, 0.0))

    low = reach(first - first_interval.low, second_interval.high - second)
    high = reach(first_interval.high - first, second - second_interval.low)
    return Interval(first - second - low, first - second + high)


def of_accuracies(top1: Sequence[float], images: int) -> Interval:
    """The interval of a mean top-1 in percent over seeds, all judged on the same `images`: the images' own noise and,
    of two seeds or more, the seeds' spread."""
    mean = sum(top1) / len(top1)
    return joined(mean, of_share(mean, images), of_mean(top1)).clipped()


def top1_words(top1: float, ci: Sequence[float], images: int, seeds: int | None = None, what: str = "top-1") -> str:
    """A measured accuracy in the form that every verb prints: 59.5% top-1 (95%: 55.9 to 63.0, 180 images, 3 seeds)."""
    over = "" if seeds is None else f", {counted(seeds, 'seed')}"
    return f"{top1:.1f}% {what} (95%: {ci[0]:.1f} to {ci[1]:.1f}, {counted(images, 'image')}{over})"


def guessing(ci: Sequence[float], classes: int) -> str | None:
    """What to say of an accuracy whose interval reaches down to that of guessing, one in `classes`."""
    chance = 100 / classes
    return f"not shown to be better than guessing: {chance:.1f}% among {classes} classes" if ci[0] <= chance else None


def agreement(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> float:
    """Correlation over images of two networks' answers, means over seeds, with Newcombe's correction for continuity:
    networks that agree on some images need not agree on all. 0 where it is not known."""
    if not first or not second or len({len(row) for row in (*first, *second)}) > 1:
        return 0.0
    a, b = ([statistics.mean(map(float, image)) for image in zip(*rows, strict=True)] for rows in (first, second))
    both = statistics.pstdev(a) * statistics.pstdev(b)
    shared = statistics.mean(x * y for x, y in zip(a, b, strict=True)) - statistics.mean(a) * statistics.mean(b)
    return (max(shared - 0.5 / len(a), 0.0) if shared > 0 else shared) / both if both else 0.0
