"""What trainings so far say of a network that was trained less, or not at all: a Gaussian process.

It relates top-1 to a network's size and shape and to the epochs it was trained, so that a network's own short training
and those of others like it weigh in together. A short training counts with what others still gained after as many
epochs, and with the spread of that as its doubt. The error is measured: every network is left out once.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from nas.networks.counts import Counts
from search_spaces import Arch
from search_spaces.registry import FAMILIES

LEAST = 3
"""Networks below which nothing is fitted: the mean and spread of what there is stand in."""
SEED_NOISE = 0.9
"""Points of top-1: two seeds of one network differed by 1.0 on average (8 small networks, CIFAR-10, 6 epochs)."""
GAIN_SPREAD = 0.1
"""How far a gain from rung to rung differs between networks, as a share of it, until the trainings show it."""
WIDE = 15.0
"""Standard deviation in points where there is nothing to learn from."""

Rungs = Mapping[int, float]
"""Top-1 in percent by epochs trained."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A network's features and what its training showed."""

    key: str
    features: np.ndarray
    rungs: Rungs


def describe(arch: Arch, counts: Counts) -> np.ndarray:
    """Features (13,): log2 of parameters, MACs, width, depth, qk width and resolution; share of attention, FFN ratio
    and keep rate as means over blocks; and which of the families it is."""
    stages = arch.summary()
    depth = np.array([stage.depth for stage in stages], dtype=float)

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=depth))

    return np.array(
        [
            np.log2(counts.params),
            np.log2(counts.macs),
            mean([np.log2(stage.embed_dim) for stage in stages]),
            np.log2(depth.sum()),
            mean([np.log2(1 + stage.heads * stage.key_dim) for stage in stages]),
            mean([stage.attention_share for stage in stages]),
            mean([stage.ffn_ratio for stage in stages]),
            mean([stage.keep_rate for stage in stages]),
            np.log2(arch.resolution),
            *(float(arch.family == name) for name in FAMILIES),
        ]
    )


@dataclass(frozen=True)
class Guess:
    """Top-1 in percent, which may lie outside of 0 to 100 where nothing like the network was trained; error: one
    standard deviation."""

    value: float
    error: float


class Surrogate:
    """Fitted to networks trained to various epochs; predicts top-1 after `epochs`. noise: the least standard deviation
    of a result, what another seed would change."""

    def __init__(self, trained: Sequence[TrainedNetwork], epochs: int, noise: float = SEED_NOISE) -> None:
        self.noise = noise
        self.trained = [each for each in trained if each.rungs]
        self.epochs = epochs
        if len(self.trained) >= LEAST:
            self._fit()

    def predict(self, features: np.ndarray) -> Guess:
        """Top-1 after `epochs` of a network trained once.

        For a network among those it was fitted to, its own training counts. Without enough networks it is their mean.
        """
        if len(self.trained) < LEAST:
            best = [max(each.rungs.values()) for each in self.trained]
            return Guess(float(np.mean(best)) if best else 0.0, WIDE)
        mean, deviation = self._process.predict(self._scaled(features[None], [self.epochs]), return_std=True)
        error = float(np.hypot(deviation[0] * self._spread, self.noise))
        return Guess(float(mean[0]) * self._spread + self._centre, error)

    def held_out(self) -> tuple[float, float] | None:
        """Mean absolute error in points, and Kendall's tau, of top-1 after `epochs` predicted for every network that
        was trained so long, from all others; None with fewer than `LEAST` such networks."""
        full = [i for i, each in enumerate(self.trained) if self.epochs in each.rungs]
        if len(full) < LEAST or len(self.trained) <= LEAST:
            return None
        found, wanted = [], []
        gram = self._process.kernel_(self._inputs)
        gram[np.diag_indices_from(gram)] += self._process.alpha
        for i in full:
            rest = self._owner != i
            here = np.flatnonzero((self._owner == i) & self._is_full)
            weights = np.linalg.solve(gram[np.ix_(rest, rest)], self._targets[rest])
            found.append(float((gram[np.ix_(here, rest)] @ weights)[0]))
            wanted.append(float(self._targets[here][0]))
        error = float(np.mean(np.abs(np.subtract(found, wanted)))) * self._spread
        tau = float(kendalltau(found, wanted).statistic) if len(set(wanted)) > 1 else float("nan")
        return error, tau

    def _fit(self) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

        rows = [(i, each.features, e, top1) for i, each in enumerate(self.trained) for e, top1 in each.rungs.items()]
        self._owner = np.array([i for i, *_ in rows])
        self._is_full = np.array([e == self.epochs for _, _, e, _ in rows])
        features = np.array([f for _, f, _, _ in rows])
        self._middle = features.mean(0)
        scale = features.std(0)
        self._scale = np.where(scale > 1e-9, scale, np.inf)
        gains = self._gains()
        values = np.array([top1 + gains[e][0] for _, _, e, top1 in rows])
        self._centre, self._spread = float(values.mean()), float(values.std()) or 1.0
        self._targets = (values - self._centre) / self._spread
        self._inputs = self._scaled(features, [e for _, _, e, _ in rows])
        kernel = (
            ConstantKernel(1.0, (1e-3, 1e2)) * DotProduct(1.0, (1e-2, 1e2))
            + ConstantKernel(1.0, (1e-3, 1e2)) * RBF(3.0, (1.0, 30.0))
            + WhiteKernel(0.1, (1e-3, 1.0))
        )
        doubt = np.array([self.noise**2 + gains[e][1] for _, _, e, _ in rows]) / self._spread**2
        self._process = GaussianProcessRegressor(kernel, alpha=1e-8 + doubt, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._process.fit(self._inputs, self._targets)

    def _gains(self) -> dict[int, tuple[float, float]]:
        """What top-1 still gains from each rung to the last, and the variance of that, over the networks trained to
        both, added up from rung to rung. With fewer than `LEAST` such networks the deviation is a share of the gain."""
        rungs = sorted({epochs for each in self.trained for epochs in each.rungs})
        found = {rungs[-1]: (0.0, 0.0)}
        for epochs, following in reversed(list(itertools.pairwise(rungs))):
            pairs = [
                each.rungs[following] - each.rungs[epochs]
                for each in self.trained
                if epochs in each.rungs and following in each.rungs
            ]
            gain = float(np.mean(pairs)) if pairs else 0.0
            variance = float(np.var(pairs, ddof=1)) if len(pairs) >= LEAST else (GAIN_SPREAD * gain) ** 2
            later = found[following]
            found[epochs] = later[0] + gain, later[1] + variance
        return found

    def _scaled(self, features: np.ndarray, epochs: Sequence[int]) -> np.ndarray:
        """Standardised features, and the epochs in thirds of the last rung's (0 there)."""
        steps = np.log(np.asarray(epochs, dtype=float) / self.epochs) / np.log(3)
        return np.column_stack([(features - self._middle) / self._scale, steps])
