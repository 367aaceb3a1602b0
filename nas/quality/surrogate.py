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
from functools import cache

import numpy as np
from scipy.stats import kendalltau

from nas.networks.counts import Counts, counts_of
from nas.networks.timm_network import TimmNetwork
from nas.quality.candidate import Candidate, Kind
from nas.quality.scale import odds_of, percent_of, points_per_odds
from search_spaces import Arch, get_arch
from search_spaces.registry import FAMILIES

LEAST = 3
"""Networks below which nothing is fitted: the mean and spread of what there is stand in."""
SEED_NOISE = 0.9
"""Points of top-1: two seeds of one network differed by 1.0 on average (8 small networks, CIFAR-10, 6 epochs)."""
GAIN_SPREAD = 0.1
"""How far a gain from rung to rung differs between networks, as a share of it, until the trainings show it."""
WIDE = 15.0
"""Standard deviation in points where there is nothing to learn from."""
WIDE_GAIN = 1.0
"""Standard deviation in log odds of what a kind of network gains that none has shown: 16 points about a top-1 of 80."""
DESCRIBED = 9
"""Features of any network, before those of its family and kind."""
RUNG_0 = 1 / 3
"""Where rung 0 stands among the epochs."""
KINDS = (Kind.READY, Kind.DERIVED)
"""A feature each; of a network from scratch both are 0, as of those that an older vitnas described."""
SHAPE_OF_TIMM = (7.0, 4.0, 0.0, 0.0, 2.0, 1.0)
"""Of a network of timm's, which tells nothing of its shape: log2 of width and depth, log2(1 + qk width), share of
attention, FFN ratio and keep rate, as small CNNs have them."""

Rungs = Mapping[int, float]
"""Top-1 in percent by epochs trained."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A network's features and what its training showed."""

    key: str
    features: np.ndarray
    rungs: Rungs
    tuned: bool | None = None
    """Of a pretrained one, whether it was kept as tuned: it was not clearly worse; None where that is not told."""


def describe(network: Arch | TimmNetwork, counts: Counts) -> np.ndarray:
    """Features (9 + families,): log2 of parameters, MACs, width, depth, qk width and resolution; share of attention,
    FFN ratio and keep rate as means over blocks; and which of the families it is, none of them for one of timm's."""
    shape = SHAPE_OF_TIMM if isinstance(network, TimmNetwork) else _shape(network)
    return np.array(
        [
            np.log2(counts.params),
            np.log2(counts.macs),
            *shape,
            np.log2(network.resolution),
            *(float(network.family == name) for name in FAMILIES),
        ]
    )


def describe_candidate(candidate: Candidate, counts: Counts) -> np.ndarray:
    """Features (9 + families + 3,): those of `describe`, whether it is ready, whether it is derived, and log2 of the
    share that it has of its parent's MACs, 0 where it has no parent."""
    kinds = [float(candidate.kind == kind) for kind in KINDS]
    network = candidate.network
    share = counts.macs / _macs(candidate.parent, network.resolution, network.num_classes) if candidate.parent else 1.0
    return np.append(describe(network, counts), [*kinds, np.log2(share)])


@cache
def _macs(name: str, px: int, classes: int) -> int:
    """Of a published network."""
    return counts_of(get_arch(name).replace(num_classes=classes).at(px)).macs


def kind_of(features: np.ndarray) -> Kind:
    """The kind of a network with these features."""
    told = features[DESCRIBED + len(FAMILIES) :]
    return next((kind for kind, value in zip(KINDS, told, strict=False) if value), Kind.SCRATCH)


def _shape(arch: Arch) -> tuple[float, ...]:
    stages = arch.summary()
    depth = np.array([stage.depth for stage in stages], dtype=float)

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=depth))

    return (
        mean([np.log2(stage.embed_dim) for stage in stages]),
        float(np.log2(depth.sum())),
        mean([np.log2(1 + stage.heads * stage.key_dim) for stage in stages]),
        mean([stage.attention_share for stage in stages]),
        mean([stage.ffn_ratio for stage in stages]),
        mean([stage.keep_rate for stage in stages]),
    )


@dataclass(frozen=True)
class Guess:
    """Top-1 after training."""

    value: float
    """In percent, 0 to 100."""
    error: float
    """One standard deviation in points, of so small a part of it as log odds there are straight; see `scale`."""


