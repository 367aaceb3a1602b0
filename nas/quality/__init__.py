"""Quality tiers: an Arch becomes an estimate with its error. One file a tier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from nas.schooling import Schooling
    from search_spaces import Arch
    from search_spaces.widths import Table


@dataclass(frozen=True)
class Estimate:
    """What a tier says of a network, in points of top-1. how: where it is from. training: what was learnt on the way,
    kept with the trial."""

    value: float
    error: float
    how: str = "predicted"
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """The lower end, which a search ranks by."""
        return self.value - self.error

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point: then the tier cannot tell the networks apart."""
        return abs(self.value - other.value) <= self.error + other.error


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


def prior(schooling: Schooling | None) -> Tier:
    from nas.quality.prior import Prior

    return Prior()


def train(schooling: Schooling | None) -> Tier:
    from nas.quality.train import Train

    return Train(schooling)


def inherit(schooling: Schooling | None) -> Tier:
    from nas.quality.inherit import Inherit

    return Inherit(schooling)


def supernet(schooling: Schooling | None) -> Tier:
    from nas.quality.supernet import Shared

    return Shared(schooling)


TIERS: dict[str, Callable[[Schooling | None], Tier]] = {
    "prior": prior,
    "train": train,
    "inherit": inherit,
    "supernet": supernet,
}
