"""How likely a network meets the limits of memory and size, foretold from its parameters by what a study has measured.

As with latency (`nas.search.speed`), it decides only what is tried: all that is tried is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import log_ndtr

if TYPE_CHECKING:
    from nas.measure.budget import Limits

CHANCE = 0.02
"""Of meeting budget and limits: networks below are surely over."""
BYTES = {"fp16": 2.0, "int8": 1.0}
"""Of a parameter in the file; in other precisions 4."""
MEMORY = (1.0, 2.6)
"""Megabytes of memory before anything is measured: so many, and so many times the file's. Of SHViT from 0.6 to 30 M
parameters on ONNX Runtime, within a quarter."""
ENOUGH, ALIKE = 4, 0.1
"""Measurements that a line is taken from, and the standard deviation of the logarithms of their parameters, at least.
The guess is brought to others."""
GUESSED, LEAST_ERROR = 0.3, 0.02
"""Standard deviation of the logarithm of what is foretold from fewer than `ENOUGH`, and the least from more."""


@dataclass(frozen=True)
class Need:
    """What was measured of a network. Figures that were not read are None."""

    params_m: float
    """Parameters in millions."""
    memory_mb: float | None
    file_mb: float | None


def smallest(precisions: Sequence[str]) -> str:
    """That whose files are smallest."""
    return min(precisions, key=lambda each: BYTES.get(each, 4.0))


class Needs:
    """Foretells memory and file size: each a line in the number of parameters, by least squares of the relative error.

    Args:
        precision: of the search.
    """

    def __init__(self, limits: Limits, precision: str, measured: Iterable[Need] = ()) -> None:
        rows, per_million = list(measured), BYTES.get(precision, 4.0)
        start, times = MEMORY
        memory = [(row.params_m, row.memory_mb) for row in rows if row.memory_mb]
        file = [(row.params_m, row.file_mb) for row in rows if row.file_mb]
        self._lines = [
            (limit, *_line(known, guess))
            for limit, known, guess in (
                (limits.memory_mb, memory, (start, times * per_million)),
                (limits.file_mb, file, (0.0, per_million)),
            )
            if limit is not None
        ]

    def chances(self, params_m: np.ndarray) -> np.ndarray:
        """Logarithms of the chances to meet all limits, (n,); 0 without limits. params_m: (n,) in millions."""
        found = np.zeros(len(params_m))
        for limit, (start, slope), error in self._lines:
            likely = np.maximum(start + slope * params_m, 1e-9)
            found += log_ndtr((np.log(limit) - np.log(likely)) / error)
        return found


def _line(known: Sequence[tuple[float, float]], guess: tuple[float, float]) -> tuple[tuple[float, float], float]:
    """Start and slope of a figure in the number of parameters, and the standard deviation of its logarithm.

    guess: start and slope before anything is measured.
    """
    if not known:
        return guess, GUESSED
    params, figures = np.array(known).T
    inputs = np.stack([np.ones_like(params), params], 1) / figures[:, None]
    start, slope = np.linalg.lstsq(inputs, np.ones_like(params), rcond=None)[0]
    if len(known) < ENOUGH or np.std(np.log(params)) < ALIKE or min(start, slope) < 0:
        times = float(np.exp(np.mean(np.log(figures / (guess[0] + guess[1] * params)))))
        start, slope = guess[0] * times, guess[1] * times
    missed = np.log((start + slope * params) / figures)
    error = float(np.sqrt(np.mean(missed**2)))
    return (float(start), float(slope)), GUESSED if len(known) < ENOUGH else max(LEAST_ERROR, error)
