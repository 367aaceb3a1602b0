"""The registry of quality tiers: by name, how each is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nas.quality.tier import Tier
    from nas.quality.trainer import CandidateTrainer


def prior(trainer: CandidateTrainer | None) -> Tier:
    """The tier of a search without images; it trains nothing."""
    from nas.quality.prior import PriorTier

    return PriorTier()


def train(trainer: CandidateTrainer | None) -> Tier:
    """The tier that trains by successive halving."""
    from nas.quality.trained import HalvingTier

    return HalvingTier(_needed(trainer))


def race(trainer: CandidateTrainer | None) -> Tier:
    """The tier of pretrained networks, and those cut from them."""
    from nas.quality.race import RaceTier

    return RaceTier(_needed(trainer))


def inherit(trainer: CandidateTrainer | None) -> Tier:
    """The tier that fine-tunes a parent's weights."""
    from nas.quality.inherit import InheritTier

    return InheritTier(_needed(trainer))


def supernet(trainer: CandidateTrainer | None) -> Tier:
    """The tier of weights that a family shares."""
    from nas.quality.shared import SupernetTier

    return SupernetTier(_needed(trainer))


def _needed(trainer: CandidateTrainer | None) -> CandidateTrainer:
    if trainer is None:
        raise ValueError("a tier that trains needs a trainer")
    return trainer


TIERS: dict[str, Callable[[CandidateTrainer | None], Tier]] = {
    "prior": prior,
    "train": train,
    "race": race,
    "inherit": inherit,
    "supernet": supernet,
}
