"""What a training settles before its first epoch: a linear probe, the learning rate, and how many epochs fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, Literal

from nas.errors import TrainingError
from nas.training.course import Course, Held, Probed, Trial
from nas.training.holdout import HELD
from nas.training.processes import agreed
from nas.training.rates import choose_trial, speaks_for_tuning
from nas.training.recipes import tuning_epochs
from nas.units import counted

if TYPE_CHECKING:
    from torch import nn

    from nas.data.batches import Batch
    from nas.data.images import Images
    from nas.job import Job
    from nas.training.engine import Training
    from nas.training.inputs import TrainInputs
    from nas.training.probe import Features, Probe
    from nas.training.recipes import Recipe
    from nas.training.request import TrainRequest

START = "start.safetensors"
"""In the folder's state: the network as its fine-tuning begins."""
TIMED = 10
"""Updates of which --minutes learns how long an epoch takes; the first of them are not timed."""
WARMUP = 2
JUDGING = 1 / 3
"""Of the time that an image takes in training, what it takes to judge one: there is no way back."""
JUDGED_AT_ONCE = 256
COMPARED = 500
"""Images that BatchNorm's statistics are compared on, at most."""
TRIED = 3000
"""Images that a trial of a learning rate trains on, at most."""


Brief = Callable[["nn.Module", "Recipe", "Images"], "Training"]
"""Gives a training of a network by a recipe on images, without checkpoint and judging."""
End = Literal["done", "failed", "interrupted"]
"""How a training ends."""


