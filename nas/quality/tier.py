"""The contract of a quality tier: an Arch becomes an estimate with its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nas.intervals import Interval

if TYPE_CHECKING:
    from search_spaces import Arch
    from search_spaces.widths import Table


@dataclass(frozen=True)
class Estimate:
    """What a tier says of a network's top-1, in percent.

    interval: 95%, with the noise of the images that judged. score: what a search ranks by, one standard error below the
    value, so that what is less known does not win by luck; it is no end of the interval, and may be below 0, so that
    poor networks differ, too (`told_score`). how: where it is from. training: what was learnt on the way, kept with the
    trial.
    """

    value: float
    interval: Interval
    score: float
    how: str = "predicted"
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def within(cls, value: float, error: float, interval: Interval) -> Estimate:
        """A value and an interval within 0 to 100. error: one standard error."""
        possible = min(max(value, 0.0), 100.0)
        return cls(possible, interval.clipped(), possible - error)

    def to_dict(self) -> dict[str, Any]:
        """As a trial and its row keep it."""
        ci = [self.interval.low, self.interval.high]
        return {"quality_estimate": self.value, "quality_ci": ci, "quality_how": self.how}


def told_score(score: float) -> float:
    """A score as it is printed: none is below 0."""
    return max(score, 0.0)


class Tier(Protocol):
    """label: what its figures are called; note: one line every user of it is told. trained: it judges by trainings on
    the user's images, so its estimates improve while the search goes on. failed: families that it cannot judge, and
    why."""

    name: str
    label: str
    note: str
    trained: bool
    failed: Mapping[str, str]

    def predict(self, arch: Arch, counts: Table) -> Estimate:
        """The estimate for a network that will not be trained."""

    def estimate(self, arch: Arch, counts: Table) -> Estimate:
        """The estimate for a network that meets the budget."""
