"""The tier that trains: successive halving on a fixed part of the user's images, judged on images held out from it.

A network is trained for a ninth of the epochs, the better third of all go on to a third of them, and the better third
of those to the end. What a short training says is weighed by the surrogate, which also leaves out networks whose
prediction plus its error is below the best. The first epochs of a large network are trained at half its resolution.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import FiniteFloat, TypeAdapter

from nas.files import read_kept, replace_file
from nas.intervals import of_share
from nas.quality.kept import Kept, keep
from nas.quality.scale import with_noise
from nas.quality.surrogate import Guess, Rungs, Surrogate, TrainedNetwork, describe_candidate
from nas.quality.tier import Estimate, TrainedTier, with_training
from nas.quality.trainer import ETA
from nas.training.course import Held
from nas.training.rates import standard_error
from nas.units import counted

if TYPE_CHECKING:
    from torch import nn

    from nas.data.images import Images
    from nas.networks.counts import Counts
    from nas.networks.timm_network import TimmNetwork
    from nas.quality.candidate import Candidate, Kind
    from nas.quality.trainer import CandidateTrainer
    from nas.training.engine import Training
    from search_spaces import Arch

SCREEN_FROM = 8
"""Networks trained before any is left out untrained."""
DOUBT = 2
"""Standard errors that a network must lose by tuning to be left as it began: few images judge."""
LOW_FROM = 128
"""Resolution from which the first epochs are trained at half of it."""


class HalvingTier(TrainedTier):
    """See the module. `estimate` trains; `predict` asks the surrogate alone."""

    name = "train"
    label = "score (train: top-1 estimated on your images, after the search's last rung of training)"

    def __init__(self, trainer: CandidateTrainer) -> None:
        super().__init__(trainer)
        rungs = ", ".join(map(str, trainer.rungs))
        self.note = (
            f"Candidates were trained up to {rungs} epoch{'s' * (rungs != '1')} of {trainer.used:,} of your training "
            "images and judged on others held out from training; estimates are for "
            f"{counted(self.epochs, 'epoch')} of that and serve to rank."
        )

    def predict(self, candidate: Candidate, counts: Counts) -> Estimate:
        """The surrogate's prediction."""
        return self._weighed(self.surrogate(), candidate.key, describe_candidate(candidate, counts))

    def estimate(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Train a network as far as the halving lets it go.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        key, features, surrogate = candidate.key, describe_candidate(candidate, counts), self.surrogate()
        known = surrogate.trained
        if any(each.key == key for each in known):
            return self._weighed(surrogate, key, features)
        if len(known) >= SCREEN_FROM and self._screens(candidate):
            best, guess = (
                max(surrogate.predict(each.features, each.key).value for each in known),
                surrogate.predict(features),
            )
            if guess.value + guess.error < best:
                return self._weighed(surrogate, key, features)
        return self._train(candidate, features, known, partial(self._goes_on, candidate.kind))

    def early(self, candidate: Candidate, counts: Counts, rungs: Mapping[int, float]) -> Estimate:
        """What `estimate` would say after the first of these rungs."""
        key, features = candidate.key, describe_candidate(candidate, counts)
        known = [each for each in self.trainer.results() if each.key != key]
        if rungs:
            known.append(TrainedNetwork(key, features, {min(rungs): rungs[min(rungs)]}))
        return self._weighed(self._fitted(known), key, features)

    def complete(self, candidate: Candidate, counts: Counts, keeps: bool = True) -> Estimate:
        """Train a network to the last rung. keeps: it is a candidate, whose weights may be wanted."""
        others = [each for each in self.trainer.results() if each.key != candidate.key]
        return self._train(candidate, describe_candidate(candidate, counts), others, lambda *_: True, keeps)

    def review(self, networks: Sequence[tuple[str, Sequence[float]]]) -> list[Estimate]:
        """Estimates by all trainings so far of networks by digest and features."""
        surrogate = self.surrogate()
        return [self._weighed(surrogate, key, np.asarray(features)) for key, features in networks]

    def held_out(self) -> tuple[float, float | None] | None:
        """See `Surrogate.held_out`."""
        return self.surrogate().held_out()

    def _screens(self, candidate: Candidate) -> bool:
        """Whether a network may be left out without its first rung, because that costs a training."""
        return True

    def _goes_on(self, kind: Kind, surrogate: Surrogate, guess: Guess, epochs: int) -> bool:
        """Whether a network that has been trained for so many epochs is trained for more."""
        return in_better_third(surrogate, guess, epochs)

    def _train(
        self,
        candidate: Candidate,
        features: np.ndarray,
        others: Sequence[TrainedNetwork],
        goes_on: Callable[[Surrogate, Guess, int], bool],
        keeps: bool = True,
    ) -> Estimate:
        begun, key = time.monotonic(), candidate.key
        folder = self.trainer.folder / key[:16]
        path = folder / "rungs.json"
        judged = read_rungs(path)
        rungs: dict[int, float] = {}
        untuned = None
        for epochs, shape, network, judges in self._rungs(candidate, folder):
            if epochs not in judged:
                judged[epochs] = self.trainer.judge(network, judges).top1
                folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps(judged).encode())
            untuned = network if epochs == 0 else untuned
            worse = untuned is not None and judged[epochs] < judged[0] - self._doubt(judged[0])
            rungs[epochs] = judged[0 if worse else epochs]
            last = untuned if worse else network if shape == candidate.network else None  # of a lower resolution: none
            surrogate = self._fitted([*others, TrainedNetwork(key, features, dict(rungs))])
            guess = surrogate.predict(features, key)
            if not goes_on(surrogate, guess, epochs):
                break
        if keeps and last is not None:
            scores = {
                each.key: self._bounded(surrogate.predict(each.features, each.key)).score for each in surrogate.trained
            }
            facts = Kept(0 if worse else epochs, self.trainer.used, rungs[epochs], self.trainer.judged, scores[key])
            keep(self.trainer.kept, key, last, facts, scores)
        shutil.rmtree(folder, ignore_errors=True)
        tuned = None if untuned is None or epochs == 0 else not worse
        return with_training(
            self._bounded(guess), self._how(rungs, features), features, rungs, time.monotonic() - begun, tuned
        )

    def _rungs(self, candidate: Candidate, folder: Path) -> Iterator[tuple[int, Arch | TimmNetwork, nn.Module, Images]]:
        """Train from rung to rung: epochs, what the network is there and itself, and the images that judge it."""
        trainer, arch = self.trainer, candidate.arch
        low, done = low_resolution(arch), 0
        weights = None
        if low is not None and len(trainer.rungs) > 1:
            from pruning.transfer import transfer

            small, done = arch.at(low), trainer.rungs[0]
            images, judges = trainer.split(low)
            training = self.begin(
                replace(candidate, network=small), images, self.recipe(self.epochs), trainer.seed, folder / "low"
            )
            yield done, small, self._until(training, done), judges
            weights = transfer(small, training.network.state_dict(), arch)
        images, judges = trainer.split(arch.resolution)
        training = self.begin(
            candidate, images, self.recipe(self.epochs - done), trainer.seed, folder / "whole", weights
        )
        for epochs in trainer.rungs:
            if epochs > done:
                yield epochs, arch, self._until(training, epochs - done), judges

    def _until(self, training: Training, epochs: int) -> nn.Module:
        before = self.epochs - training.recipe.epochs  # at a lower resolution

        def progress(done: int, total: int, _: float) -> None:
            self.trainer.progress(f"training, epoch {before + training.epoch + 1}/{self.epochs}", done, total)

        try:
            training.run(epochs, progress)
        finally:
            training.loader.close()
        return training.network

    def _weighed(self, surrogate: Surrogate, key: str, features: np.ndarray) -> Estimate:
        """A network's estimate, with its own training where it had one."""
        own = next((each.rungs for each in surrogate.trained if each.key == key), {})
        return with_training(self._bounded(surrogate.predict(features, key)), self._how(own, features), features, own)

    def _bounded(self, guess: Guess) -> Estimate:
        """A guess as an estimate, whose interval also holds the noise of the images that judged."""
        noise = of_share(guess.value, self.trainer.judged)
        return Estimate.within(guess.value, guess.error, with_noise(guess.value, guess.error, noise))

    def _doubt(self, top1: float) -> float:
        """`DOUBT` standard errors, in points, of a top-1 in percent on the images that judge."""
        return DOUBT * standard_error(Held(top1=top1, top1_ci=(0, 100), images=self.trainer.judged))

    def _how(self, rungs: Rungs, features: np.ndarray) -> str:
        """Where a network's estimate comes from, in words."""
        if not rungs:
            return "predicted from others' trainings"
        return f"trained {max(rungs)} of {counted(self.epochs, 'epoch')}"


def read_rungs(path: Path) -> dict[int, float]:
    """Top-1 in percent by epochs of a training that was interrupted, as its rungs.json has it; {} without the file.

    Raises:
        UserError: the file is damaged.
    """
    return read_kept(path, TypeAdapter(dict[int, FiniteFloat]), "and the network is judged again") or {}


def in_better_third(surrogate: Surrogate, guess: Guess, epochs: int) -> bool:
    """Whether a network is in the better third of those that came as far, by the surrogate fitted to all."""
    peers = [surrogate.predict(each.features, each.key).value for each in surrogate.trained if epochs in each.rungs]
    return sum(value > guess.value for value in peers) < math.ceil(len(peers) / ETA)


def low_resolution(arch: Arch) -> int | None:
    """Half an Arch's resolution, in steps of 32 px from 64 up; None where that is not worth it."""
    return max(64, arch.resolution // 64 * 32) if arch.resolution >= LOW_FROM else None
