"""What the samplers of a search share: the space that they propose from, and how much a network promises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from scipy.special import ndtr

from search_spaces.space import LEVELS, PARAMETERS

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.search.request import SearchRequest


class SpaceSampler(BaseSampler):
    """Proposes all of a trial's parameters at once (`sample_relative`); what that leaves open is random."""

    def __init__(self, request: SearchRequest) -> None:
        self._request = request
        self._random = RandomSampler(seed=request.seed)
        self._space = {
            "family": CategoricalDistribution(list(request.families)),
            **{name: IntDistribution(0, LEVELS - 1) for name in PARAMETERS},
        }

    def reseed_rng(self) -> None:
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return {} if "fixed_params" in trial.system_attrs else dict(self._space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        return self._random.sample_independent(study, trial, param_name, distribution)


def log_improvement(values: np.ndarray | float, errors: np.ndarray | float, best: float) -> np.ndarray:
    """Log of the expected improvement over the best score, of normal values with these standard deviations, elementwise
    (Gardner et al., Bayesian Optimization with Inequality Constraints, ICML 2014)."""
    gap = (np.asarray(values) - best) / errors
    gain = errors * (gap * ndtr(gap) + np.exp(-gap * gap / 2) / math.sqrt(2 * math.pi))
    found: np.ndarray = np.log(np.maximum(gain, 1e-300))
    return found
