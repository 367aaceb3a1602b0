"""The registry of quality tiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nas.quality.schooling import Schooling
    from nas.quality.tier import Tier


def prior(schooling: Schooling | None) -> Tier:
    from nas.quality.prior import Prior

    return Prior()


def train(schooling: Schooling | None) -> Tier:
    from nas.quality.trained import Train

    return Train(schooling)


def inherit(schooling: Schooling | None) -> Tier:
    from nas.quality.inherit import Inherit

    return Inherit(schooling)


def supernet(schooling: Schooling | None) -> Tier:
    from nas.quality.shared import Shared

    return Shared(schooling)


TIERS: dict[str, Callable[[Schooling | None], Tier]] = {
    "prior": prior,
    "train": train,
    "inherit": inherit,
    "supernet": supernet,
}
