"""A network's latency foretold from its document, by what a study has measured so far.

The logarithm of the latency is a Gaussian process: linear in a network's size and shape, about a first guess from
multiply-accumulates, with a smooth remainder, which goes by what each stage holds, too. What little is known before the
first measurement stands in the standard deviations; each measurement makes its own family the surest. It decides only
what is tried: all that is tried is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from search_spaces.api import stage_counts
from search_spaces.registry import FAMILIES
from search_spaces.space import STAGES

if TYPE_CHECKING:
    from search_spaces import Arch

POWER = 0.75
"""Between networks latency grows about with this power of the multiply-accumulates, as small ones keep a CPU less busy.
Of 44 published networks, measured on one CPU at one thread, by the power 0.80; from EfficientViT-M0 0.75 foretells 43
of them within a factor of 1.7 (0.7: 1.9)."""
LEVEL = 0.3
"""Standard deviation of the logarithm of the guess for any network; of the coefficients below, `COMMON`."""
COMMON = (0.15, 0.15, 0.3, 0.15, 0.3, 0.3, 0.3, 0.3)
"""For log MACs, log blocks, log resolution, log parameters, the shares of the first and the last stage in MACs, and the
mean shares of attention and of dropped tokens."""
OFFSET, SLOPE = 0.5, 0.15
"""Of a family's offset, and of its power of MACs."""
REST, LENGTH = 0.15, 1.0
"""Standard deviation of the smooth remainder, and how far it reaches in all coordinates."""
BLOCKS = 0.5
"""Weight of the logarithm of a stage's blocks among them."""
NOISES = (0.03, 0.06, 0.12, 0.25)
"""Standard deviations that a measurement's logarithm may have: that under which the last ones are likeliest counts.
Small on a quiet machine."""
LAST = 300
"""How many these are: time grows with the cube of their number."""
GUESSED = 0.06
"""The same before anything is measured."""


def coordinates(arch: Arch) -> np.ndarray:
    """What a latency is foretold from, (16 + families,): those of `COMMON`; of each of four stages, 0 where a network
    has fewer, the share in MACs, then the log of blocks; and which of the families it is."""
    tallies, stages = stage_counts(arch), arch.summary()
    macs = np.array([each.macs for each in tallies], dtype=float)
    depth = np.array([stage.depth for stage in stages], dtype=float)
    blocks = max(1.0, depth.sum())
    return np.array(
        [
            math.log(macs.sum()),
            math.log(blocks),
            math.log(arch.resolution),
            math.log(sum(each.params for each in tallies)),
            macs[0] / macs.sum(),
            macs[-1] / macs.sum(),
            float(depth @ [stage.attention_share for stage in stages]) / blocks,
            float(depth @ [1 - stage.keep_rate for stage in stages]) / blocks,
            *_by_stage(macs / macs.sum()),
            *_by_stage(BLOCKS * np.log1p(depth)),
            *(float(arch.family == name) for name in FAMILIES),
        ]
    )


def _by_stage(values: np.ndarray) -> np.ndarray:
    """Padded with zeros to as many stages as the search axes have."""
    found = np.zeros(len(STAGES))
    found[: len(values)] = values[: len(STAGES)]
    return found


class Speed:
    """Foretells latencies.

    Args:
        reference: coordinates and latency in ms of a network that was measured; the first guess.
        measured: of the study's networks, the last ones last.
    """

    def __init__(self, reference: tuple[np.ndarray, float], measured: Sequence[tuple[np.ndarray, float]] = ()) -> None:
        self._middle, self._level = reference[0], math.log(reference[1])
        self._rows = np.array([row for row, _ in measured]).reshape(len(measured), len(self._middle))
        self.noise = GUESSED
        if measured:
            residual = np.log([ms for _, ms in measured]) - self._guess(self._rows)
            shared = self._covariance(self._rows, self._rows)
            last = shared[-LAST:, -LAST:], residual[-LAST:]
            self.noise = max(NOISES, key=lambda noise: _evidence(_root(last[0], noise), last[1]))
            self._root = _root(shared, self.noise)
            self._weights = cho_solve((self._root, True), residual)

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of the logarithms of latencies in ms. rows: (n, 16 + families)."""
        mean = self._guess(rows)
        variance = self._variance(rows)
        if len(self._rows):
            shared = self._covariance(rows, self._rows)
            mean = mean + shared @ self._weights
            variance = variance - (solve_triangular(self._root, shared.T, lower=True) ** 2).sum(0)
        return mean, np.sqrt(np.maximum(variance, 0.0) + self.noise**2)

    def _guess(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._level + POWER * (rows[:, 0] - self._middle[0])
        return found

    def _inputs(self, rows: np.ndarray) -> np.ndarray:
        """Times their standard deviations: the level, the common coordinates, and the families' own two."""
        near = rows[:, : len(COMMON)] - self._middle[: len(COMMON)]
        own = rows[:, -len(FAMILIES) :]
        return np.hstack([np.full((len(rows), 1), LEVEL), near * COMMON, own * OFFSET, own * SLOPE * near[:, :1]])

    def _covariance(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        linear = self._inputs(rows) @ self._inputs(others).T
        squares = (rows**2).sum(1)[:, None] + (others**2).sum(1) - 2 * rows @ others.T
        found: np.ndarray = linear + REST**2 * np.exp(-np.maximum(squares, 0.0) / (2 * LENGTH**2))
        return found

    def _variance(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = (self._inputs(rows) ** 2).sum(1) + REST**2
        return found


def _root(shared: np.ndarray, noise: float) -> np.ndarray:
    """Of a covariance with this noise, by Cholesky."""
    found: np.ndarray = cholesky(shared + noise**2 * np.eye(len(shared)), lower=True, check_finite=False)
    return found


def _evidence(root: np.ndarray, residual: np.ndarray) -> float:
    """Log likelihood of normal residuals, but for a constant. root: of their covariance."""
    return -float((solve_triangular(root, residual, lower=True) ** 2).sum()) / 2 - float(np.log(np.diag(root)).sum())
