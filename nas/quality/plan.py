"""How a search trains its candidates, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass

from nas.errors import UserError

DEFAULT_EPOCHS = {"train": 9, "inherit": 3, "supernet": 30}
LEAST_VALIDATED = 6
"""Networks below which a rank correlation says nothing."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a search trains. images: of the training images a search uses at most. epochs: of its last rung; final_epochs
    and seeds: of the trainings at its end. validate: Archs trained fully to validate the tier."""

    data: str
    images: int
    epochs: int
    final_epochs: int
    seeds: int
    validate: int
    parent: str | None = None

    def check(self) -> None:
        """Raises: UserError: a number out of range."""
        for name, value, least in (
            ("train-images", self.images, 100),
            ("epochs", self.epochs, 1),
            ("final-epochs", self.final_epochs, 1),
            ("seeds", self.seeds, 1),
            ("validate", self.validate, 0),
        ):
            if value < least:
                raise UserError(f"--{name} is {value}: give {least} or more")
        if 0 < self.validate < LEAST_VALIDATED:
            raise UserError(
                f"--validate is {self.validate}: a rank correlation needs {LEAST_VALIDATED} or more networks"
            )
