"""The sampler of a trained search: what to try next is what the surrogate expects most of, within the budget.

A trial costs a training, so thought is cheap: of some random networks, and variations of the best so far, the one of
highest constrained expected improvement is tried (Gardner et al., Bayesian Optimization with Inequality Constraints,
ICML 2014): how much better than the best it is expected to be, times how likely it is to meet the budget. Both come
from Gaussian processes over networks' features; predicted latency decides what is tried, never what a network gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from scipy.stats import norm

from nas.quality.surrogate import LEAST, Surrogate, TrainedNetwork, describe
from search_spaces import Arch, table
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS, random_params

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.quality.trained import HalvingTier
    from nas.search.request import SearchRequest

POOL = 48
"""Networks weighed a trial; half of them vary the best."""
PARENTS = 6
CHANGES = 4
"""Parameters that a variation changes at most."""


class Proposer(BaseSampler):
    """See the module. With a seed, a trial's draws follow from it and the trial's number."""

    def __init__(self, tier: HalvingTier, options: SearchRequest) -> None:
        self._tier, self._options = tier, options
        self._random = RandomSampler(seed=options.seed)
        self._space = {
            "family": CategoricalDistribution(list(options.families)),
            **{name: IntDistribution(0, LEVELS - 1) for name in PARAMETERS},
        }

    def reseed_rng(self) -> None:
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return {} if "fixed_params" in trial.system_attrs else dict(self._space)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Parameters of the most promising network of the pool; random ones where too little was measured."""
        measured = [t for t in study.get_trials(deepcopy=False) if "detail" in t.user_attrs]
        if not search_space or len(measured) < LEAST:
            return {}
        seed = self._options.seed
        rng = np.random.default_rng(None if seed is None else [seed, trial.number])
        pool = {arch.digest(): (params, arch) for params, arch in self._pool(measured, rng)}
        tried = {t.user_attrs["detail"]["digest"] for t in measured}
        fresh = [pool[digest] for digest in pool.keys() - tried]
        if not fresh:
            return {}
        return max(fresh, key=self._scorer(measured))[0]

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        return self._random.sample_independent(study, trial, param_name, distribution)

    def _scorer(self, measured: Sequence[FrozenTrial]) -> Any:
        """A function that rates (parameters, network)."""
        details = [t.user_attrs["detail"] for t in measured]
        latency = Surrogate(
            [
                TrainedNetwork(one["digest"], np.array(one["training"]["features"]), {1: math.log(one["latency_ms"])})
                for one in details
            ],
            1,
            noise=0.02,
        )
        quality = self._tier.surrogate()
        known = quality.trained
        fitting = {t.user_attrs["detail"]["digest"] for t in measured if t.user_attrs["feasible"]}
        best = max((quality.predict(one.features).value for one in known if one.key in fitting), default=0.0)
        limit = math.log(self._options.budget_ms)

        def rate(candidate: tuple[Mapping[str, Any], Arch]) -> float:
            arch = candidate[1]
            counts = table(arch)
            features = describe(arch, counts)
            time = latency.predict(features)
            fits = norm.logcdf((limit - time.value) / time.error)
            if len(known) < LEAST:
                return fits + math.log(counts.params())
            found = quality.predict(features)
            gap = (found.value - best) / found.error
            return fits + math.log(max(1e-300, found.error * (gap * norm.cdf(gap) + norm.pdf(gap))))

        return rate

    def _pool(self, measured: Sequence[FrozenTrial], rng: np.random.Generator) -> list[tuple[dict[str, Any], Arch]]:
        """Parameters with their networks: variations of the best within the budget, and random ones."""
        fitting = [t for t in measured if t.user_attrs["feasible"]] or list(measured)
        details = [t.user_attrs["detail"] for t in fitting]
        now = self._tier.review([(one["digest"], one["training"]["features"]) for one in details])
        order = sorted(range(len(fitting)), key=lambda i: -now[i].value)
        parents = [fitting[i] for i in order[:PARENTS]]
        found = []
        for i in range(POOL):
            params = varied(parents[i // 2 % len(parents)].params, rng) if i % 2 else self._drawn(rng)
            family = FAMILIES[params["family"]]
            found.append((params, family.space.decode(params, self._options.num_classes, self._options.resolution)))
        return found

    def _drawn(self, rng: np.random.Generator) -> dict[str, Any]:
        family = self._options.families[rng.integers(len(self._options.families))]
        return {"family": family, **random_params(rng)}


def varied(params: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A few of the family's parameters changed, mostly by one level."""
    active = list(FAMILIES[params["family"]].space.options)
    count = 1 + int(rng.integers(min(CHANGES, len(active))))
    changed = dict(params)
    for name in rng.choice(active, size=count, replace=False):
        step = int(rng.choice((-2, -1, -1, 1, 1, 2)))
        changed[str(name)] = int(np.clip(changed[str(name)] + step, 0, LEVELS - 1))
    return changed
