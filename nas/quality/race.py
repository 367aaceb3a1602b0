"""The tier that races: pretrained networks, those cut from larger ones, and those from scratch, on equal terms.

It goes as successive halving does, with a rung 0 that costs forward passes only: a linear probe on a ready network; a
derived one right after it is cut from its parent, its layers refitted to what they wrote there. A ready one has
BatchNorm's statistics taken again; each where that is better. The better third of all is fine-tuned from there, rung by
rung; a network that tuning makes worse by more than two standard errors stays as it was. Networks from scratch begin at
rung 1.

Of EfficientViT-M1, tuned to 48.8% of 3,000 images of 20 classes of Tiny-ImageNet, children cut to 90, 75 and 60% of its
multiply-accumulates had 49.0, 48.3 and 48.1% right after the cut, where statistics and a probe made them worse. Cut to
40, 30 and 25% they had 9, 5 and 5%, with statistics and a probe 39, 37 and 35. Refitted, children of the network before
it was tuned, with a probe's 47.5%, kept 47.4% at 40% of its multiply-accumulates (40.7 as cut) and 44.8% at 25% (9.9).
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.pixels import IMAGENET, Pixels
from nas.files import replace_file
from nas.identity import text_digest
from nas.quality.candidate import Candidate, Kind, label_at
from nas.quality.parents import Parents
from nas.quality.ready import give_probe, own_pixels, with_weights
from nas.quality.surrogate import kind_of
from nas.quality.teacher import named_teacher, sized
from nas.quality.trained import HalvingTier
from nas.quality.tuning import Tuned, alone_with, choose_rate, tuned_in, tuning_recipe
from nas.units import counted
from search_spaces import get_arch, list_models
from search_spaces.weights import published_name

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from nas.data.dataset import ImageData
    from nas.data.images import Images
    from nas.networks.timm_network import TimmNetwork
    from nas.quality.surrogate import Guess, Rungs, Surrogate
    from nas.quality.trainer import CandidateTrainer, Parent
    from nas.training.engine import Training
    from nas.training.evaluation import Accuracy
    from nas.training.recipes import Recipe
    from search_spaces import Arch

PROBED, PROBED_OF_CLASS = 1000, 3
"""Images that rung 0 fits a linear probe to, at most; more where that is fewer than so many of each class."""
RESTATED, BATCH = 512, 64
"""Images that BatchNorm's statistics are taken from, and how many at once."""
LEAST_VARIANCE = 0.01
"""Of a channel's variance, the share that stays at least when statistics are taken again: after a cut a channel may be
dead, and its rounding would be blown up. As good as none where all live (29.5 and 29.1%, 35.0 and 34.8, 31.7 and 31.4
of three children)."""


