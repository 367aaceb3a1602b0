"""The tier of shared weights: one supernet a family, trained once; a candidate's accuracy is that of its share.

Nothing says that such accuracies rank networks (after short trainings they do not), so this tier chooses only where a
validation on the same images has shown that it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nas.errors import FAULTS, TrainingError, is_full, reason
from nas.intervals import of_share
from nas.quality.surrogate import describe
from nas.quality.tier import Estimate, TrainedTier, with_training
from nas.units import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nas.data.images import Images
    from nas.networks.counts import Counts
    from nas.quality.candidate import Candidate
    from nas.quality.trainer import CandidateTrainer
    from nas.training.supernet import Supernet

LR = 1e-3
BATCH = 64
HOW = "with shared weights"
CALIBRATION_IMAGES = 512
"""Images that BatchNorm's statistics are estimated from, again for each candidate."""


class SupernetTier(TrainedTier):
    """See the module. Final trainings start from random weights."""

    name = "supernet"
    label = "score (supernet: top-1 on your images, with weights its family shares)"
    needs_validation = True

    def __init__(self, trainer: CandidateTrainer) -> None:
        super().__init__(trainer)
        self._known: dict[str, Supernet] = {}
        self.note = (
            f"Each family's shared weights were trained for {counted(self.epochs, 'epoch')} of {trainer.used:,} of "
            "your images; candidates were judged on others held out from training, BatchNorm calibrated for each."
        )

    def predict(self, candidate: Candidate, counts: Counts) -> Estimate:
        """As `estimate`: a share of the weights is there for every network."""
        return self.estimate(candidate, counts)

    def estimate(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Accuracy with the family's shared weights; its interval is what so few images leave open."""
        from nas.data.batches import loader
        from nas.data.images import sample

        trainer, arch = self.trainer, candidate.arch
        supernet = self._supernet(arch.family)
        images, judges = trainer.split(self._resolution(supernet))
        calibration = loader(sample(images, CALIBRATION_IMAGES, trainer.seed), BATCH, shuffle=False, seed=trainer.seed)
        found = supernet.evaluate(arch, calibration, loader(judges, BATCH, shuffle=False, seed=trainer.seed))
        return with_training(
            estimate_of(found.top1, found.total), HOW, describe(arch, counts), {self.epochs: found.top1}
        )

    def complete(self, candidate: Candidate, counts: Counts, keeps: bool = True) -> Estimate:
        """As `estimate`: there is no further rung."""
        return self.estimate(candidate, counts)

    def early(self, candidate: Candidate, counts: Counts, rungs: Mapping[int, float]) -> Estimate:
        """As `estimate`."""
        return self.estimate(candidate, counts)

    def review(self, networks: Sequence[tuple[str, Sequence[float]]]) -> list[Estimate]:
        """What each was found to have: other networks' results say nothing more of it."""
        own = {each.key: each.rungs for each in self.trainer.results()}
        judged = self.trainer.judged
        unknown = {self.epochs: 0.0}  # another worker judges it now
        rungs = [own.get(key, unknown) for key, _ in networks]
        return [
            with_training(estimate_of(each[self.epochs], judged), HOW, np.asarray(features), each)
            for each, (_, features) in zip(rungs, networks, strict=True)
        ]

    def held_out(self) -> None:
        """It has no surrogate."""

    def _supernet(self, family: str) -> Supernet:
        """The family's shared weights.

        Raises:
            TrainingError: they cannot be had, which is not tried again.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        if family not in self._known and family not in self.failed:
            try:
                self._known[family] = self._made(family)
            except FAULTS as error:
                if is_full(error) or isinstance(error, UpdateFinishedTrialError):  # not the family's fault
                    raise
                self.failed[family] = reason(error)
        if family in self.failed:
            raise TrainingError(f"the shared weights of {family}: {self.failed[family]}")
        return self._known[family]

    def _made(self, family: str) -> Supernet:
        """Shared weights, trained now if no earlier run of the search has kept them."""
        from nas.data.batches import loader
        from nas.training.supernet import Supernet

        trainer = self.trainer
        made = Supernet.over(family, len(trainer.data.classes), trainer.resolution, trainer.seed)
        path = trainer.folder / f"supernet-{family}.safetensors"
        if path.is_file():
            made.to(trainer.device)
            made.load(path)
            return made
        images: Images = trainer.split(self._resolution(made))[0]
        made.train(
            loader(images, BATCH, shuffle=True, seed=trainer.seed),
            self.epochs * len(images),
            LR,
            seed=trainer.seed,
            device=trainer.device,
            progress=lambda done, total, *_: trainer.progress(f"supernet of {family}", done, total),
        )
        trainer.folder.mkdir(parents=True, exist_ok=True)
        made.save(path)
        return made

    def _resolution(self, supernet: Supernet) -> int:
        return self.trainer.resolution or supernet.arch.resolution


def estimate_of(top1: float, images: int) -> Estimate:
    """Top-1 in percent on so many images, with Wilson's interval; the score is one binomial deviation below."""
    share = top1 / 100
    return Estimate.within(top1, 100 * float(np.sqrt(share * (1 - share) / images)), of_share(top1, images))
