"""What a search's candidates are trained and judged on: a part of the user's images, split once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.data.lineage import TIMM, remark, seen_among, seen_by
from nas.errors import UserError
from nas.files import tell
from nas.quality.kept import FOLDER

if TYPE_CHECKING:
    import numpy as np
    import optuna
    from torch import Tensor, nn

    from nas.data.dataset import ImageData
    from nas.data.images import Images
    from nas.quality.surrogate import Trained
    from nas.training.engine import Accuracy, Training
    from nas.training.recipes import Recipe
    from search_spaces import Arch

ETA = 3
RUNGS = 3
JUDGED_SHARE = 0.2
JUDGED_IMAGES = 5_000
JUDGED_BATCH = 64
KEPT_SPLITS = 2
"""Resolutions whose decoded images stay in memory."""
SCORED_IMAGES = 512
DEFAULT_EPOCHS = {"train": 9, "inherit": 3, "supernet": 30}
LEAST_VALIDATED = 6
"""Networks below which a rank correlation says nothing."""
COMPLETED = "completed "
"""With a digest, the study attribute that holds the rungs of a training made after its trial had ended."""


@dataclass(frozen=True)
class Lessons:
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


@dataclass(frozen=True)
class Parent:
    """A trained network that candidates take their weights from. scores: importance of its units. seen: what is to be
    said of the images it was trained on."""

    label: str
    arch: Arch
    weights: Mapping[str, Tensor]
    scores: Mapping[str, Any]
    seen: str = ""


@dataclass(frozen=True)
class Skips:
    """What is kept of a loader, whose images take memory: the names of those it could not decode, as it meets them."""

    skipped: list[str]


@dataclass(frozen=True)
class Schooling:
    """device: where networks train. folder: where unfinished trainings are kept. results: what the study knows of
    earlier trainings. progress: called with what is trained, images done and in all. resolution: of all networks, where
    the search fixes it. seen: which training images the parent's weights were trained on. loaders: of all that were in
    use, what they skipped. say: told of want of memory."""

    data: ImageData
    lessons: Lessons
    seed: int
    device: str
    folder: Path
    results: Callable[[], Sequence[Trained]]
    progress: Callable[[str, int, int], None]
    parent: Parent | None = None
    resolution: int | None = None
    seen: np.ndarray | None = None
    loaders: list[Skips] = field(default_factory=list)
    say: Callable[[str], None] = tell

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """Epochs at which a network goes on or ends: 1, 3, 9 of 9."""
        return tuple(sorted({max(1, round(self.lessons.epochs / ETA**step)) for step in range(RUNGS)}))

    @property
    def kept(self) -> Path:
        """Where the best candidates' weights are kept."""
        return self.folder.with_name(FOLDER)

    @property
    def judged(self) -> int:
        """How many training images are held out to judge."""
        return min(JUDGED_IMAGES, math.ceil(JUDGED_SHARE * len(self.data.train)))

    @property
    def used(self) -> int:
        """How many images candidates are trained on."""
        return min(self.lessons.images, len(self.data.train) - self.judged)

    def split(self, resolution: int) -> tuple[Images, Images]:
        """The images that candidates train on, and those that judge them. Both come from the training images."""
        from nas.data.images import cached

        if resolution not in self._splits:
            while len(self._splits) >= KEPT_SPLITS:
                del self._splits[next(iter(self._splits))]
            used, judge = self.taught(resolution), self.halves(resolution)[1]
            self._splits[resolution] = cached(used, resolution, self.say), cached(judge, resolution, self.say)
        return self._splits[resolution]

    def halves(self, resolution: int) -> tuple[Images, Images]:
        """All training images but those that judge, augmented, and those that judge, as they are."""
        from nas.data.images import hold_out

        data = self.data.at(resolution)
        rest, _ = hold_out(data.train, self.judged, self.seed, self.seen)
        _, judge = hold_out(data.calibration, self.judged, self.seed, self.seen)
        return rest, judge

    def taught(self, resolution: int) -> Images:
        """The images that candidates train on, not kept in memory."""
        from nas.data.images import sample

        return sample(self.halves(resolution)[0], self.lessons.images, self.seed)

    @cached_property
    def _splits(self) -> dict[int, tuple[Images, Images]]:
        return {}

    def judge(self, network: nn.Module, images: Images) -> Accuracy:
        """Accuracy on images, in order."""
        from nas.data.batches import loader
        from nas.training.engine import evaluate

        judges = loader(images, JUDGED_BATCH, shuffle=False, seed=self.seed)
        self.loaders.append(Skips(judges.skipped))
        return evaluate(network, judges, self.device, self.say)

    def train(self, model: nn.Module, images: Images, recipe: Recipe, **options: Any) -> Training:
        """A training on this machine."""
        from nas.training.engine import Training
        from nas.training.run import default_workers

        made = Training(
            model, images, recipe, device=self.device, workers=default_workers(self.device), say=self.say, **options
        )
        self.loaders.append(Skips(made.loader.skipped))
        return made


