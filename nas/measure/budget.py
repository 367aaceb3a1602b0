"""A latency budget, and what a measurement says of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Whether a network meets a budget. UNSURE: the latency's 95% interval holds the budget."""

    FITS = "fits"
    UNSURE = "unsure"
    OVER = "over"


@dataclass(frozen=True)
class LatencyBudget:
    """ms: the longest median latency allowed, in milliseconds."""

    ms: float

    def judge(self, ci_ms: tuple[float, float]) -> Verdict:
        """The verdict on the 95% interval of a median latency, in milliseconds.

        An end of the interval that is the budget itself meets it.
        """
        low, high = ci_ms
        if high <= self.ms:
            return Verdict.FITS
        return Verdict.OVER if low > self.ms else Verdict.UNSURE