class RaceTier(HalvingTier):
    """See the module."""

    name = "race"
    label = "score (race: top-1 estimated on your images, after fine-tuning)"

    def __init__(self, trainer: CandidateTrainer) -> None:
        super().__init__(trainer)
        self.parents = Parents(trainer)
        rungs = ", ".join(map(str, trainer.rungs))
        self.note = (
            "Ready networks were judged with a linear probe, derived ones as they were cut from a parent that had been "
            "tuned on your images, with their layers refitted to it where that was better; the better third of all was "
            f"tuned up to {rungs} epoch{'s' * (rungs != '1')} of {trainer.used:,} of your training images. "
            "All were judged on others held out from training. Estimates "
            f"are for {counted(self.epochs, 'epoch')} and serve to rank."
        )
        self._restates: dict[str, bool] = {}
        """By the key of a ready network, whether BatchNorm's statistics are taken again for it."""
        self._repairs: dict[str, tuple[bool, bool]] = {}
        """By the key of a derived network, whether its layers are refitted, and whether it has a new classifier."""

    def candidate_of(self, arch: Arch) -> Candidate:
        """A network that the search made up: ready where it is a published one with weights; derived where it has a
        parent; else from scratch."""
        name = published_name(arch)
        if name is not None and self.parents.published(name) is not None:
            return Candidate(arch, Kind.READY, name=label_at(name, arch.resolution, get_arch(name).resolution))
        parent = self.parents.parent_for(arch)
        return Candidate(arch) if parent is None else Candidate(arch, Kind.DERIVED, parent)

    def data(self, candidate: Candidate) -> ImageData:
        """The user's images as a network takes them."""
        return self.trainer.data.at(candidate.network.resolution, pixels=pixels_of(candidate))

    def recipe(self, epochs: int, candidate: Candidate | None = None) -> Recipe:
        """`finetune` with the rate of the network's group, which may be tried now; `quick` from scratch."""
        if candidate is None or candidate.kind == Kind.SCRATCH:
            return super().recipe(epochs)
        if candidate.kind == Kind.DERIVED:  # its family's rate is tried on its parent, if not yet
            self.parents.tuned(candidate.parent, candidate.network.resolution)
        images, judges = self._split(candidate)
        lr = choose_rate(candidate.network, self.trainer, lambda: (self._start(candidate, images), images, judges))
        return tuning_recipe(epochs, lower_rate(lr) if candidate.kind == Kind.DERIVED else lr)

    def tuning_pays(self, candidate: Candidate) -> bool:
        """Whether the search's own tuning did not make a network worse by more than `DOUBT` standard errors: to the
        last rung it is short, and few images judge. Where it made none, it is taken to pay."""
        found = next((each for each in self.trainer.results() if each.key == candidate.key), None)
        if found is None or not {0, self.epochs} <= found.rungs.keys():
            return True
        return found.rungs[self.epochs] > found.rungs[0] if found.tuned is None else found.tuned

    def parent_tuning_pays(self, candidate: Candidate) -> bool:
        """Whether the search left the parent of a derived network as it was tuned, not as its tuning began."""
        found = self.parents.record(candidate.parent, candidate.network.resolution)
        return found is None or found.began > 0 or found.pays

    def parent_tunings(self, candidate: Candidate, folder: Path) -> list[Tuned]:
        """How the parent of a derived network was tuned for its trainings in a folder, once for each seed; none of
        others. An older vitnas cut what the search had tuned."""
        if not candidate.parent:
            return []
        px, epochs = candidate.network.resolution, self.trainer.plan.full_epochs
        paths = sorted(folder.glob(f"{full_stem(candidate.parent, px, epochs)}*.json"))
        found = [each for each in map(Tuned.read, paths) if each is not None]
        earlier = self.parents.record(candidate.parent, px)
        return found or ([earlier] if earlier else [])

    def begin(
        self,
        candidate: Candidate,
        images: Images,
        recipe: Recipe,
        seed: int,
        checkpoint: Path,
        weights: Mapping[str, Tensor] | None = None,
        teacher: nn.Module | None = None,
    ) -> Training:
        """Prepare a training; of a ready network, from a linear probe on all its images; of a derived one, cut from its
        parent, which is first tuned on all its images, as long as the recipe says, from the same seed.

        Raises:
            TrainingError: its parent cannot be had or cut. UserError: its weights cannot be had, or do not fit.
        """
        from nas.networks.build import create

        if candidate.kind == Kind.SCRATCH:
            return super().begin(candidate, images, recipe, seed, checkpoint, weights, teacher)
        begun = any(checkpoint.parent.glob(f"{checkpoint.name}*"))  # whose own weights go on
        model: nn.Module
        if begun or weights is not None:
            model = create(candidate.network)
            if weights is not None:
                model.load_state_dict(dict(weights))
        elif candidate.kind == Kind.DERIVED:
            model = self._cut_fully(candidate, images, recipe, seed, checkpoint.parent)
        else:
            model = self._start(candidate, images)
        augmented = self.trainer.augmented(images, candidate.network.resolution, pixels_of(candidate), recipe)
        return self.trainer.train(model, augmented, recipe, seed=seed, checkpoint=checkpoint, teacher=teacher)

    def teacher_name(self, student: Candidate) -> str | None:
        """What is to teach in final trainings: the network of the plan or, without one, the best parent that has been
        tuned; None where there is none. With its resolution in px, such as efficientvit_m1@64, but for a folder.

        Raises:
            UserError: there is no such network.
        """
        name = self.trainer.plan.teacher
        if name is not None:
            return sized(name, student.network.resolution, self.trainer.say)
        able = [each for each in tuned_in(self.trainer.folder) if self._may_teach(each, student)]
        best = max(able, key=lambda each: each.top1, default=None)
        return f"{best.name}@{best.resolution}" if best else None

    def _may_teach(self, tuned: Tuned, student: Candidate) -> bool:
        """Whether a tuned parent needs more multiply-accumulates than a student, and is better than the search found
        that on the same images."""
        from nas.networks.counts import counts_of

        arch = self.parents.arch(tuned.name, tuned.resolution)
        larger = arch is not None and counts_of(arch).macs > counts_of(student.network).macs
        return larger and tuned.top1 > self.top1_of(student)

    def top1_of(self, candidate: Candidate) -> float:
        """The best that the search has judged a network, in percent; 0 where it has not."""
        known = (each.rungs for each in self.trainer.results() if each.key == candidate.key)
        return max(next(known, {}).values(), default=0.0)

    def find_teacher(self, name: str, student: Candidate) -> nn.Module | None:
        """See `TrainedTier.find_teacher`. One that is published, or of other classes, is tuned as a parent is, on the
        search's own split.

        Raises:
            TrainingError: it cannot be tuned. UserError: it cannot be had.
        """
        from nas.training.teachers import fitting
        from search_spaces import create_model

        if not name:
            return None
        published, _, px = name.partition("@")
        if not px or published not in list_models():
            return named_teacher(name, pixels_of(student), self.trainer)
        tuned = self.parents.tuned(published, int(px))
        model = create_model(tuned.arch)
        model.load_state_dict(dict(tuned.weights))
        counts = len(self.trainer.data.classes), len(self.trainer.data.classes)
        return fitting(name, model, counts, tuned.arch.resolution, own_pixels(tuned.arch), pixels_of(student))

    def try_teacher(self, candidate: Candidate, name: str, epochs: int, label: str) -> tuple[Accuracy, Accuracy, float]:
        """Train a pretrained network on the search's own split, with a teacher and without.

        Returns:
            What both are judged, and the seconds that they trained.

        Raises:
            TrainingError: the loss is no longer finite. UserError: as `find_teacher`.
        """
        teacher = self.find_teacher(name, candidate)  # where there is none, nothing is trained
        images, judges = self._split(candidate)
        recipe, stem = self.recipe(epochs, candidate), f"teaching-{candidate.key[:16]}-{epochs}-{text_digest(name)}"
        folder, seconds = self.trainer.folder / stem, 0.0
        first = self._start(candidate, images).state_dict()

        def judged(what: str, teacher: nn.Module | None) -> Accuracy:
            nonlocal seconds
            folder.mkdir(parents=True, exist_ok=True)
            training = self.begin(candidate, images, recipe, self.trainer.seed, folder / what, first, teacher)
            told = f"trying the teacher {name} on {label}, {what} it"
            try:
                training.run(None, lambda done, total, _: self.trainer.progress(told, done, total))
            finally:
                training.loader.close()
            seconds += sum(row["seconds"] for row in training.history)
            return self.trainer.judge(training.network, judges)

        alone, taught = judged("without", None), judged("by", teacher)
        shutil.rmtree(folder, ignore_errors=True)
        return taught, alone, seconds

    def _start(self, candidate: Candidate, images: Images) -> nn.Module:
        """A pretrained network of the user's classes, before any epoch.

        Args:
            images: what the linear probe of a ready one is fitted to. What else is chosen is chosen without them, on
                the search's own split: in a final training they include the images that judge.
        """
        if candidate.kind == Kind.DERIVED:
            return self._cut(candidate)
        model = self._own(candidate)
        if self._restated_is_better(candidate):
            self._restate(model, candidate)
        give_probe(model, images, self.trainer, pixels_of(candidate))
        return model

    def _own(self, candidate: Candidate) -> nn.Module:
        """A ready network with its weights."""
        return with_weights(candidate.network, self.trainer.weights.get(candidate.network).path)

    def _restated_is_better(self, candidate: Candidate) -> bool:
        """Whether a probe on a ready network is better with BatchNorm's statistics of the user's images."""
        if candidate.key not in self._restates:
            given = self._own(candidate)
            restated = copy.deepcopy(given)
            self._restate(restated, candidate)
            self._restates[candidate.key] = self._probed(restated, candidate)[1] > self._probed(given, candidate)[1]
        return self._restates[candidate.key]

    def _cut(self, candidate: Candidate) -> nn.Module:
        """A network cut from its parent as the search tuned it; with its layers refitted to what they wrote there, and
        with a linear probe for a new classifier, where each is better, which is kept in `_repairs`."""
        from search_spaces import create_model

        judges = self._split(candidate)[1]
        weights = self.parents.child(candidate.arch, candidate.parent, self.trainer.seed)
        best, repaired = (create_model(candidate.arch) for _ in range(2))
        best.load_state_dict(weights)
        repaired.load_state_dict(self.parents.repaired(candidate.arch, candidate.parent, weights))
        top1, other = (self.trainer.judge(each, judges).top1 for each in (best, repaired))
        refitted = other > top1
        if refitted:
            best, top1 = repaired, other
        probed, with_probe = self._probed(best, candidate)
        self._repairs[candidate.key] = refitted, with_probe > top1
        return probed if with_probe > top1 else best

    def _cut_fully(self, candidate: Candidate, images: Images, recipe: Recipe, seed: int, folder: Path) -> nn.Module:
        """A network as `_cut` makes it, but from its parent tuned on all of a training's images, none held out. What
        `_cut` chooses, and which units are kept, is what the search found on its own split.

        Args:
            recipe: of the network; its parent has its epochs and augmentation.
        """
        from search_spaces import create_model

        if candidate.key not in self._repairs:
            self._cut(candidate)
        refitted, probed = self._repairs[candidate.key]
        parent = self._parent_fully(candidate, images, recipe, seed, folder)
        weights = self.parents.child(candidate.arch, candidate.parent, seed, parent)
        if refitted:
            weights = self.parents.repaired(candidate.arch, candidate.parent, weights, parent)
        model = create_model(candidate.arch)
        model.load_state_dict(weights)
        if probed:
            give_probe(model, images, self.trainer, pixels_of(candidate))
        return model

    def _parent_fully(self, child: Candidate, images: Images, like: Recipe, seed: int, folder: Path) -> Parent:
        """A parent trained as a ready network is at the end, or left as that begins where the search left it so; read
        where the folder has it. Children share it."""
        from safetensors.torch import load_file

        from nas.export.folder import save_weights

        px, epochs, pays = child.network.resolution, like.epochs, self.parent_tuning_pays(child)
        tuned = self.parents.tuned(child.parent, px)
        path = folder / f"{full_stem(child.parent, px, epochs)}{seed}.json"
        weights, state = path.with_suffix(".safetensors"), path.with_suffix(".state")
        with alone_with(path, self.trainer):
            if Tuned.read(path) is None or not weights.is_file():
                candidate, began = Candidate(tuned.arch, Kind.READY, name=child.parent), time.monotonic()
                own = self.recipe(epochs, candidate)
                recipe = replace(own, augmentation=like.augmentation, blend=like.blend)
                training = self.begin(candidate, images, recipe, seed, state)
                what = f"tuning the parent {child.parent} on all images, seed {seed}"
                try:
                    if pays:
                        self.trainer.run_fully(training, what)
                finally:
                    training.loader.close()
                save_weights(training.network, weights)
                digest, seconds = self.trainer.weights.get(tuned.arch).digest, time.monotonic() - began
                found = Tuned(
                    child.parent, px, digest, len(images), 0, lr=recipe.lr, epochs=epochs * pays, seconds=seconds
                )
                kept = asdict(found) | {"crops": recipe.augmentation.scale}
                replace_file(path, json.dumps(kept).encode())
                state.unlink(missing_ok=True)
            return replace(tuned, weights=load_file(weights))

    def _restate(self, model: nn.Module, candidate: Candidate) -> None:
        """Take BatchNorm's statistics from images that candidates train on."""
        from nas.data.batches import loader
        from nas.data.images import sample
        from nas.training.statistics import take_statistics

        trainer = self.trainer
        some = sample(self._split(candidate)[0], RESTATED, trainer.seed)
        plain = trainer.plain(some, candidate.network.resolution, pixels_of(candidate))
        before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_var")}
        take_statistics(model, loader(plain, BATCH, shuffle=True, seed=trainer.seed), trainer.device)
        for name, value in model.named_buffers():
            if name in before:
                value.clamp_(min=LEAST_VARIANCE * before[name].to(value.device))

    def _probed(self, model: nn.Module, candidate: Candidate) -> tuple[nn.Module, float]:
        """A copy with a linear probe on some images that candidates train on, and its top-1 on those that judge."""
        images, judges = self._split(candidate)
        probed = copy.deepcopy(model)
        give_probe(probed, self._some(images), self.trainer, pixels_of(candidate))
        return probed, self.trainer.judge(probed, judges).top1

    def _some(self, images: Images) -> Images:
        """The images that rung 0 fits a probe to: of each class its share."""
        from nas.data.images import hold_out

        count = max(PROBED, PROBED_OF_CLASS * len(self.trainer.data.classes))
        return images if len(images) <= count else hold_out(images, count, self.trainer.seed)[1]

    def _split(self, candidate: Candidate) -> tuple[Images, Images]:
        return self.trainer.split(candidate.network.resolution, pixels_of(candidate))

    def _rungs(self, candidate: Candidate, folder: Path) -> Iterator[tuple[int, Arch | TimmNetwork, nn.Module, Images]]:
        """From a linear probe to the last rung."""
        if candidate.kind == Kind.SCRATCH:
            yield from super()._rungs(candidate, folder)
            return
        images, judges = self._split(candidate)
        network, seed = candidate.network, self.trainer.seed
        first = self._start(candidate, self._some(images))
        yield 0, network, first, judges
        weights = copy.deepcopy(first.state_dict()) if candidate.kind == Kind.DERIVED else None
        recipe = self.recipe(self.epochs, candidate)
        training = self.begin(candidate, images, recipe, seed, folder / "whole", weights)
        for epochs in self.trainer.rungs:
            yield epochs, network, self._until(training, epochs), judges

    def _screens(self, candidate: Candidate) -> bool:
        """Whether its first rung costs a training."""
        return candidate.kind == Kind.SCRATCH

    def _goes_on(self, kind: Kind, surrogate: Surrogate, guess: Guess, epochs: int) -> bool:
        """The better third goes on, and the first of each kind, which shows what its kind gains."""
        further = [each for each in surrogate.trained if max(each.rungs) > epochs]
        first = all(kind_of(each.features) != kind for each in further)
        return first or super()._goes_on(kind, surrogate, guess, epochs)

    def _how(self, rungs: Rungs, features: np.ndarray) -> str:
        if rungs and max(rungs) == 0:
            return "linear probe" if kind_of(features) == Kind.READY else "just cut"
        return super()._how(rungs, features)


def full_stem(name: str, px: int, epochs: int) -> str:
    """How the files of a parent that is tuned for final trainings are called, before the seed."""
    return f"parent-{name}-{px}px-{epochs}-seed"


def lower_rate(lr: float) -> float:
    """The next lower of the recipe's rates, for a network whose parent was tuned with one. Children of EfficientViT-M1
    gained +0.7 and -0.6 points in three epochs with 3e-4 and 1e-3 after a cut that cost nothing, +2.9 and +3.9 after
    one that cost 13 points."""
    from nas.training.recipes import FINETUNE

    return max((rate for rate in FINETUNE.rates if rate < lr), default=lr)


def pixels_of(candidate: Candidate) -> Pixels:
    """How a candidate's images are prepared: as its weights want it; ImageNet's from scratch."""
    if candidate.kind == Kind.SCRATCH:
        return IMAGENET
    return own_pixels(candidate.network if candidate.kind == Kind.READY else get_arch(candidate.parent))
