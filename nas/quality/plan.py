"""How a search trains its candidates, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from nas.errors import UserError
from nas.files import expanded

DEFAULT_EPOCHS = {"train": 9, "race": 3, "inherit": 3, "supernet": 30}
FINAL_EPOCHS = 30
NO_TEACHER = "none"
LEAST_VALIDATED = 6
"""Networks below which a rank correlation says nothing."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a search trains its candidates."""

    data: str
    """Images: a folder, torch/NAME, hfds/NAME or wds/SHARDS."""
    images: int = 10_000
    """Training images that a search uses at most; 100 or more."""
    epochs: int = DEFAULT_EPOCHS["train"]
    """Epochs of its last rung; 1 or more."""
    final_epochs: int | None = None
    """Epochs of the trainings at its end, 1 or more; None: `FINAL_EPOCHS`, in a race fewer (see `settled`)."""
    seeds: int = 3
    """Seeds of the trainings at its end; 1 or more."""
    validate: int = 0
    """Networks trained fully to validate the tier; 0, or 6 and more."""
    parent: str | None = None
    """The trained network that candidates inherit from, for the tier `inherit`."""
    num_classes: int | None = None
    """Classes that the images must have; None: as many as they have."""
    weights_from: Path | None = None
    """Folder that pretrained weights are looked for in first, for the tier `race`."""
    teacher: str | None = None
    """What the final trainings of a race learn from, if it helps: a published network or timm/NAME, or a folder with
    weights, tuned as a parent is unless it is of the same classes; `NO_TEACHER`; None: as `nas.search.teaching` has
    it."""

    @property
    def full_epochs(self) -> int:
        """Epochs of the trainings at its end."""
        return FINAL_EPOCHS if self.final_epochs is None else self.final_epochs

    def settled(self, tier: str, images: int, made: int | None = None) -> Self:
        """The plan with the epochs of its final trainings: in a race without such those that its folder has, which may
        be of an older vitnas, else those of a tuning on so many training images.

        Args:
            made: the folder's; None: it has none.
        """
        if self.final_epochs is not None or tier != "race":
            return self
        from nas.training.recipes import tuning_epochs

        return replace(self, final_epochs=made or tuning_epochs(images))

    def check(self) -> None:
        """Raises: UserError: a number out of range, or a file where a folder is wanted."""
        for name, value, least in (
            ("train-images", self.images, 100),
            ("epochs", self.epochs, 1),
            ("final-epochs", self.full_epochs, 1),
            ("seeds", self.seeds, 1),
            ("validate", self.validate, 0),
        ):
            if value < least:
                raise UserError(f"--{name} is {value}: give {least} or more")
        if self.weights_from is not None and expanded(self.weights_from).is_file():
            raise UserError(f"--weights-from {self.weights_from} is a file: give the folder that holds it")
        if 0 < self.validate < LEAST_VALIDATED:
            raise UserError(
                f"--validate is {self.validate}: a rank correlation needs {LEAST_VALIDATED} or more networks"
            )
