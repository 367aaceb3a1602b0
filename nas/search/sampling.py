"""How much better than the best so far a network promises to be."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr


def log_improvement(values: np.ndarray | float, errors: np.ndarray | float, best: float) -> np.ndarray:
    """Log of the expected improvement over the best score, of normal values with these standard deviations, elementwise
    (Gardner et al., Bayesian Optimization with Inequality Constraints, ICML 2014)."""
    gap = (np.asarray(values) - best) / errors
    gain = errors * (gap * ndtr(gap) + np.exp(-gap * gap / 2) / math.sqrt(2 * math.pi))
    found: np.ndarray = np.log(np.maximum(gain, 1e-300))
    return found
