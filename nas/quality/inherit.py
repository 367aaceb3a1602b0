"""The tier that inherits: candidates take a trained parent's weights and are fine-tuned, the parent teaching."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nas.quality.train import Train
from pruning.transfer import transfer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.data import Images
    from nas.recipes import Recipe
    from nas.schooling import Schooling
    from nas.train import Training
    from search_spaces import Arch


class Inherit(Train):
    """As `Train`, with other beginnings: the parent's most important units, and the parent as teacher."""

    name = "inherit"
    label = "estimated top-1 (on your images, after fine-tuning inherited weights)"

    def __init__(self, schooling: Schooling) -> None:
        super().__init__(schooling)
        self.parent = schooling.parent
        self._teaches = self.parent.arch.num_classes == len(schooling.data.classes)
        self.note += (
            f" Weights are inherited from {self.parent.label}{', which also teaches' * self._teaches}; if it was "
            "trained on the images that judge, their figures flatter."
        )
        self._teacher = cache(self._teacher_at)

    def recipe(self, epochs: int) -> Recipe:
        """What inherited weights are fine-tuned with."""
        from nas.recipes import RECIPES

        return dataclasses.replace(RECIPES["finetune"], epochs=epochs)

    def begin(
        self,
        arch: Arch,
        images: Images,
        recipe: Recipe,
        seed: int,
        checkpoint: Path,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Training:
        """A training from what the parent passes on."""
        import torch

        from search_spaces import create_model

        if weights is None:
            generator = torch.Generator().manual_seed(seed)
            weights = transfer(self.parent.arch, self.parent.weights, arch, self.parent.scores, generator)
        torch.manual_seed(seed)
        model = create_model(arch)
        model.load_state_dict(dict(weights))
        teacher = self._teacher(arch.resolution) if self._teaches else None
        return self.schooling.train(model, images, recipe, seed=seed, checkpoint=checkpoint, teacher=teacher)

    def _teacher_at(self, resolution: int) -> nn.Module:
        from search_spaces import create_model

        arch = self.parent.arch.at(resolution)
        model = create_model(arch)
        model.load_state_dict(transfer(self.parent.arch, self.parent.weights, arch))
        return model.to(self.schooling.device).eval()
