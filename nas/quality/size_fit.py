"""Top-1 from size, fitted to published networks: how the prior predicts.

Log odds of top-1 are a quadratic in log2 MACs and log2 parameters, linear in log2 resolution, with a step for
distillation. Each family has an offset and a slope of its own, pooled partially: the less of a family is published, the
nearer both are to the mean of all families (0), and a family of which nothing is published has the mean, and the whole
spread of families as its doubt. All of it is one Bayesian linear regression, so that the doubt of every part counts.

Where the quadratic falls with size, which it does beyond most published sizes, a network has the best prediction of all
sizes up to its own, and what the quadratic falls short of that is added doubt: no network is worse for being larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nas.quality.scale import odds_of

OFFSETS = 0.098
"""Standard deviation over families of their offsets, in log odds: what design and recipe are worth at a size."""
SLOPES = 0.026
"""Of their slopes, in log odds per doubling of MACs and parameters."""
NOISE, NOISE_SLOPE = 0.048, 0.014
"""Standard deviation in log odds of a network about its family's curve, at 500 MMACs and 5 M parameters, and what each
doubling or halving of both adds, in quadrature: much smaller and much larger networks scatter more.

These four are near those under which the table is likeliest, and were set so that intervals hold what they state of its
networks and families that are left out (`bench_prior.py`)."""
COEFFICIENTS = (9.0, 9.0, 9.0, 0.05, 0.05, 0.05, 0.1, 0.1)
"""Standard deviations of the coefficients before the table is seen: wide for the level and both slopes; curvature,
resolution at equal MACs, and distillation are small unless it shows otherwise."""


class Size(Protocol):
    """What the prior sees of a network, as `Published` has it."""

    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def resolution(self) -> int: ...
    @property
    def distilled(self) -> bool: ...


class Point(Size, Protocol):
    """A network to fit to, as `Published` has it."""

    @property
    def family(self) -> str: ...
    @property
    def top1(self) -> float: ...


@dataclass(frozen=True)
class Prediction:
    """Normally distributed log odds of top-1."""

    mean: float
    error: float
    """Standard deviation, for one network."""


class SizeFit:
    """Fitted to some networks. families: those it has an offset of."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.families = {name: i for i, name in enumerate(sorted({point.family for point in points}))}
        rows = np.array([_row(point) for point in points])
        sizes = np.array([_size(point) for point in points])
        own = np.eye(len(self.families))[[self.families[point.family] for point in points]]
        inputs = np.hstack([rows, own, own * sizes[:, None]])
        count = len(self.families)
        spread = np.concatenate([COEFFICIENTS, np.full(count, OFFSETS), np.full(count, SLOPES)])
        weights = 1 / np.array([_noise(size) for size in sizes]) ** 2
        self._covariance = np.linalg.inv(inputs.T @ (inputs * weights[:, None]) + np.diag(spread**-2))
        self._mean = self._covariance @ (inputs.T @ (weights * np.array([odds_of(point.top1) for point in points])))
        self._parts = {name: self._part(i) for name, i in self.families.items()} | {None: self._part(None)}

    def predict(self, network: Size, family: str | None) -> Prediction:
        """Predict one network's log odds. family: None, or one that is not in the fit, has the mean of all."""
        row, size = _row(network), _size(network)
        known = family if family in self.families else None
        mean, covariance = self._parts[known]
        inputs = np.array([*row, 1.0, size] if known is not None else row)
        gain = _gain_of_less(mean, row[1], row[2])
        variance = float(inputs @ covariance @ inputs) + _noise(size) ** 2 + gain**2
        if known is None:
            variance += OFFSETS**2 + (SLOPES * size) ** 2
        return Prediction(float(inputs @ mean) + gain, math.sqrt(variance))

    def _part(self, family: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the coefficients that a family's networks have."""
        common = len(COEFFICIENTS)
        own = [] if family is None else [common + family, common + len(self.families) + family]
        chosen = np.array([*range(common), *own])
        return self._mean[chosen], self._covariance[np.ix_(chosen, chosen)]


def _gain_of_less(mean: np.ndarray, macs: float, params: float) -> float:
    """Log odds by which the quadratic is higher at the best of all sizes up to this one; 0 where it still grows.

    Args:
        mean: coefficients as of `_row`, then a family's offset and slope, if any.
        macs, params: the size, as `_row` has it.
    """
    linear = mean[1:3] + (mean[-1] / 2 if len(mean) > len(COEFFICIENTS) else 0.0)
    curvature = np.array([[2 * mean[3], mean[5]], [mean[5], 2 * mean[4]]])
    slopes = linear + curvature @ np.array([macs, params])
    if (slopes >= 0).all():
        return 0.0
    steps = [np.zeros(2)]
    for axis, unit in enumerate(np.eye(2)):
        if curvature[axis, axis] < 0:
            steps.append(-slopes[axis] / curvature[axis, axis] * unit)
    if curvature[0, 0] < 0 < np.linalg.det(curvature):
        steps.append(-np.linalg.solve(curvature, slopes))
    return max(float(slopes @ step + step @ curvature @ step / 2) for step in steps if (step <= 0).all())


def _row(network: Size) -> list[float]:
    """1, log2 of MACs and parameters about 500 M and 5 M, their squares and product, log2 of resolution about 224, and
    whether it was distilled."""
    macs, params = math.log2(network.macs / 5e8), math.log2(network.params / 5e6)
    resolution = math.log2(network.resolution / 224)
    return [1.0, macs, params, macs * macs, params * params, macs * params, resolution, float(network.distilled)]


def _size(network: Size) -> float:
    """Doublings of MACs and parameters (their mean) about 500 M and 5 M."""
    return (math.log2(network.macs / 5e8) + math.log2(network.params / 5e6)) / 2


def _noise(size: float) -> float:
    return math.hypot(NOISE, NOISE_SLOPE * size)
