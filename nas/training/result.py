"""What a training came to, as metrics.json holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nas.errors import UserError
from nas.intervals import top1_words
from nas.training.course import Held, Probed, StartRecord, Trial

RESULT = "metrics.json"
LINEAR_PROBE = "linear probe"
"""`Final.of` of a classifier on a frozen network."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A network on the validation images; the accuracy's fields are None where it was not judged."""

    epoch: int
    """Epochs that it was trained for; 0: a linear probe."""
    seconds: float
    top1: float | None = None
    """Percent."""
    top1_ci: tuple[float, float] | None = None
    """The 95% interval, percent."""
    val_loss: float | None = None
    """Mean cross-entropy, nats."""
    val_images: int | None = None

    def accuracy(self) -> str | None:
        """Top-1 with its interval, in words; None where it was not judged."""
        if self.top1 is None or self.top1_ci is None or self.val_images is None:
            return None
        return top1_words(self.top1, self.top1_ci, self.val_images)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Epoch(Judged):
    """One epoch of a training."""

    loss: float
    """Mean over its updates."""
    lr: float
    """The learning rate of its last update."""
    images_per_s: float

    def line(self, epochs: int) -> str:
        """What is said when it is done. epochs: of the training."""
        return (
            f"epoch {self.epoch}/{epochs}: {self.accuracy() or 'not judged'}, loss {self.loss:.3f}, "
            f"learning rate {self.lr:.2g}, {self.images_per_s:.0f} images/s"
        )


@dataclass(frozen=True, kw_only=True)
class Final(Judged):
    """The network that is kept: of the last epoch, whose loss, rate and speed it has, or a linear probe."""

    of: str
    """What was judged and written: "moving average" or "last weights", and whether ", mixed with the first"; or "linear
    probe"."""
    loss: float | None = None
    lr: float | None = None
    images_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A training that has ended, for now or for good. Fields that an earlier vitnas did not write have defaults."""

    model: str
    """As the user named it."""
    command: str
    started: str
    finished: str
    family: str
    resolution: int
    """Pixels a side."""
    params: int
    macs: int
    data: Mapping[str, Any]
    """The fields of a `nas.data.about.Summary`."""
    seen: Mapping[str, Any] | None = None
    """The file that names the images trained on, and their number; None where it is unknown."""
    recipe: Mapping[str, Any]
    """The fields of a `Recipe` as used, and `peak_lr`."""
    options: Mapping[str, Any]
    """`TrainRequest.identity`."""
    processes: int = 1
    top1: float | None = None
    """Percent, as `final` has it; likewise the 95% interval and the number of images."""
    top1_ci: tuple[float, float] | None = None
    images: int | None = None
    classes: list[str] | None = None
    """Names, in label order."""
    seconds: float | None = None
    """Of training and judging, the epoch that was begun included."""
    train_threads: int | None = None
    epochs: list[Epoch] = field(default_factory=list)
    final: Final | None
    start: StartRecord | None = None
    """The weights that it began with."""
    probe: Probed | None = None
    """The linear probe on held-out images, of a fine-tuning."""
    trials: list[Trial] = field(default_factory=list)
    """Of learning rates."""
    taught: Trial | None = None
    """With a teacher, which was left out unless this is better than the trial of the same rate without it."""
    tuned: Held | None = None
    """The fine-tuned network on the images that the probe was judged on."""
    whole: bool | None = None
    """Whether it was trained on these, too: then `tuned` is too high, and only tells that nothing went wrong."""
    kept: str | None = None
    """The better of the two, "probe" or "tuned", whose weights these are; None: there was nothing to choose."""
    hardware: Mapping[str, Any]
    notes: list[str]
    phases: Mapping[str, float]
    """Seconds by phase."""
    interrupted: str | None = None
    """After what it was interrupted, in words."""
    error: str | None

    def to_json(self) -> dict[str, Any]:
        """As metrics.json has it."""
        rows = {"epochs": [epoch.to_json() for epoch in self.epochs], "final": self.final and self.final.to_json()}
        return asdict(self) | rows

    @classmethod
    def read(cls, path: Path) -> TrainResult:
        """Read a metrics.json.

        Raises:
            UserError: it cannot be read, or is not what vitnas wrote.
        """
        try:
            return TypeAdapter(cls).validate_python(json.loads(path.read_text()))
        except (OSError, ValueError, RecursionError):
            raise UserError(f"{path} is damaged: give another --out to start again") from None
