"""How far a training has come, step by step: what each step before the first epoch and after the last has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nas.errors import UserError
from nas.intervals import top1_words


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """The weights that a training began with."""

    source: str
    """random, file (the user's), run (the network's own), folder, cache or download (a published network's)."""
    file: str | None = None
    digest: str | None = None
    """The first 16 hexadecimal digits of the file's SHA-256."""
    told: str = ""
    """What was told of them."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Accuracy on images that were held out of the training images."""

    top1: float
    """Percent, and its 95% interval."""
    top1_ci: tuple[float, float]
    images: int

    def __str__(self) -> str:
        return top1_words(self.top1, self.top1_ci, self.images)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A network with frozen features and a linear classifier, with which its fine-tuning begins."""

    held: Held | None
    """None: there was nothing to judge it on."""
    own_head: bool = False
    """Whether the classifier is the one that came with the weights, which was no worse than the probe's."""
    strength: float
    """The probe's penalty, as `nas.training.probe.Probe` has it; chosen by cross-validation."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trial(Held):
    """A short training with one learning rate. top1: 0 where it diverged."""

    lr: float
    """The highest, at the training's batch size."""


@dataclass
class Course:
    """What the steps have found so far; None where a step is still to be done, or is not asked for."""

    start: StartRecord | None = None
    probe: Probed | None = None
    trials: list[Trial] = field(default_factory=list)
    lr: float | None = None
    """The highest learning rate that the trials chose."""
    taught: Trial | None = None
    """The trial with a teacher, at a rate that was tried without; the teacher is left out unless it is better."""
    whole: bool | None = None
    """Whether the tuning is on all images for training, also on those held out: the chosen trial speaks for it, and
    nothing is left to choose."""
    epochs: int | None = None
    """Those that fit into the time given, or suit the number of images; None: the recipe's."""
    crops: float | None = None
    """Least share of an image's area that random crops of the tuning keep; None: the recipe's."""
    blend: float | None = None
    """Share of the learnt weights in the tuned network; None: the recipe's."""
    tuned: Held | None = None
    """The fine-tuned network."""
    kept: str | None = None
    """Which one is the result, "probe" or "tuned"."""

    @property
    def teaches(self) -> bool:
        """Whether the trial with the teacher is better than that without, where there was one."""
        taught = self.taught
        return taught is None or all(taught.top1 > trial.top1 for trial in self.trials if trial.lr == taught.lr)

    @classmethod
    def read(cls, found: dict[str, Any], place: object) -> Course:
        """Of a `Job`'s state; without one, at its beginning.

        Raises:
            UserError: it is damaged. place: the file that it is in.
        """
        try:
            return TypeAdapter(cls).validate_python(found.get("course", {}))
        except ValidationError:
            raise UserError(f"{place} is damaged: give another --out, or remove it to begin again") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
