"""A latency budget, limits of memory and size, and what a measurement says of them."""

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


@dataclass(frozen=True)
class Limits:
    """What a network may need beside time, in 10^6 bytes; None: any."""

    memory_mb: float | None = None
    """Peak resident memory of its process above that of the runtime alone; above 0."""
    file_mb: float | None = None
    """Size of its ONNX file; above 0."""

    def excess(self, memory_mb: float | None, file_mb: float | None) -> dict[str, float]:
        """How far what was measured is above each limit that there is, as a share of it; at most 0 where it is met, 1
        where it is not known. By the names "memory" and "size"."""
        given = {"memory": (memory_mb, self.memory_mb), "size": (file_mb, self.file_mb)}
        return {
            name: 1.0 if found is None else found / limit - 1
            for name, (found, limit) in given.items()
            if limit is not None
        }

    def over(self, memory_mb: float | None, file_mb: float | None) -> tuple[str, ...]:
        """The names of those that are not met."""
        return tuple(name for name, excess in self.excess(memory_mb, file_mb).items() if excess > 0)

    @property
    def words(self) -> str:
        """After a latency: ", 64 MB of memory, a file of 4 MB"; "" without limits."""
        memory = "" if self.memory_mb is None else f", {self.memory_mb:g} MB of memory"
        return memory + ("" if self.file_mb is None else f", a file of {self.file_mb:g} MB")