class Surrogate:
    """Fitted to networks trained to various epochs; predicts top-1 after `epochs`, as log odds.

    Args:
        noise: the least standard deviation of a result, what another seed would change.
        shares: results are percentages; else any numbers, such as logarithms of latencies.
    """

    def __init__(
        self, trained: Sequence[TrainedNetwork], epochs: int, noise: float = SEED_NOISE, shares: bool = True
    ) -> None:
        self.noise = noise
        self._shares = shares
        self.trained = [each for each in trained if each.rungs]
        self.epochs = epochs
        if len(self.trained) >= LEAST:
            self._fit()

    def predict(self, features: np.ndarray, key: str = "") -> Guess:
        """Top-1 after `epochs` of a network trained once.

        For a network among those it was fitted to, its own training counts. Without enough networks it is their mean.

        Args:
            key: of such a network, whose figure of rung 0 is one of its features; others have its mean.
        """
        if len(self.trained) < LEAST:
            best = [max(each.rungs.values()) for each in self.trained]
            return Guess(self._of_scale(self._on_scale(float(np.mean(best)) if best else 0.0)), WIDE)
        row = self._row(features, self._own.get(key, {}))
        mean, deviation = self._process.predict(self._scaled(row[None], [self.epochs]), return_std=True)
        value = self._of_scale(float(mean[0]) * self._spread + self._centre)
        return Guess(value, float(np.hypot(deviation[0] * self._spread * self._points(value), self.noise)))

    def held_out(self) -> tuple[float, float | None] | None:
        """Mean absolute error in points, and Kendall's tau, of top-1 after `epochs` predicted for every network that
        was trained so long, from all others; None with fewer than `LEAST` such networks, as tau where all are equal."""
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
            found.append(self._of_scale(float((gram[np.ix_(here, rest)] @ weights)[0]) * self._spread + self._centre))
            wanted.append(self.trained[i].rungs[self.epochs])
        error = float(np.mean(np.abs(np.subtract(found, wanted))))
        differ = min(len(set(found)), len(set(wanted))) > 1
        return error, float(kendalltau(found, wanted).statistic) if differ else None

    def _fit(self) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

        self._own = {each.key: each.rungs for each in self.trained}
        self._width = max(len(each.features) for each in self.trained)
        firsts = [each.rungs[0] for each in self.trained if 0 in each.rungs]
        self._first = float(np.mean(firsts)) if firsts else 0.0
        rows = [
            (i, self._row(each.features, each.rungs), e, top1)
            for i, each in enumerate(self.trained)
            for e, top1 in each.rungs.items()
        ]
        self._owner = np.array([i for i, *_ in rows])
        self._is_full = np.array([e == self.epochs for _, _, e, _ in rows])
        features = np.array([f for _, f, _, _ in rows])
        self._middle = features.mean(0)
        scale = features.std(0)
        self._scale = np.where(scale > 1e-9, scale, np.inf)
        gains = self._gains()
        gained = [gains[kind_of(self.trained[i].features), e] for i, _, e, _ in rows]
        values = np.array([self._on_scale(top1) + gain for (*_, top1), (gain, _) in zip(rows, gained, strict=True)])
        self._centre, self._spread = float(values.mean()), float(values.std()) or 1.0
        self._targets = (values - self._centre) / self._spread
        self._inputs = self._scaled(features, [e for _, _, e, _ in rows])
        kernel = (
            ConstantKernel(1.0, (1e-3, 1e2)) * DotProduct(1.0, (1e-2, 1e2))
            + ConstantKernel(1.0, (1e-3, 1e2)) * RBF(3.0, (1.0, 30.0))
            + WhiteKernel(0.1, (1e-3, 1.0))
        )
        noise = self.noise / np.array([self._points(top1) for *_, top1 in rows])
        doubt = (noise**2 + np.array([variance for _, variance in gained])) / self._spread**2
        self._process = GaussianProcessRegressor(kernel, alpha=1e-8 + doubt, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._process.fit(self._inputs, self._targets)

    def _gains(self) -> dict[tuple[Kind, int], tuple[float, float]]:
        """By kind and rung, what log odds still gain to the last rung, and the variance of that, over the networks of
        the kind trained to both, added up from rung to rung. With fewer than `LEAST` such networks the deviation is a
        share of the gain; with none, but some of other kinds, the gain is theirs and the deviation `WIDE_GAIN`."""
        rungs = sorted({epochs for each in self.trained for epochs in each.rungs})
        found = {(kind, rungs[-1]): (0.0, 0.0) for kind in Kind}
        for epochs, following in reversed(list(itertools.pairwise(rungs))):
            pairs: dict[Kind, list[float]] = {kind: [] for kind in Kind}
            for each in self.trained:
                if epochs in each.rungs and following in each.rungs:
                    before, after = (self._on_scale(each.rungs[rung]) for rung in (epochs, following))
                    pairs[kind_of(each.features)].append(after - before)
            every = [gain for gains in pairs.values() for gain in gains]
            for kind, gains in pairs.items():
                gain = float(np.mean(gains or every)) if every else 0.0
                variance = float(np.var(gains, ddof=1)) if len(gains) >= LEAST else (GAIN_SPREAD * gain) ** 2
                if every and not gains:
                    variance = WIDE_GAIN**2
                later = found[kind, following]
                found[kind, epochs] = later[0] + gain, later[1] + variance
        return found

    def _on_scale(self, result: float) -> float:
        return odds_of(result) if self._shares else result

    def _of_scale(self, value: float) -> float:
        return percent_of(value) if self._shares else value

    def _points(self, result: float) -> float:
        """How much of a result a unit of the scale is, about it."""
        return points_per_odds(result) if self._shares else 1.0

    def _row(self, features: np.ndarray, rungs: Rungs) -> np.ndarray:
        """Features as wide as the widest, and the figure of rung 0, or its mean where there is none. What an older
        vitnas did not describe is 0; what no network that was trained has is left out."""
        row = np.zeros(self._width + 1)
        row[: min(self._width, len(features))] = features[: self._width]
        row[-1] = rungs.get(0, self._first)
        return row

    def _scaled(self, features: np.ndarray, epochs: Sequence[int]) -> np.ndarray:
        """Standardised features, and the epochs in thirds of the last rung's (0 there)."""
        steps = np.log(np.maximum(np.asarray(epochs, dtype=float), RUNG_0) / self.epochs) / np.log(3)
        return np.column_stack([(features - self._middle) / self._scale, steps])
