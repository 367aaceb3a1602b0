"""What a search's candidates are trained and judged on: a part of the user's images, split once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.files import tell
from nas.networks.store import Store
from nas.quality.kept import FOLDER

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from nas.data.batches import Loader
    from nas.data.dataset import ImageData
    from nas.data.images import Images
    from nas.data.pixels import Pixels
    from nas.quality.plan import TrainingPlan
    from nas.quality.surrogate import TrainedNetwork
    from nas.training.device import TrainingDevice
    from nas.training.engine import Training
    from nas.training.evaluation import Accuracy
    from nas.training.recipes import Recipe
    from pruning.units import Scores
    from search_spaces import Arch

ETA = 3
RUNGS = 3
JUDGED_SHARE = 0.2
JUDGED_IMAGES = 5_000
JUDGED_BATCH = 64
KEPT_SPLITS = 2
"""Pairs of a resolution and a normalisation whose decoded images stay in memory."""


@dataclass(frozen=True)
class Parent:
    """A trained network that candidates take their weights from."""

    label: str
    """What the command line calls it."""
    arch: Arch
    weights: Mapping[str, Tensor]
    """Its state dict."""
    scores: Scores
    """Importance of its units, as `pruning.importance.score` returns it."""
    seen: str = ""
    """A remark on the images it was trained on, "" where there is none."""


@dataclass(frozen=True)
class Skips:
    """What is kept of a loader, whose images take memory."""

    skipped: list[str]
    """Names of the images that could not be decoded; the loader adds to it."""


@dataclass(frozen=True)
class CandidateTrainer:
    """Trains and judges a search's candidates on a part of the user's images, which is split once."""

    data: ImageData
    plan: TrainingPlan
    seed: int
    """Of the split, of samples and of trainings."""
    device: str
    """Where networks train: "cpu", "cuda" or "cuda:1"."""
    folder: Path
    """Where unfinished trainings are kept."""
    results: Callable[[], Sequence[TrainedNetwork]]
    """Returns what the study knows of earlier trainings."""
    progress: Callable[[str, int, int], None]
    """Called with what is trained, the images done and their total."""
    parent: Parent | None = None
    resolution: int | None = None
    """Input resolution of all networks in px; None where the search varies it."""
    seen: np.ndarray | None = None
    """Which training images the parent was trained on; a bool each, shape (training images,)."""
    weights: Store = field(default_factory=Store)
    """Pretrained weights that its networks may begin with."""
    loaders: list[Skips] = field(default_factory=list)
    """What every loader so far skipped."""
    say: Callable[[str], None] = tell
    """Called with a line where memory is short."""
    together: Sequence[TrainingDevice] = ()
    """Where full trainings are made, in a process for each; empty: in this process, on its device."""

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """Epochs at which a network goes on or ends: 1, 3, 9 of 9."""
        return tuple(sorted({max(1, round(self.plan.epochs / ETA**step)) for step in range(RUNGS)}))

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
        return min(self.plan.images, len(self.data.train) - self.judged)

    def split(self, resolution: int, pixels: Pixels | None = None) -> tuple[Images, Images]:
        """The images that candidates train on, and those that judge them. Both come from the training images.

        Args:
            pixels: how they become the network's input; None: as the data's do.
        """
        from nas.data.images import cached

        how = pixels or self.data.pixels
        key = resolution, how
        if key not in self._splits:
            while len(self._splits) >= KEPT_SPLITS:
                del self._splits[next(iter(self._splits))]
            used, judge = self.taught(resolution, how), self.halves(resolution, how)[1]
            used, judge = (cached(each, resolution, self.say, how) for each in (used, judge))
            self._splits[key] = used, judge
        return self._splits[key]

    def halves(self, resolution: int, pixels: Pixels | None = None) -> tuple[Images, Images]:
        """All training images but those that judge, augmented, and those that judge, as they are."""
        from nas.data.images import hold_out

        data = self.data.at(resolution, pixels=pixels)
        rest, _ = hold_out(data.train, self.judged, self.seed, self.seen)
        _, judge = hold_out(data.calibration, self.judged, self.seed, self.seen)
        return rest, judge

    def taught(self, resolution: int, pixels: Pixels | None = None) -> Images:
        """The images that candidates train on, not kept in memory."""
        from nas.data.images import sample

        return sample(self.halves(resolution, pixels)[0], self.plan.images, self.seed)

    @cached_property
    def _splits(self) -> dict[tuple[int, Pixels], tuple[Images, Images]]:
        return {}

    def plain(self, images: Images, resolution: int, pixels: Pixels) -> Images:
        """Images as they are, without augmentation."""
        return images.transformed(self.data.at(resolution, pixels=pixels).calibration.transform)

    def augmented(self, images: Images, resolution: int, pixels: Pixels, recipe: Recipe) -> Images:
        """Images as a fine-tuning by a recipe sees them."""
        return images.transformed(self.data.at(resolution, recipe.augmentation, pixels).train.transform)

    def alone(self) -> AbstractContextManager[None]:
        """Have a GPU that it trains on for this process; see `nas.training.device.alone_on`."""
        from nas.training.device import alone_on

        return alone_on(self.device)

    def alone_together(self) -> AbstractContextManager[None]:
        """Have the GPUs that it makes full trainings on for this process."""
        from nas.training.device import all_alone

        return all_alone(self.together) if self.together else self.alone()

    def run_fully(self, training: Training, what: str) -> None:
        """Train to the last epoch, on all devices of full trainings.

        Args:
            what: what a display says.

        Raises:
            as `Training.run` and `nas.training.together.run_together`.
        """
        if self.together:
            from nas.training.together import run_together

            run_together(training, self.together, lambda done, total: self.progress(what, done, total), self.say)
        else:
            training.run(None, lambda done, total, _: self.progress(what, done, total))

    def judge(self, network: nn.Module, images: Images) -> Accuracy:
        """Accuracy on images, in order."""
        from nas.training.evaluation import evaluate

        return evaluate(network, self.batches(images), self.device, self.say)

    def batches(self, images: Images) -> Loader:
        """Images in order."""
        from nas.data.batches import loader

        made = loader(images, JUDGED_BATCH, shuffle=False, seed=self.seed)
        self.loaders.append(Skips(made.skipped))
        return made

    def train(self, model: nn.Module, images: Images, recipe: Recipe, **options: Any) -> Training:
        """A training on this machine."""
        from nas.training.engine import Training
        from nas.training.request import default_workers

        made = Training(
            model, images, recipe, device=self.device, workers=default_workers(self.device), say=self.say, **options
        )
        self.loaders.append(Skips(made.loader.skipped))
        return made
