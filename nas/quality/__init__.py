"""Quality tiers: an Arch becomes an estimate with its error. One file a tier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from search_spaces import Arch


@dataclass(frozen=True)
class Estimate:
    """What a tier says of a network, in points of top-1."""

    value: float
    error: float

    @property
    def bound(self) -> float:
        """The lower end, which a search ranks by."""
        return self.value - self.error

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point: then the tier cannot tell the networks apart."""
        return abs(self.value - other.value) <= self.error + other.error


class Tier(Protocol):
    """label: what its figures are called; note: one line every user of it is told."""

    name: str
    label: str
    note: str

    def estimate(self, arch: Arch, macs: int) -> Estimate:
        """The estimate for one network of `macs` multiply-accumulates."""


def prior() -> Tier:
    from nas.quality.prior import Prior

    return Prior()


TIERS: dict[str, Callable[[], Tier]] = {"prior": prior}