def open_schooling(
    lessons: Lessons,
    data: ImageData,
    study: optuna.Study,
    folder: Path,
    seed: int,
    resolution: int | None,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None],
) -> Schooling:
    """What a search trains on, and how.

    Args:
        study: its earlier trainings are looked up there.
        folder: where unfinished trainings are kept.
        resolution: of all networks; None where the search varies it.
        progress: called with what is trained, and images done and in total.

    Raises:
        UserError: a parent without weights.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = seen_by(parent_weights(lessons.parent))
    schooling = Schooling(
        data,
        lessons,
        seed,
        device,
        folder,
        lambda: results_of(study),
        progress,
        resolution=resolution,
        seen=None if known is None else seen_among(data.train, known),
        say=say,
    )
    say(
        f"training on {device}: {schooling.used:,} of {len(data.train):,} images of {data.name} "
        f"({len(data.classes)} classes), judged on {schooling.judged:,} others of them"
    )
    if lessons.parent is None:
        return schooling
    return replace(schooling, parent=find_parent(lessons.parent, schooling, say))


def results_of(study: optuna.Study) -> list[Trained]:
    """Every network the study has trained, however long."""
    import numpy as np

    from nas.quality.surrogate import Trained

    completed = collected(study, COMPLETED)
    found = {}
    for trial in study.get_trials(deepcopy=False):
        detail = trial.user_attrs.get("detail", {})
        training = detail.get("training")
        if not training:
            continue
        rungs = completed.get(detail["digest"], training["rungs"])
        if rungs:
            known = {int(epochs): top1 for epochs, top1 in rungs.items()}
            found[detail["digest"]] = Trained(detail["digest"], np.array(training["features"]), known)
    return list(found.values())


def collected(study: optuna.Study, prefix: str) -> dict[str, Any]:
    """A study's attributes whose keys have a prefix, by the rest of the key.

    What several machines add to lies under a key each: in one attribute they would overwrite each other's.
    """
    return {key.removeprefix(prefix): value for key, value in study.user_attrs.items() if key.startswith(prefix)}


def find_parent(text: str, schooling: Schooling, say: Callable[[str], None]) -> Parent:
    """A trained network: a folder's own weights, or timm's of a published name, scored on the user's images.

    Raises:
        UserError: no weights, or weights that do not fit.
    """
    from nas.data.batches import loader
    from nas.data.images import sample
    from nas.networks.targets import find_target
    from nas.training.run import load_trained
    from pruning.importance import ImportanceError, score
    from pruning.units import anatomy

    target = find_target(text)
    model = load_trained("--parent", target)
    seen = remark(target.weights or TIMM, schooling.halves(model.arch.resolution)[1], "judging") or ""
    if seen:
        say(seen)
    arch, classes = model.arch, len(schooling.data.classes)
    if arch.num_classes != classes:
        say(
            f"{text} has {arch.num_classes} classes and your images {classes}: it cannot teach, and which of its units "
            f"matter is judged by magnitude; `vitnas train {text} --data ... ` first makes a better parent"
        )
        return Parent(text, arch, model.state_dict(), score(model, anatomy(arch), [], "magnitude"), seen)
    images = sample(schooling.halves(arch.resolution)[0], SCORED_IMAGES, schooling.seed)
    try:
        scores = score(model, anatomy(arch), loader(images, 32, shuffle=False, seed=schooling.seed), "taylor")
    except ImportanceError as error:
        raise UserError(f"--parent {text}: {error}") from None
    return Parent(text, arch, model.state_dict(), scores, seen)


def parent_weights(name: str | None) -> str | Path | None:
    """Where a parent's weights are; None without a parent."""
    from nas.networks.targets import find_target

    return None if name is None else find_target(name).weights or TIMM
