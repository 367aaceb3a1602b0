"""The contract of a quality tier: a candidate becomes an estimate of its accuracy, with its error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from nas.intervals import Interval
from nas.quality.scale import lowered

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn

    from nas.data.dataset import ImageData
    from nas.data.images import Images
    from nas.networks.counts import Counts
    from nas.quality.candidate import Candidate
    from nas.quality.ranking import RungRank
    from nas.quality.surrogate import Surrogate, TrainedNetwork
    from nas.quality.trainer import CandidateTrainer
    from nas.quality.tuning import Tuned
    from nas.training.engine import Training
    from nas.training.recipes import Recipe
    from search_spaces import Arch


@dataclass(frozen=True)
class TrainingRecord:
    """What a tier learnt of a network, as its trial keeps it."""

    features: tuple[float, ...]
    """What the surrogate predicts from; see `nas.quality.surrogate.describe_candidate`. An older vitnas kept fewer."""
    rungs: dict[int, float]
    """Top-1 in percent by epochs trained, 0 for a network judged before any; empty for one that was not judged."""
    seconds: float | None = None
    """Duration of the training; None where none was made."""
    tuned: bool | None = None
    """As `nas.quality.surrogate.TrainedNetwork`."""

    def to_json(self) -> dict[str, object]:
        """The record as JSON; JSON's keys are strings."""
        kept: dict[str, object] = {
            "features": list(self.features),
            "rungs": {str(epochs): top1 for epochs, top1 in self.rungs.items()},
        }
        more = {"seconds": self.seconds, "tuned": self.tuned}
        return kept | {name: value for name, value in more.items() if value is not None}

    @classmethod
    def from_json(cls, kept: object) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: something else.
        """
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(kept)


@dataclass(frozen=True)
class Estimate:
    """A tier's estimate of a network's top-1."""

    value: float
    """Top-1 in percent."""
    interval: Interval
    """95% interval in percent, with the noise of the images that judged."""
    score: float
    """What a search ranks by: one standard error below the value, so that luck does not win over what is better known.
    On the scale of log odds: it is within 0 to 100, and poor networks differ, too."""
    how: str = "predicted"
    """Where the estimate comes from, in words."""
    training: TrainingRecord | None = None
    """What a tier that trains learnt of the network; None for other tiers."""

    @classmethod
    def within(cls, value: float, error: float, interval: Interval) -> Self:
        """A value and an interval, which are within 0 to 100. error: one standard error, in points."""
        return cls(value, interval, lowered(value, error))

    def to_dict(self) -> dict[str, object]:
        """The estimate as a trial and its row keep it, without the training."""
        ci = [self.interval.low, self.interval.high]
        return {"quality_estimate": self.value, "quality_ci": ci, "quality_how": self.how}


def told_score(score: float) -> float:
    """A score as it is shown: an older vitnas kept some outside of 0 to 100."""
    return min(max(score, 0.0), 100.0)


class Tier(Protocol):
    """What a search uses of every tier."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    @property
    def label(self) -> str:
        """What its scores are called in tables and figures."""

    @property
    def note(self) -> str:
        """What every user of it should know, in one line."""

    @property
    def trained(self) -> bool:
        """Whether it is a `TrainedTier`."""

    @property
    def failed(self) -> Mapping[str, str]:
        """Families that it cannot judge, with the reason."""

    def candidate_of(self, arch: Arch) -> Candidate:
        """A network that the search made up, with the weights that the tier gives it."""

    def predict(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Estimate a network that will not be trained."""

    def estimate(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Estimate a network that meets the budget; a tier that trains may train it."""


class TrainedTier(ABC):
    """A tier that judges by trainings on the user's images, so that its estimates improve while a search goes on.

    What it trains with, a search's final trainings use as well (`recipe`, `begin`).
    """

    name: str
    label: str
    note: str
    trained = True
    needs_validation = False
    """Whether its estimates may choose only after a validation has shown that they rank networks."""

    def __init__(self, trainer: CandidateTrainer) -> None:
        self.trainer = trainer
        self.epochs = trainer.plan.epochs
        """Epochs of the last rung."""
        self.failed: dict[str, str] = {}
        self._last: tuple[list[tuple[str, Mapping[int, float]]], Surrogate] | None = None

    @abstractmethod
    def predict(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Estimate a network that will not be trained."""

    @abstractmethod
    def estimate(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Estimate a network that meets the budget.

        Raises:
            TrainingError: the network, or the weights that it shares, cannot be trained.
        """

    @abstractmethod
    def early(self, candidate: Candidate, counts: Counts, rungs: Mapping[int, float]) -> Estimate:
        """What `estimate` would say after the first of these rungs (top-1 in percent by epochs); of none, what others'
        trainings say of the network."""

    @abstractmethod
    def complete(self, candidate: Candidate, counts: Counts, keeps: bool = True) -> Estimate:
        """Train a network to the last rung.

        Args:
            keeps: it is a candidate, whose weights may be wanted.

        Raises:
            TrainingError: as `estimate`.
        """

    @abstractmethod
    def review(self, networks: Sequence[tuple[str, Sequence[float]]]) -> list[Estimate]:
        """Estimate networks, given by digest and features, again from all trainings so far."""

    @abstractmethod
    def held_out(self) -> tuple[float, float | None] | None:
        """Error of the surrogate; see `Surrogate.held_out`. None for a tier that does not use it."""

    def rung_ranks(self) -> list[RungRank]:
        """How well each rung has ranked the networks that went on to the last one."""
        from nas.quality.ranking import rung_ranks

        return rung_ranks(self.trainer.results(), self.epochs)

    def surrogate(self) -> Surrogate:
        """A surrogate fitted to all trainings so far."""
        return self._fitted(self.trainer.results())

    def candidate_of(self, arch: Arch) -> Candidate:
        """A network that the search made up, with the weights that the tier gives it."""
        from nas.quality.candidate import Candidate

        return Candidate(arch)

    def data(self, candidate: Candidate) -> ImageData:
        """The user's images as a network takes them: at its resolution, normalised as its weights want it."""
        return self.trainer.data.at(candidate.network.resolution)

    def recipe(self, epochs: int, candidate: Candidate | None = None) -> Recipe:
        """The recipe that a network is trained with, in the search and at its end.

        Args:
            candidate: the network; None: most of the tier's.
        """
        from nas.training.recipes import RECIPES

        return replace(RECIPES["quick"], epochs=epochs)

    def tuning_pays(self, candidate: Candidate) -> bool:
        """Whether a final training makes a network better than what it begins with."""
        return True

    def parent_tuning_pays(self, candidate: Candidate) -> bool:
        """Whether the parent that a network is cut from is tuned for its final trainings."""
        return True

    def parent_tunings(self, candidate: Candidate, folder: Path) -> list[Tuned]:
        """How the parent was tuned that a network is cut from, for trainings in a folder; none where it is not cut."""
        return []

    def begin(
        self,
        candidate: Candidate,
        images: Images,
        recipe: Recipe,
        seed: int,
        checkpoint: Path,
        weights: Mapping[str, Tensor] | None = None,
        teacher: nn.Module | None = None,
    ) -> Training:
        """Prepare a training.

        Args:
            seed: of the initial weights and of the order of the images.
            checkpoint: file that an interrupted training continues from.
            weights: initial weights; None for those of `inherited`.
            teacher: (B, 3, R, R) -> (B, classes), what it learns from; None: the tier's own.
        """
        import torch

        from search_spaces import create_model

        arch = candidate.arch
        torch.manual_seed(seed)
        model = create_model(arch)
        first = self.inherited(arch, seed) if weights is None else weights
        if first is not None:
            model.load_state_dict(dict(first))
        taught = teacher or self.teacher(arch.resolution)
        return self.trainer.train(model, images, recipe, seed=seed, checkpoint=checkpoint, teacher=taught)

    def inherited(self, arch: Arch, seed: int) -> Mapping[str, Tensor] | None:
        """Initial weights of a network; None for random ones."""
        return None

    def teacher(self, resolution: int) -> nn.Module | None:
        """The network that others learn from, if there is one."""
        return None

    def find_teacher(self, name: str, student: Candidate) -> nn.Module | None:
        """What a student learns from in a final training: (B, 3, R, R) -> (B, classes); None: the
        tier's own.

        Args:
            name: that of `nas.search.teaching.Teaching`, which only a race has; "": none.
        """
        return None

    def _fitted(self, trained: Sequence[TrainedNetwork]) -> Surrogate:
        """The last surrogate is kept: until a trial ends all calls ask for the same one."""
        from nas.quality.surrogate import Surrogate

        shown = [(each.key, each.rungs) for each in trained]
        if self._last is None or self._last[0] != shown:
            self._last = shown, Surrogate(trained, self.epochs)
        return self._last[1]


def with_training(
    found: Estimate,
    how: str,
    features: np.ndarray,
    rungs: Mapping[int, float],
    seconds: float | None = None,
    tuned: bool | None = None,
) -> Estimate:
    """An estimate with where it is from and what was learnt of the network."""
    record = TrainingRecord(tuple(features.tolist()), dict(rungs), seconds, tuned)
    return replace(found, how=how, training=record)
