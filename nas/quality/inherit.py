"""The tier that inherits: candidates take a trained parent's weights and are fine-tuned, the parent teaching."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from nas.quality.trained import HalvingTier
from pruning.transfer import transfer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.quality.candidate import Candidate
    from nas.quality.trainer import CandidateTrainer
    from nas.training.recipes import Recipe
    from search_spaces import Arch


class InheritTier(HalvingTier):
    """As `HalvingTier`, with other beginnings: the parent's most important units, and the parent as teacher."""

    name = "inherit"
    label = "score (inherit: top-1 estimated on your images, after fine-tuning inherited weights)"

    def __init__(self, trainer: CandidateTrainer) -> None:
        super().__init__(trainer)
        if trainer.parent is None:
            raise ValueError("the tier that inherits needs a parent")
        self.parent = trainer.parent
        self._teaches = self.parent.arch.num_classes == len(trainer.data.classes)
        self.note += (
            f" Weights are inherited from {self.parent.label}{', which also teaches' * self._teaches}; if it was "
            f"trained on the images that judge, estimates flatter. {self.parent.seen}"
        ).rstrip()
        self._teacher = cache(self._teacher_at)

    def recipe(self, epochs: int, candidate: Candidate | None = None) -> Recipe:
        """What inherited weights are fine-tuned with."""
        from nas.training.recipes import INHERITED

        return dataclasses.replace(INHERITED, epochs=epochs)

    def inherited(self, arch: Arch, seed: int) -> Mapping[str, Tensor]:
        """What the parent passes on."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return transfer(self.parent.arch, self.parent.weights, arch, self.parent.scores, generator)

    def teacher(self, resolution: int) -> nn.Module | None:
        """The parent, where it knows the classes."""
        return self._teacher(resolution) if self._teaches else None

    def _teacher_at(self, resolution: int) -> nn.Module:
        from search_spaces import create_model

        arch = self.parent.arch.at(resolution)
        model = create_model(arch)
        model.load_state_dict(transfer(self.parent.arch, self.parent.weights, arch))
        return model.to(self.trainer.device).eval()
