"""The registry of quality tiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nas.quality.tier import Tier
    from nas.quality.trainer import CandidateTrainer


def prior(trainer: CandidateTrainer | None) -> Tier:
    from nas.quality.prior import PriorTier

    return PriorTier()


def train(trainer: CandidateTrainer | None) -> Tier:
    from nas.quality.trained import HalvingTier

    return HalvingTier(trainer)


def inherit(trainer: CandidateTrainer | None) -> Tier:
    from nas.quality.inherit import InheritTier

    return InheritTier(trainer)


def supernet(trainer: CandidateTrainer | None) -> Tier:
    from nas.quality.shared import SupernetTier

    return SupernetTier(trainer)


TIERS: dict[str, Callable[[CandidateTrainer | None], Tier]] = {
    "prior": prior,
    "train": train,
    "inherit": inherit,
    "supernet": supernet,
}
