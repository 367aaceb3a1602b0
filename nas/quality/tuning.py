"""Pretrained networks tuned on the user's images by the recipe `finetune`: their learning rate, parents and teachers.

The rate is tried once for all networks of a family, or of one of timm's names. A parent is a published network that is
tuned once: a linear probe, then as many epochs as a final training has, as far as `PASSED` allows; the tuned network
stays unless it is worse by more than a standard error. At a second resolution the tuned weights go on, for a third of
the epochs. A teacher of other classes is tuned as a parent is, always from the weights that it has. All of it is kept
in the folder of the run's trainings, so that a run that goes on, and workers on one folder, do it once.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import FiniteFloat, TypeAdapter

from nas.errors import TrainingError, UserError
from nas.files import folder_lock, read_kept, replace_file
from nas.identity import text_digest
from nas.networks.build import create
from nas.networks.timm_network import TimmNetwork
from nas.networks.weights import resized
from nas.quality.ready import give_probe, own_pixels, with_weights
from nas.quality.trainer import ETA
from nas.training.course import Held
from nas.training.rates import standard_error
from nas.units import counted

if TYPE_CHECKING:
    from torch import nn

    from nas.data.images import Images
    from nas.data.pixels import Pixels
    from nas.networks.pretrained import Pretrained
    from nas.quality.trainer import CandidateTrainer
    from nas.training.recipes import Recipe
    from search_spaces import Arch
    from search_spaces.network import Network

RATES = "rates"
"""Folder in that of the run's trainings."""
FEW = 500
"""Images that judge up to which the highest rate within two standard errors of the best is taken, instead of one: of
EfficientViT-M1 on 2,000 images 10 epochs with 1e-3 gave 51.0% of 20 classes of Tiny-ImageNet, with 3e-4 50.2, where
an epoch with each gave 43.5 and 47.2% of 400 images."""
PASSED = 50_000
"""Images that a parent's tuning goes through at most, repeats counted; but it has the epochs of the last rung. Children
are as good as their parent: of EfficientViT-M1 with 51.9% of 20 classes of Tiny-ImageNet one cut to three quarters of
its multiply-accumulates had 51.4."""
LONGEST = 160
"""Bytes of a name in that of its file, at most: a folder may be named by a longer path than a file may have."""


def tuning_recipe(epochs: int, lr: float) -> Recipe:
    """What pretrained networks are tuned by. lr: the highest, at its batch size."""
    from nas.training.recipes import FINETUNE

    made = replace(FINETUNE, epochs=epochs, lr=lr, by_images=False)
    crops = replace(made.augmentation, scale=made.tuning_crops)
    return replace(made, augmentation=crops, blend=made.tuning_blend)


# The learning rate


@dataclass(frozen=True)
class RateTried:
    """An epoch with one learning rate."""

    lr: FiniteFloat
    top1: FiniteFloat
    """Percent of the images that judge; 0 where it diverged."""


def group_of(network: Arch | TimmNetwork) -> str:
    """What networks of one learning rate are called: their family or, of timm's, their name; at any resolution."""
    return network.name if isinstance(network, TimmNetwork) else network.family


def choose_rate(
    network: Arch | TimmNetwork,
    trainer: CandidateTrainer,
    start: Callable[[], tuple[nn.Module, Images, Images]],
) -> float:
    """The rate that an epoch with each of the recipe's speaks for; tried now where it has not been for its group.

    Args:
        start: gives what a tuning begins with, the images that it trains on and those that judge.
    """
    from nas.training.recipes import FINETUNE

    group = group_of(network)
    path = trainer.folder / RATES / f"{group}.json"
    with alone_with(path, trainer):
        tried = _rates_in(path)
        left = FINETUNE.rates[len(tried) :]
        if left:
            first, images, judges = start()
            for lr in left:
                what = f"trying the learning rate {lr:g} on {group}"
                try:
                    trained = _trained(copy.deepcopy(first), images, trainer, tuning_recipe(1, lr), what)
                    top1 = trainer.judge(trained, judges).top1
                except TrainingError:
                    top1 = 0.0
                tried.append(RateTried(lr, top1))
                replace_file(path, json.dumps([asdict(each) for each in tried]).encode())
            told = ", ".join(f"{each.lr:g} {each.top1:.1f}%" for each in tried)
            trainer.say(f"learning rate of {group}: {_best(tried, trainer):g} (after an epoch with {told})")
    return _best(tried, trainer)


def _rates_in(path: Path) -> list[RateTried]:
    return read_kept(path, TypeAdapter(list[RateTried]), "and the rates are tried again") or []