@dataclass
class Preparation:
    """The steps before the first epoch, each of which is kept and so done once, and the choice after the last."""

    request: TrainRequest
    inputs: TrainInputs
    job: Job
    course: Course
    device: str
    rank: int
    """Of this process; the first one writes."""
    note: Callable[[str], None]
    stop: Callable[[], bool]
    skipped: list[str] = field(default_factory=list)
    """Names of images that could not be used."""

    @property
    def images(self) -> Images:
        """Those that the network is tuned on."""
        images = self.inputs.data.train if self.course.whole else self.inputs.train
        if self.course.crops is None:
            return images
        augmentation = replace(self.request.recipe.augmentation, scale=self.course.crops)
        return images.transformed(self.inputs.data.at(self.inputs.network.resolution, augmentation).train.transform)

    def keep(self) -> None:
        if self.rank == 0:
            self.job.state.found["course"] = self.course.to_json()
            self.job.save()

    # Probe

    def probe(self, model: nn.Module, own_head: bool) -> None:
        """Give a network re-estimated statistics and the head of a linear probe, or what it was given before.

        own_head: whether its own head is trained for as many classes; then the better of the two stays.
        """
        from safetensors.torch import load_file

        from nas.export.folder import save_weights

        kept = self.job.kept / START
        if agreed(self.course.probe is not None and kept.is_file()):
            model.load_state_dict(load_file(kept))
            return
        if self.rank == 0:
            self._fit_probe(model, own_head)
            save_weights(model, kept)
            self.keep()
        state, self.course.probe = agreed((model.state_dict(), self.course.probe))
        model.load_state_dict(state)

    def _fit_probe(self, model: nn.Module, own_head: bool) -> None:
        from nas.training.probe import install

        began = monotonic()
        before = copy.deepcopy(model.state_dict()) if own_head else None
        own = self.judge(model) if own_head else None
        plain, apart = self.inputs.plain, len(self.inputs.held) > 0
        images = self._for_probe(model, plain)
        features, retaken = self._better_features(model, images)
        probe = self._fit(features)
        install(model, probe)
        found = probe.held_out
        held = None if found is None else Held(top1=found.top1, top1_ci=found.interval, images=found.images)
        if apart:
            with self.job.phase("probe"):
                held = self.judge(model)
        seconds = monotonic() - began
        accuracy = f"{held}, of {HELD}" if held else "no class has an image to hold out"
        some = f"; fitted to {len(images):,} of {len(plain):,} images" if len(images) < len(plain) else ""
        self.note(f"linear probe on the frozen network: {accuracy}{some}; {seconds:.0f} s")
        stays = own is not None and (held is None or own.top1 >= held.top1)
        if own is not None:
            judged = f"{own}, of {HELD}" if apart else f"{own}, of images that it may have been trained on"
            given = "; BatchNorm's statistics stay the given ones, too" if stays and retaken else ""
            self.note(f"its own classifier {'stays' if stays else 'is replaced'}: {judged}{given}")
        if before is not None and stays:
            model.load_state_dict(before)
            held = own if apart else None
        self.course.probe = Probed(held=held, own_head=stays, strength=probe.strength, seconds=seconds)

    def _features(self, model: nn.Module, images: Images) -> Features:
        from nas.training.probe import find_features

        with self.job.phase("probe") as taken:
            batches = self._batches(images)
            return find_features(model, batches, self.device, progress=lambda done: taken(done, len(images)))

    def _for_probe(self, model: nn.Module, images: Images) -> Images:
        """As many of the images as a probe is fitted to."""
        from nas.data.images import sample
        from nas.training.probe import most_images

        return sample(images, most_images(model, len(self.inputs.data.classes)), self.request.seed)

    def _fit(self, features: Features) -> Probe:
        from nas.training.probe import fit_probe

        with self.job.phase("fitting the probe") as fitted:

            def step(done: int, most: int) -> None:
                if self.stop():
                    raise KeyboardInterrupt
                fitted(done, most)

            classes = len(self.inputs.data.classes)
            return fit_probe(features.values, features.labels, classes, self.request.seed, step)

    def _better_features(self, model: nn.Module, images: Images) -> tuple[Features, bool]:
        """Features of plain images, with BatchNorm's statistics taken again where a probe on some of these is better
        for it; and whether they are."""
        from nas.data.images import sample_first
        from nas.training.probe import Features
        from nas.training.statistics import take_statistics

        images = sample_first(images, COMPARED, self.request.seed)
        features = self._features(model, images)
        some = images.pick(list(range(min(COMPARED, len(images)))))
        other = copy.deepcopy(model)
        with self.job.phase("probe"):
            taken = take_statistics(other, self._batches(some, shuffle=True), self.device)
        if not taken:
            return features, False
        retaken = self._features(other, some)
        count = len(retaken.labels)
        given = Features(features.values[:count], features.labels[:count])
        own, theirs = self._fit(given).held_out, self._fit(retaken).held_out
        if own is None or theirs is None:
            return features, False
        better = theirs.loss < own.loss and theirs.top1 > own.top1
        self.note(
            f"BatchNorm's statistics {'are taken from these images' if better else 'stay the given ones'}: a probe on "
            f"{count:,} images has {theirs.top1:.1f}% with those of these images, {own.top1:.1f}% with the given"
        )
        if better:
            model.load_state_dict(other.state_dict())
            features = self._features(model, images)
        return features, better

    def _batches(self, images: Images, shuffle: bool = False) -> Iterator[Batch]:
        from nas.data.batches import loader

        request = self.request
        at_once = min(JUDGED_AT_ONCE, request.recipe.batch_size)
        batches = loader(images, at_once, shuffle=shuffle, seed=request.seed, workers=request.workers)
        yield from self.until_stopped(batches)
        self.skipped += batches.skipped

    def judge(self, network: nn.Module) -> Held:
        """Accuracy on the held-out images or, where there are none, on those for training."""
        from nas.training.evaluation import evaluate

        images = self.inputs.held if len(self.inputs.held) else self.inputs.plain
        found = evaluate(network, self._batches(images), self.device, self.note)
        return Held(top1=found.top1, top1_ci=found.interval, images=found.total)

    def until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.stop():
                raise KeyboardInterrupt
            yield batch

    def choose(self, tuned: nn.Module | None, end: End) -> None:
        """Keep the tuned network, unless the one that it began as is better.

        Where it was trained on the held-out images too, these only tell that nothing went wrong: what an interruption
        leaves is said to be uncertain, and what a failure leaves is not kept.

        Args:
            tuned: None where no epoch is done.
        """
        assert self.course.probe is not None
        before = self.course.probe.held
        assert before is not None
        self.course.tuned, self.course.kept = None, "probe"
        if tuned is None:
            self.note("the probe is kept: no epoch of tuning was finished")
        elif self.course.whole and end == "failed":
            self.job.say(f"the probe is kept: the tuning failed, and was on the {HELD} too")
        else:
            with self.job.phase("choosing"):
                self.course.tuned = after = self.judge(tuned)
            self.course.kept = "tuned" if after.top1 >= before.top1 else "probe"
            kept = self.course.kept == "tuned"
            words = "tuned network is kept" if kept else "probe is kept, the tuned network is worse"
            since = ", on which it was trained since" if self.course.whole else ""
            self.note(f"{words}: {after.top1:.1f}% of {HELD}{since}, the probe {before.top1:.1f}%")
            if kept and self.course.whole and end == "interrupted":
                self.job.say("it was interrupted: nothing tells yet whether it is better than the probe")
        self.keep()

    def first(self, like: nn.Module, ended: bool = True) -> nn.Module:
        """The network that the tuning began with, its probe fitted to all images for training, now that nothing is left
        to choose. like: one of the same kind. ended: False: its probe stays as it was."""
        from safetensors.torch import load_file

        network = copy.deepcopy(like).cpu()
        network.load_state_dict(load_file(self.job.kept / START))
        probe = self.course.probe
        if ended and probe is not None and not probe.own_head and not self.course.whole:
            self._fit_to_all(network)
            self.note("the probe is fitted once more, to the held-out images too")
        return network

    def _fit_to_all(self, model: nn.Module) -> None:
        """Make a probe that is fitted to all images for training its classifier."""
        from nas.training.probe import install

        plain = self.inputs.data.train.transformed(self.inputs.data.calibration.transform)
        install(model, self._fit(self._features(model, self._for_probe(model, plain))))

    # Learning rate

    def try_rates(self, model: nn.Module, recipe: Recipe, brief: Brief, taught: Brief | None) -> None:
        """Train briefly with each of the recipe's rates, and see on the held-out images whether a teacher helps and
        whether tuning pays: then it is to be on all images, and begins with a probe that is fitted to all.

        taught: `brief` with a teacher; None without one.
        """
        from nas.data.images import sample
        from nas.export.folder import save_weights

        images = sample(self.inputs.train, TRIED, self.request.seed)
        for lr in recipe.rates[len(self.course.trials) :]:
            trial = brief(*_one_epoch(model, recipe, lr), images)
            with self.job.phase(f"trying the learning rate {trial.recipe.peak_lr:g}") as progress:
                self.course.trials.append(self._try(trial, progress))
            self.keep()
        trials = self.course.trials
        chosen = choose_trial(trials, self.course.epochs or recipe.epochs)
        if taught is not None and self.course.taught is None:
            lr = recipe.rates[trials.index(chosen)]
            with self.job.phase("trying the teacher") as progress:
                self.course.taught = self._try(taught(*_one_epoch(model, recipe, lr), images), progress)
            self.keep()
        if self.course.taught is not None and self.course.teaches:
            chosen = self.course.taught
        probe = self.course.probe
        assert probe is not None
        assert probe.held is not None
        whole = speaks_for_tuning(chosen, probe.held)
        if whole and not probe.own_head:
            if self.rank == 0:
                self._fit_to_all(model)
                save_weights(model, self.job.kept / START)
            model.load_state_dict(agreed(model.state_dict()))
        self.course.whole = whole
        self.keep()

    def _try(self, trial: Training, progress: Callable[..., None]) -> Trial:
        try:
            trial.run(1, progress, self.stop)
            found = self.judge(trial.network) if self.rank == 0 else None
        except TrainingError:
            found = Held(top1=0.0, top1_ci=(0.0, 0.0), images=len(self.inputs.held))
        held = agreed(found)
        assert held is not None
        return Trial(lr=trial.recipe.peak_lr, top1=held.top1, top1_ci=held.top1_ci, images=held.images)

    def choose_rate(self, recipe: Recipe, epochs: int) -> None:
        """Keep the one of the recipe's rates that the trials speak for."""
        course = self.course
        best = choose_trial(course.trials, epochs)
        told = ", ".join(
            f"{trial.lr:g} {f'{trial.top1:.1f}%' if trial.top1_ci[1] else 'diverged'}" for trial in course.trials
        )
        self.note(f"learning rate {best.lr:g}, chosen by short trials on {HELD} ({told})")
        if taught := course.taught:
            (other,) = (trial for trial in course.trials if trial.lr == taught.lr)
            self.note(
                f"the teacher {'helps' if course.teaches else 'does not help and is left out'}: "
                f"{taught.top1:.1f}% of {HELD} in a short trial with it, {other.top1:.1f}% without"
            )
        trial = "the trial with the teacher" if taught and course.teaches else "the trial of that rate"
        assert course.probe is not None
        assert course.probe.held is not None
        probe = f"the probe ({course.probe.held.top1:.1f}% of {course.probe.held.images:,})"
        self.note(
            f"{trial} is not below {probe} by more than a standard error: trained on all {len(self.images):,} images, "
            "those held out too"
            if course.whole
            else f"{trial} is no sure sign that tuning pays, beside {probe}: the images held out stay so, and choose"
        )
        course.lr = recipe.rates[course.trials.index(best)]
        self.keep()

    # Length

    def suit_length(self, epochs: int) -> None:
        """Where the tuning is a long one, crop more of each image, and keep some of the weights that it begins with."""
        recipe = replace(self.request.recipe, epochs=epochs)
        gentle, crops, blend = recipe.augmentation.scale, recipe.tuning_crops, recipe.tuning_blend
        if crops < gentle and not self.inputs.data.demo:
            self.course.crops = crops
            self.note(f"{epochs} epochs: random crops keep at least {crops:.0%} of an image's area, not {gentle:.0%}")
        if blend < recipe.blend:
            self.course.blend = blend
            self.note(
                f"{epochs} epochs: the tuned network is {blend:.0%} of the weights learnt and {1 - blend:.0%} of those "
                "that the tuning begins with"
            )
        self.keep()

    # Epochs

    def epochs_by_images(self) -> None:
        """Find how many epochs suit the number of images."""
        images = len(self.inputs.data.train)
        self.course.epochs = tuning_epochs(images)
        self.note(f"{counted(self.course.epochs, 'epoch')}, as there are {counted(images, 'image')} for training")
        self.keep()

    def choose_epochs(self, minutes: float, trial: Training) -> None:
        """Find how many epochs fit, by the pace of some updates of a training that is then thrown away."""
        times = [monotonic()]
        with self.job.phase("timing"):
            try:
                trial.run(1, lambda *_: times.append(monotonic()), lambda: len(times) > TIMED or self.stop())
            except KeyboardInterrupt:
                if len(times) <= TIMED:
                    raise
        warm = min(WARMUP, len(times) - 2)
        of_image = agreed((times[-1] - times[warm]) / (len(times) - 1 - warm) / trial.images)
        without_labels = trial.count - len(self.inputs.train) if self.course.teaches else 0
        updates = (len(self.images) + without_labels) // trial.images
        epoch = of_image * (updates * trial.images + JUDGING * len(self.inputs.data.val))
        left = 60 * minutes - agreed(sum(self.job.state.phases.values()))
        self.course.epochs = max(1, int(left / epoch))
        late = f", and ends about {epoch - left:.0f} s after that time" if epoch > left else ""
        self.note(f"--minutes {minutes:g}: {counted(self.course.epochs, 'epoch')}, one takes about {epoch:.0f} s{late}")
        self.keep()


def _one_epoch(model: nn.Module, recipe: Recipe, lr: float) -> tuple[nn.Module, Recipe]:
    return copy.deepcopy(model), replace(recipe, epochs=1, lr=lr)
