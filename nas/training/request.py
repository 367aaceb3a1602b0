"""A training as it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserError
from nas.export.options import PLAIN, FileOptions
from nas.job import default_folder_of
from nas.machine import usable_cpus

if TYPE_CHECKING:
    from nas.training.recipes import Recipe

RANDOM = "none"
"""The value of --weights that asks for random ones."""
PROBE = "probe"
"""What the folder of a linear probe is called by, which has no recipe."""
MAX_WORKERS = 8
MOST, MOST_WORKERS = 1_000_000, 256


@dataclass(frozen=True)
class TrainRequest:
    """A training as it is asked for."""

    model: str
    """A published name, an arch.json, or a folder with one; see `nas.networks.targets.find_target`."""
    recipe: Recipe
    device: str
    """cpu or cuda."""
    folder: Path
    """Where the results go, and what is needed to continue."""
    data: str | None = None
    """Images to train and judge on (see `nas.data.dataset.open_data`); None for scikit-learn's digits."""
    resolution: int | None = None
    """Pixels a side; None: the network's own."""
    num_classes: int | None = None
    """Classes that the images must have; None: any number."""
    weights: str | None = None
    """To begin with: a file, "timm" (the published ones) or "none" (random ones). None: the network's own; else, with
    the recipe `finetune`, the published ones, where there are any; else random ones."""
    weights_from: Path | None = None
    """A folder where published weights are looked for first: NAME.safetensors, NAME.pth or NAME.bin."""
    probe: bool = False
    """Whether a linear probe on the frozen network is all that is wanted."""
    teacher: str | None = None
    """A network to distil from: as `model`, or timm/NAME."""
    teacher_weights: str | None = None
    """A file, or "timm"; None: the teacher's own."""
    unlabelled: str | None = None
    """A folder of more images, without labels, for a teacher of features."""
    oracle: str | None = None
    """For EViT: a trained DeiT of its depth, as `model`."""
    precision: str = "fp32"
    """fp32, bf16 or fp16 (autocast)."""
    accumulate: int = 1
    """Parts in which an update's images come."""
    compiled: bool = False
    """Whether to use torch.compile."""
    workers: int = 0
    """Processes that decode images; 0: none but this one."""
    seed: int = 0
    """Of splits, weights and the training."""
    minutes: float | None = None
    """How long to train, instead of the recipe's epochs."""
    file: FileOptions = PLAIN
    """How model.onnx is written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if self.weights_from is not None:
            object.__setattr__(self, "weights_from", Path(self.weights_from))

    def identity(self) -> dict[str, Any]:
        """What must be equal for a training to go on."""
        found = asdict(self)
        recipe = found.pop("recipe")
        for name in ("folder", "workers", "compiled", "weights_from", "file"):
            del found[name]
        for name in ("source", "teacher"):
            del recipe[name]
        known: dict[str, Any] = json.loads(
            json.dumps(found | {"onnx": self.file.identity(), "recipe": recipe.pop("name")} | recipe)
        )
        return known

    def check(self) -> None:
        """Raises UserError for what no network could be trained with."""
        from nas.training.updater import PRECISIONS

        recipe = self.recipe
        self.file.check(())
        for name, value, least, most in (
            ("epochs", recipe.epochs, 1, MOST),
            ("batch-size", recipe.batch_size, 2, MOST),
            ("accumulate", self.accumulate, 1, MOST),
            ("workers", self.workers, 0, MOST_WORKERS),
            ("resolution", self.resolution, 1, MOST),
            ("num-classes", self.num_classes, 2, MOST),
        ):
            if value is not None and not least <= value <= most:
                raise UserError(f"--{name} is {value}: give {least} to {most}")
        if self.minutes is not None and not 0 < self.minutes <= MOST:
            raise UserError(f"--minutes is {self.minutes:g}: give more than 0, and {MOST:,} at most")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision {self.precision!r}: choose from {', '.join(PRECISIONS)}")
        if not 0 < recipe.lr < 1e3:
            raise UserError(f"--lr is {recipe.lr:g}: give a learning rate above 0, such as 1e-3")
        looks = self.weights_from is not None and self.teacher is None  # else it may be for the teacher's
        if self.weights == RANDOM and (self.probe or looks):
            option = "--probe" if self.probe else "--weights-from"
            raise UserError(f"{option} needs trained weights: give it without --from-scratch or --weights {RANDOM}")
        if self.weights not in (None, RANDOM, "timm") and looks:
            raise UserError(f"--weights {self.weights} and --weights-from {self.weights_from}: give one of them")
        if self.oracle is not None and (looks or self.weights not in (None, RANDOM)):
            option = "--weights-from" if looks else "--weights"
            raise UserError(f"--oracle lends the network its own weights: leave out {option}")
        unused = {
            "--teacher": self.teacher is not None,
            "--oracle": self.oracle is not None,
            "--minutes": self.minutes is not None,
            "--precision": self.precision != "fp32",
            "--accumulate": self.accumulate != 1,
            "--compile": self.compiled,
        }
        given = [option for option, is_given in unused.items() if is_given]
        if self.probe and given:
            raise UserError(f"--probe trains a linear classifier alone: leave out {', '.join(given)}")
        if self.data is not None and os.path.isdir(self.data):
            images = Path(self.data).resolve()
            if self.folder.resolve() == images or images in self.folder.resolve().parents:
                raise UserError(f"--out {self.folder} is in the folder of the images, {self.data}: give another")
        for option, place in (("--teacher", self.teacher), ("--oracle", self.oracle)):
            if place is not None and os.path.isdir(place) and self.folder.resolve() == Path(place).resolve():
                raise UserError(f"--out {self.folder} holds the weights of {option}: give another")
        if self.teacher is None and self.teacher_weights is not None:
            raise UserError("--teacher-weights needs --teacher")
        if self.unlabelled is not None and (self.teacher is None or recipe.distillation != "features"):
            raise UserError("--unlabelled needs --teacher and --distillation features")


def as_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """`TrainRequest.identity` as a user gives it: in place of the recipe's number of epochs and its rate, what chooses
    them where they are not given."""
    given = dict(options)
    if options.get("by_images"):
        given["epochs"] = "by the number of images"
    if options.get("rates"):
        given["lr"] = "by short trials"
    return given


def choose_recipe(
    name: str,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    distillation: str | None = None,
) -> Recipe:
    """A recipe by name, with the user's changes. lr: the highest rate at the batch size in use.

    Raises:
        UserError: an unknown recipe or distillation.
    """
    from nas.training.recipes import RECIPES

    if name not in RECIPES:
        raise UserError(f"unknown --recipe {name!r}: choose from {', '.join(RECIPES)}")
    if distillation not in (None, "hard", "soft", "features"):
        raise UserError(f"--distillation {distillation!r}: choose hard, soft or features")
    recipe = RECIPES[name]
    size = batch_size or recipe.batch_size
    changes: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "distillation": distillation}
    if epochs is not None:
        changes["by_images"] = False
    if lr is not None:
        changes |= {"lr": lr, "lr_batch": size, "rates": ()}
    return replace(recipe, **{key: value for key, value in changes.items() if value is not None})


def check_device(device: str | None) -> str:
    """cpu or cuda; without one, cuda where it can be used.

    Raises:
        UserError: another device, or one that is not here.
    """
    import torch

    here = torch.cuda.is_available()
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device!r}: choose cpu or cuda")
    if device == "cuda" and not here:
        raise UserError("--device cuda: torch finds no CUDA device here")
    return device or ("cuda" if here else "cpu")


def default_workers(device: str) -> int:
    """Processes that decode: none beside a training on the CPU, which uses its cores itself."""
    return 0 if device == "cpu" else min(MAX_WORKERS, len(usable_cpus()))


def default_folder(model: str, recipe: str) -> Path:
    """runs/train-<model>-<recipe>."""
    return default_folder_of("train", model, recipe)