def _best(tried: list[RateTried], trainer: CandidateTrainer) -> float:
    from nas.training.course import Trial
    from nas.training.rates import choose_trial

    trials = [Trial(top1=each.top1, top1_ci=(0, 100), images=trainer.judged, lr=each.lr) for each in tried]
    return choose_trial(trials, trainer.plan.full_epochs, errors=2 if trainer.judged <= FEW else 1).lr


# Parents and teachers


class Role(StrEnum):
    """What a network is tuned for."""

    PARENT = "parent"
    """Smaller ones are cut from it; it may teach, too."""
    TEACHER = "teacher"
    """It only teaches."""

    @property
    def folder(self) -> str:
        """In that of the run's trainings, where it is kept."""
        return f"{self}s"


@dataclass(frozen=True)
class Tuned:
    """How a network was tuned, as its document says it; None where a step is still to be made."""

    name: str
    """As it is published, or as --teacher names it."""
    resolution: int
    digest: str
    """Of the file of the weights that its tuning began with, as `nas.identity.file_digest`."""
    images: int
    """That it was tuned on."""
    judged: int
    """Others, that the figures are of."""
    first: FiniteFloat | None = None
    """Top-1 in percent of the network that its tuning began with: with a linear probe, or as it was tuned at another
    resolution."""
    tuned: FiniteFloat | None = None
    """Top-1 in percent after the last epoch; 0 where the tuning diverged."""
    lr: FiniteFloat | None = None
    """The highest learning rate."""
    epochs: int | None = None
    began: int = 0
    """The resolution in px of the tuning that it goes on from; 0: it begins with the weights that it was given."""
    seconds: FiniteFloat = 0.0
    """That it took, the trials of the learning rate included where they were made for it."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """A document; None where there is none.

        Raises:
            UserError: it is damaged.
        """
        return read_kept(path, TypeAdapter(cls), f"and {path.stem} is tuned again")

    @property
    def top1(self) -> float:
        """Percent, of the network that is kept."""
        return (self.tuned if self.pays else self.first) or 0.0

    @property
    def pays(self) -> bool:
        """Whether the tuned network is kept: it is not worse by more than a standard error, as few images judge."""
        first, tuned = self.first or 0.0, self.tuned or 0.0
        return tuned >= first - standard_error(Held(top1=first, top1_ci=(0, 100), images=max(1, self.judged)))

    @property
    def words(self) -> str:
        """What became of it, in words."""
        stays = "" if self.pays else ", and so it stays as before"
        return (
            f"{self.name}, tuned at {self.resolution} px for {counted(self.epochs or 0, 'epoch')} of "
            f"{self.images:,} images: {self.tuned:.1f}% of {self.judged:,} others, {self.first:.1f}% before{stays}; "
            f"{self.seconds:.0f} s"
        )


def tuned_in(folder: Path, name: str = "*") -> Iterator[Tuned]:
    """Every finished tuning of a parent, or of all, in the folder of a run's trainings.

    Raises:
        UserError: a document is damaged.
    """
    return (found for found in _begun_in(folder, name) if found.tuned is not None)


def _begun_in(folder: Path, name: str = "*") -> Iterator[Tuned]:
    for path in sorted((folder / Role.PARENT.folder).glob(f"{name}-*px.json")):
        found = Tuned.read(path)
        if found is not None:
            yield found


def check_weights(
    name: str, resolution: int, weights: Pretrained, trainer: CandidateTrainer, role: Role = Role.PARENT
) -> None:
    """See that a network has not been tuned from other weights.

    Raises:
        UserError: it has been.
    """
    path = _document(name, resolution, trainer, role)
    found = Tuned.read(path)
    if found is not None and found.digest != weights.digest:
        raise UserError(
            f"{path} was tuned from weights with sha256 {found.digest}, not from {weights.path} "
            f"({weights.digest}): give the same weights, or another --study"
        )


def tune(
    name: str,
    network: Arch | TimmNetwork,
    weights: Pretrained,
    trainer: CandidateTrainer,
    role: Role = Role.PARENT,
    pixels: Pixels | None = None,
) -> nn.Module:
    """A network as it is tuned; from its folder where it is there.

    A tuning that was begun goes on with its own epochs and rate.

    Args:
        name: as it is published, or as --teacher names it.
        network: at the resolution and for the classes that it is wanted for.
        weights: what its tuning begins with.
        pixels: how images are prepared for them; None: as for published ones.

    Raises:
        TrainingError: it cannot be trained. UserError: its weights do not fit.
    """
    path = _document(name, network.resolution, trainer, role)
    with alone_with(path, trainer):
        return _Tuning(name, network, weights, path, trainer, role, pixels or own_pixels(network)).run()


def _document(name: str, resolution: int, trainer: CandidateTrainer, role: Role = Role.PARENT) -> Path:
    file = re.sub(r"[^\w.@-]+", "-", name)  # timm/NAME, or a folder
    if len(file.encode()) > LONGEST:
        file = f"{file.encode()[-LONGEST:].decode(errors='ignore')}-{text_digest(file)}"
    return trainer.folder / role.folder / f"{file}-{resolution}px.json"


class _Tuning:
    """One network's, step by step."""

    def __init__(
        self,
        name: str,
        network: Arch | TimmNetwork,
        published: Pretrained,
        path: Path,
        trainer: CandidateTrainer,
        role: Role,
        pixels: Pixels,
    ) -> None:
        self.network, self.published, self.path, self.trainer = network, published, path, trainer
        self.role, self.pixels = role, pixels
        found = Tuned.read(path)
        self.found = found or Tuned(name, network.resolution, published.digest, trainer.used, trainer.judged)
        self._since = time.monotonic()

    def run(self) -> nn.Module:
        from nas.export.folder import save_weights

        weights, state = self.path.with_suffix(".safetensors"), self.path.with_suffix(".state")
        if self.found.tuned is not None and weights.is_file():
            return _load(self.network, weights)
        trainer, network, what = self.trainer, self.network, f"the {self.role} {self.found.name}"
        images, judges = trainer.split(network.resolution, self.pixels)
        if self.found.epochs is None:
            epochs = self._usual_epochs()
            earlier = next(tuned_in(trainer.folder, self.found.name), None) if self.role == Role.PARENT else None
            if earlier is not None:
                self._keep(began=earlier.resolution, epochs=max(1, epochs // ETA))
            else:
                self._keep(epochs=epochs)
        first = self._first(images)
        if self.found.first is None:
            self._keep(first=trainer.judge(first, judges).top1)
        if self.found.lr is None:
            self._keep(lr=choose_rate(network, trainer, lambda: (first, images, judges)))
        epochs, lr = self.found.epochs or 1, self.found.lr or 0.0
        recipe = tuning_recipe(epochs, lr)
        augmented = trainer.augmented(images, network.resolution, self.pixels, recipe)
        try:
            tuned = _trained(copy.deepcopy(first), augmented, trainer, recipe, f"tuning {what}", state)
            top1 = trainer.judge(tuned, judges).top1
        except TrainingError as error:
            trainer.say(f"{what} stays as its tuning began: {error}")
            tuned, top1 = first, 0.0
        save_weights(tuned if replace(self.found, tuned=top1).pays else first, weights)
        self._keep(tuned=top1)
        state.unlink(missing_ok=True)
        trainer.say(f"{self.role} {self.found.words}")
        return _load(network, weights)

    def _usual_epochs(self) -> int:
        """Those of the parents that the folder has, whatever is asked for now: children of all compete."""
        known = (each.epochs for each in _begun_in(self.trainer.folder) if not each.began)
        plan = self.trainer.plan
        usual = max(plan.epochs, min(plan.full_epochs, PASSED // self.trainer.used))
        return next((epochs for epochs in known if epochs is not None), usual)

    def _first(self, images: Images) -> nn.Module:
        """What the tuning begins with."""
        if not self.found.began:
            model = with_weights(self.network, self.published.path)
            give_probe(model, images, self.trainer, self.pixels)
            return model
        before = self.network.at(self.found.began)
        weights = _document(self.found.name, self.found.began, self.trainer).with_suffix(".safetensors")
        return resized(cast("Network", _load(before, weights)), cast("Arch", self.network))

    def _keep(self, **found: Any) -> None:
        now = time.monotonic()
        self.found = replace(self.found, seconds=self.found.seconds + now - self._since, **found)
        self._since = now
        replace_file(self.path, json.dumps(asdict(self.found)).encode())


def alone_with(path: Path, trainer: CandidateTrainer) -> AbstractContextManager[None]:
    """Have a file in the run's folder for this process; another worker's end is waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return folder_lock(path.parent, waiting=True, name=f".{path.stem}.lock", say=trainer.say)


def _load(network: Arch | TimmNetwork, weights: Path) -> nn.Module:
    from safetensors.torch import load_file

    model: nn.Module = create(network)
    model.load_state_dict(load_file(weights))
    return model


def _trained(
    model: nn.Module, images: Images, trainer: CandidateTrainer, recipe: Recipe, what: str, state: Path | None = None
) -> nn.Module:
    """A model after all epochs. what: what a display says of it. state: of a training that may be interrupted."""
    training = trainer.train(model, images, recipe, seed=trainer.seed, checkpoint=state)
    try:
        training.run(None, lambda done, total, _: trainer.progress(what, done, total))
    finally:
        training.loader.close()
    return training.network
