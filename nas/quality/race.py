"""The tier that races: pretrained networks, those cut from larger ones, and those from scratch, on equal terms.

It goes as successive halving does, with a rung 0 that costs forward passes only: a linear probe on a ready network; a
derived one right after it is cut from its parent. The better third of all is fine-tuned from there, rung by rung; a
network that tuning makes worse stays as it was. Networks from scratch begin at rung 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.pixels import IMAGENET, Pixels
from nas.quality.candidate import Candidate, Kind
from nas.quality.parents import Parents
from nas.quality.ready import give_probe, own_pixels, with_weights
from nas.quality.surrogate import kind_of
from nas.quality.trained import HalvingTier
from nas.quality.tuning import choose_rate, tuning_recipe
from nas.units import counted

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from nas.data.dataset import ImageData
    from nas.data.images import Images
    from nas.networks.timm_network import TimmNetwork
    from nas.quality.surrogate import Guess, Rungs, Surrogate
    from nas.quality.trainer import CandidateTrainer
    from nas.training.engine import Training
    from nas.training.recipes import Recipe
    from search_spaces import Arch

PROBED = 1000
"""Images that rung 0 fits a linear probe to, at most."""
RESTATED, BATCH = 512, 64
"""Images that BatchNorm's statistics are taken from after a cut, and how many at once."""


class RaceTier(HalvingTier):
    """See the module."""

    name = "race"
    label = "score (race: top-1 estimated on your images, after fine-tuning)"

    def __init__(self, trainer: CandidateTrainer) -> None:
        super().__init__(trainer)
        self.parents = Parents(trainer)
        rungs = ", ".join(map(str, trainer.rungs))
        self.note = (
            f"Pretrained networks were judged with a linear probe, and the better third tuned up to {rungs} "
            f"epoch{'s' * (rungs != '1')} of {trainer.used:,} of your training images; all were judged on others held "
            f"out from training. Estimates are for {counted(self.epochs, 'epoch')} and serve to rank."
        )

    def candidate_of(self, arch: Arch) -> Candidate:
        """A network that the search made up: derived where it has a parent, else from scratch."""
        parent = self.parents.parent_for(arch)
        return Candidate(arch) if parent is None else Candidate(arch, Kind.DERIVED, parent)

    def data(self, candidate: Candidate) -> ImageData:
        """The user's images as a network takes them."""
        return self.trainer.data.at(candidate.network.resolution, pixels=pixels_of(candidate))

    def recipe(self, epochs: int, candidate: Candidate | None = None) -> Recipe:
        """`finetune` with the rate of the network's group, which may be tried now; `quick` from scratch."""
        if candidate is None or candidate.kind == Kind.SCRATCH:
            return super().recipe(epochs)
        images, judges = self._split(candidate)
        lr = choose_rate(candidate.network, self.trainer, lambda: (self._start(candidate, images), images, judges))
        return tuning_recipe(epochs, lr)

    def begin(
        self,
        candidate: Candidate,
        images: Images,
        recipe: Recipe,
        seed: int,
        checkpoint: Path,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Training:
        """Prepare a training; of a pretrained network, from a linear probe on all its images.

        Raises:
            TrainingError: its parent cannot be had or cut. UserError: its weights cannot be had, or do not fit.
        """
        from nas.networks.build import create

        if candidate.kind == Kind.SCRATCH:
            return super().begin(candidate, images, recipe, seed, checkpoint, weights)
        begun = any(checkpoint.parent.glob(f"{checkpoint.name}*"))  # whose own weights go on
        model = create(candidate.network) if begun or weights is not None else self._start(candidate, images)
        if weights is not None:
            model.load_state_dict(dict(weights))
        return self.trainer.train(model, images, recipe, seed=seed, checkpoint=checkpoint)

    def _start(self, candidate: Candidate, images: Images) -> nn.Module:
        """A pretrained network of the user's classes, before any epoch. images: what it learns them from."""
        trainer = self.trainer
        if candidate.kind == Kind.DERIVED:
            return self._cut(candidate, images)
        model = with_weights(candidate.network, trainer.weights.get(candidate.network).path)
        give_probe(model, images, trainer, pixels_of(candidate))
        return model

    def _cut(self, candidate: Candidate, images: Images) -> nn.Module:
        """A network cut from its parent; with BatchNorm's statistics taken again, and with a linear probe for a new
        classifier, where each is better on the images that judge."""
        from nas.data.batches import loader
        from nas.data.images import sample
        from nas.training.statistics import take_statistics
        from search_spaces import create_model

        trainer, pixels, judges = self.trainer, pixels_of(candidate), self._split(candidate)[1]
        best: nn.Module = create_model(candidate.arch)
        best.load_state_dict(self.parents.child(candidate.arch, candidate.parent, trainer.seed))
        top1 = trainer.judge(best, judges).top1

        def restate(model: nn.Module) -> None:
            some = trainer.plain(sample(images, RESTATED, trainer.seed), candidate.network.resolution, pixels)
            take_statistics(model, loader(some, BATCH, shuffle=True, seed=trainer.seed), trainer.device)

        for change in (restate, lambda model: give_probe(model, images, trainer, pixels)):
            changed = copy.deepcopy(best)
            change(changed)
            found = trainer.judge(changed, judges).top1
            if found > top1:
                best, top1 = changed, found
        return best

    def _split(self, candidate: Candidate) -> tuple[Images, Images]:
        return self.trainer.split(candidate.network.resolution, pixels_of(candidate))

    def _rungs(self, candidate: Candidate, folder: Path) -> Iterator[tuple[int, Arch | TimmNetwork, nn.Module, Images]]:
        """From a linear probe to the last rung."""
        from nas.data.images import sample

        if candidate.kind == Kind.SCRATCH:
            yield from super()._rungs(candidate, folder)
            return
        images, judges = self._split(candidate)
        network, seed = candidate.network, self.trainer.seed
        yield 0, network, self._start(candidate, sample(images, PROBED, seed)), judges
        training = self.begin(candidate, images, self.recipe(self.epochs, candidate), seed, folder / "whole")
        for epochs in self.trainer.rungs:
            yield epochs, network, self._until(training, epochs), judges

    def _screens(self, candidate: Candidate) -> bool:
        """Whether its first rung costs a training."""
        return candidate.kind == Kind.SCRATCH

    def _goes_on(self, kind: Kind, surrogate: Surrogate, guess: Guess, epochs: int) -> bool:
        """The better third goes on, and the first of each kind, which shows what its kind gains."""
        further = [each for each in surrogate.trained if max(each.rungs) > epochs]
        first = all(kind_of(each.features) != kind for each in further)
        return first or super()._goes_on(kind, surrogate, guess, epochs)

    def _how(self, rungs: Rungs, features: np.ndarray) -> str:
        if rungs and max(rungs) == 0:
            return "linear probe" if kind_of(features) == Kind.READY else "just cut"
        return super()._how(rungs, features)


def pixels_of(candidate: Candidate) -> Pixels:
    """How a candidate's images are prepared: as its weights want it; ImageNet's from scratch."""
    from search_spaces import get_arch

    if candidate.kind == Kind.SCRATCH:
        return IMAGENET
    return own_pixels(candidate.network if candidate.kind == Kind.READY else get_arch(candidate.parent))
