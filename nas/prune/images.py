"""The images of a pruning: what trains, judges and calibrates its networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue, TypeAdapter

from nas.data.pixels import IMAGENET, Pixels
from nas.errors import TrainingError, UserError
from nas.files import read_kept, replace_file
from nas.job import Job, Progress, Say
from nas.prune.records import Accuracy, ImagesRow, PruneResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.data.batches import Loader
    from nas.data.dataset import ImageData
    from nas.data.images import Images
    from nas.measure.runtime import Settings
    from nas.training.recipes import BatchNorm

CALIBRATION_IMAGES = 512
EVALUATED_IMAGES = 5_000
BATCH = 32
ANSWERS = "answers.json"
"""In state/: the labels that the unpruned network gave, of the images that train and of those that validate."""


def compute_device(settings: Settings) -> str:
    """Where a command trains on this machine that measures with these settings: its GPU where that is measured."""
    return "cuda" if settings.device == "cuda" else "cpu"


class PruneJob(Job):
    """A `Job` that trains and judges networks on images; those of `open_data` are in `data`, `evaluated` and
    `calibration`."""

    data: ImageData
    evaluated: Images
    calibration: Images
    seed: int
    unlabelled: bool = False
    """Whether the labels are the unpruned network's own answers, and accuracy agreement with it."""

    def __init__(self, folder: Path, options: dict[str, JsonValue], say: Say, progress: Progress, device: str) -> None:
        older = {"compensate": options.get("compensate"), "no_distill": options.get("no_distill")}
        super().__init__(folder, options, say, progress, device, defaults=older)
        self._loaders: list[Loader] = []

    def open_data(
        self,
        name: str | None,
        resolution: int,
        num_classes: int | None,
        seed: int,
        weights: str | Path | None = None,
        pixels: Pixels = IMAGENET,
    ) -> None:
        """Open the images. weights, pixels: of the network."""
        from nas.data.dataset import open_data

        self.seed = seed
        self._take(open_data(name, resolution, num_classes, seed, weights).at(resolution, pixels=pixels))

    def open_unlabelled(
        self, folder: str, classes: Sequence[str], resolution: int, seed: int, pixels: Pixels = IMAGENET
    ) -> None:
        """Open images without labels; `label` gives them some. pixels: of the network."""
        from nas.data.unlabelled import open_unlabelled

        self.seed, self.unlabelled = seed, True
        self._take(open_unlabelled(folder, classes, resolution, seed).at(resolution, pixels=pixels))

    def _take(self, data: ImageData) -> None:
        from nas.data.images import sample

        self.data = data
        self.evaluated = sample(data.val, EVALUATED_IMAGES, self.seed)
        self.calibration = sample(data.calibration, CALIBRATION_IMAGES, self.seed)

    def label(self, model: nn.Module) -> None:
        """Label the images of `open_unlabelled` with a network's answers, which are kept in state/."""
        from nas.data.unlabelled import with_answers

        path = self.kept / ANSWERS
        kept = read_kept(path, TypeAdapter(tuple[list[int], list[int]]), "and the images are labelled again")
        if kept is None:
            with self.phase("labelling"):
                kept = self._answers(model, self.data.calibration), self._answers(model, self.data.val)
            replace_file(path, json.dumps(kept))
        self._take(with_answers(self.data, *kept))
        self.note("no labels: accuracies are agreement with the unpruned network's own answers")

    def _answers(self, model: nn.Module, images: Images) -> list[int]:
        """A network's answers for images that have their numbers for labels; 0 for broken ones, which nothing uses."""
        from nas.training.evaluation import each_batch

        found = [0] * len(images)
        for logits, numbers in each_batch(model, self.batches(images), self.device):
            for number, answer in zip(numbers.tolist(), logits.argmax(1).tolist(), strict=True):
                found[number] = answer
        return found

    def batches(self, images: Images) -> Loader:
        """The images in order."""
        return self._loader(images, shuffle=False)

    def inputs(self, resolution: int) -> Tensor:
        """Calibration images to refit layers on, in random order: (B, 3, R, R) on the device, of all classes."""
        import torch

        from nas.data.images import shuffled_sample
        from pruning.compensation import images_for

        images = shuffled_sample(self.calibration, images_for(resolution), self.seed)
        return torch.cat([x for x, _ in self.batches(images)]).to(self.device)

    def for_probe(self, model: nn.Module) -> Images:
        """As many of the training images as memory allows a probe on a network to be fitted to."""
        from nas.data.images import sample
        from nas.training.probe import most_images

        return sample(self.data.calibration, most_images(model, len(self.data.classes)), self.seed)

    def probe(self, model: nn.Module, images: Images) -> None:
        """Make a linear probe on some images the classifier of a network that `load` made; the rest stays.

        Raises:
            UserError: it ends in no linear layer (see `takes_probe`), or has features that no probe can be fitted to.
        """
        from nas.training.probe import give_probe

        with self.phase("probe") as progress:
            batches, classes = self.batches(images), len(self.data.classes)
            give_probe(model, batches, classes, self.seed, self.device, lambda done: progress(done, len(images)))

    def takes_probe(self, model: nn.Module) -> bool:
        """Whether a network that `load` made ends in a linear layer, which a probe can replace."""
        from nas.training.probe import find_features

        batch = next(iter(self.batches(self.calibration)))
        try:
            find_features(model, [batch], self.device)
        except TrainingError:
            raise
        except UserError:
            return False
        return True

    def _loader(self, images: Images, shuffle: bool) -> Loader:
        from nas.data.batches import loader

        self._loaders.append(loader(images, BATCH, shuffle, self.seed))
        return self._loaders[-1]

    def accuracy(self, model: nn.Module, which: str) -> None:
        """Evaluate a network once; what is known is kept in `state.found[which]`."""
        from nas.training.evaluation import evaluate

        if which in self.state.found:
            return
        with self.phase("evaluating"):
            found = evaluate(model, self.batches(self.evaluated), self.device)
        self.state.found[which] = asdict(Accuracy.of(found))
        self.save()

    def judged(self, which: str) -> Accuracy:
        """What `accuracy` found.

        Raises:
            KeyError: it was not called.
        """
        return TypeAdapter(Accuracy).validate_python(self.state.found[which])

    def fit(
        self,
        phase: str,
        model: nn.Module,
        images: int,
        lr: float,
        batch_norm: BatchNorm,
        teacher: nn.Module | None = None,
    ) -> None:
        """Train a network in place; the order of the images does not depend on what was trained before."""
        from nas.training.fit import fit

        train = self._loader(self.data.train, shuffle=True)
        with self.phase(phase) as progress:
            fit(
                model,
                train,
                images,
                lr,
                seed=self.seed,
                teacher=teacher,
                batch_norm=batch_norm,
                device=self.device,
                progress=progress,
            )

    def read(self) -> PruneResult:
        """The result of a finished pruning.

        Raises:
            UserError: prune.json is damaged.
        """
        found = self.read_result()
        try:
            return PruneResult.from_json(found, self.folder)
        except ValueError:
            raise UserError(f"{self.result} is damaged: give another --out to start again") from None

    def describe_data(self) -> ImagesRow:
        """What a report says of the images; broken ones become a note."""
        from nas.data.about import summary
        from nas.data.batches import skipped_line

        broken = skipped_line(self._loaders)
        if broken:
            self.note(broken)
        return ImagesRow(**asdict(summary(self.data)), evaluated=len(self.evaluated), calibration=len(self.calibration))
