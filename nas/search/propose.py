"""The sampler of a trained search that an older vitnas has begun.

It proposes the network that promises the largest gain within the budget. A trial costs a training, so a slow choice of
what to train is still cheap. From a pool of random networks and variations of the best so far, it proposes the one with
the highest constrained expected improvement (Gardner et al., Bayesian Optimization with Inequality Constraints, ICML
2014): how much better than the best so far it is expected to be, times how likely it is to meet the budget. Gaussian
processes over networks' features predict both, latencies relative to the reference network in the same rounds. A
race's candidates are compared in the same way. A predicted latency decides only what is tried: every network that is
tried is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from optuna.samplers import BaseSampler, RandomSampler
from scipy.special import log_ndtr

from nas.networks.counts import counts_of
from nas.quality.surrogate import DESCRIBED, LEAST, Surrogate, TrainedNetwork, describe
from nas.search.needs import CHANCE, Need, Needs, smallest
from nas.search.published import choices
from nas.search.sampling import log_improvement
from nas.search.seen import RECENT, Point
from nas.search.trial_training import MeasuredNetwork
from nas.search.variations import varied
from nas.study.trials import MEASURED, distributions
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.quality.tier import TrainedTier
    from nas.search.request import SearchRequest

POOL = 48
"""Networks compared in a trial; half of them are variations of the best."""
PARENTS = 6
"""How many of the best are varied."""
LATENCY_NOISE = 0.02
"""Standard deviation of a measured latency's logarithm."""


@dataclass(frozen=True)
class Measured:
    """A measured trial."""

    family: str
    levels: Mapping[str, int]
    """Its parameters by name, each 0 to LEVELS - 1; none of a network that was given without."""
    digest: str
    """Of its candidate: its key."""
    features: Sequence[float]
    """What the surrogates predict from."""
    latency_ms: float
    feasible: bool
    """Whether it meets the budget and the limits."""
    memory_mb: float | None = None
    """As `nas.search.rows.Trial` has it, as the next two."""
    file_mb: float | None = None
    by_precision: Mapping[str, float] | None = None
    reference_ms: float | None = None
    """Latency of the reference network in the same rounds; None where that is not known."""

    @classmethod
    def all_of(cls, study: optuna.Study) -> list[Self]:
        """Every measured trial of a study, in order."""
        found = map(cls.of, study.get_trials(deepcopy=False))
        return [each for each in found if each is not None]

    @classmethod
    def of(cls, trial: FrozenTrial) -> Self | None:
        """What a trial measured, whether or not its training has ended; None before it is measured."""
        levels = dict(trial.params)
        if "detail" not in trial.user_attrs:
            return cls._in_training(trial, levels)
        detail = trial.user_attrs["detail"]
        return cls(
            family=levels.pop("family", "") or trial.user_attrs["family"],
            levels=levels,
            digest=detail.get("key", detail["digest"]),
            features=detail["training"]["features"],
            latency_ms=detail["latency_ms"],
            feasible=bool(trial.user_attrs["feasible"]),
            memory_mb=detail.get("memory_mb"),
            file_mb=detail.get("file_mb"),
            by_precision=detail.get("by_precision"),
            reference_ms=detail.get("reference_ms"),
        )

    @classmethod
    def _in_training(cls, trial: FrozenTrial, levels: dict[str, Any]) -> Self | None:
        if MEASURED not in trial.user_attrs or trial.state.is_finished():
            return None
        try:
            found = MeasuredNetwork.from_json(trial.user_attrs[MEASURED])
        except ValueError:  # of another worker's timm
            return None
        return cls(
            family=levels.pop("family", "") or found.candidate.network.family,
            levels=levels,
            digest=found.candidate.key,
            features=found.features,
            latency_ms=found.latency.latency_ms,
            feasible=True,
            memory_mb=found.latency.memory_mb,
            file_mb=found.latency.file_mb,
            by_precision=found.latency.by_precision,
            reference_ms=found.latency.reference_ms,
        )


class Promise:
    """How much a network promises: the logarithm of its constrained expected improvement."""

    def __init__(self, measured: Sequence[Measured], quality: Surrogate, request: SearchRequest) -> None:
        """quality: fitted to all trainings so far."""
        self._measured = bool(measured)
        self._needs = Needs(
            request.limits,
            smallest(request.precisions),
            [Need(_params_m(one.features), one.memory_mb, one.file_mb) for one in measured],
        )
        known = [one.reference_ms for one in measured if one.reference_ms]
        now_ms = statistics.median(known[-RECENT:]) if known else 1.0
        relative = [one.latency_ms / (one.reference_ms or now_ms) for one in measured]
        self._latency = Surrogate(
            [
                TrainedNetwork(one.digest, _shape(one.features), {1: math.log(times)})
                for one, times in zip(measured, relative, strict=True)
            ],
            1,
            noise=LATENCY_NOISE,
            shares=False,
        )
        self._quality, self._limit = quality, math.log(request.budget_ms / now_ms)
        fitting = {one.digest for one in measured if one.feasible}
        found = (quality.predict(each.features, each.key).value for each in quality.trained if each.key in fitting)
        self._best = max(found, default=0.0)

    def may_meet(self, features: np.ndarray) -> bool:
        """Whether a network is not surely over a limit of memory or size; known once one is measured."""
        return not self._measured or float(self._needs.chances(np.array([_params_m(features)]))[0]) >= math.log(CHANCE)

    def of(self, features: np.ndarray) -> float:
        """Of a network that has not been trained; its features begin with log2 of its parameters, which stand for its
        quality while too few are trained."""
        time = self._latency.predict(_shape(features))
        fits = float(log_ndtr((self._limit - time.value) / time.error))
        fits += float(self._needs.chances(np.array([_params_m(features)]))[0])
        if len(self._quality.trained) < LEAST:
            return fits + math.log(2) * float(features[0])
        found = self._quality.predict(features)
        return fits + float(log_improvement(found.value, found.error, self._best))


def _params_m(features: Sequence[float] | np.ndarray) -> float:
    """Millions of parameters, of which the first feature is log2."""
    return float(2.0 ** features[0]) / 1e6


def _shape(features: Sequence[float] | np.ndarray) -> np.ndarray:
    """The features that a latency goes by: not where the weights are from."""
    return np.asarray(features)[: DESCRIBED + len(FAMILIES)]


class Proposer(BaseSampler):
    """See the module. With a seed, what a trial proposes depends only on the seed, its number and the trials before.

    It proposes all of a trial's parameters at once (`sample_relative`); what that leaves open is random.
    """

    def __init__(self, tier: TrainedTier, request: SearchRequest) -> None:
        self._tier, self._request = tier, request
        self._random = RandomSampler(seed=request.seed)
        self._space = distributions(choices(request))

    def reseed_rng(self) -> None:
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return {} if "fixed_params" in trial.system_attrs else dict(self._space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        return self._random.sample_independent(study, trial, param_name, distribution)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Parameters of the most promising network of the pool; none, so random ones, where too little is measured."""
        measured = Measured.all_of(study)
        if not search_space or len(measured) < LEAST:
            return {}
        seed = self._request.seed
        rng = np.random.default_rng(None if seed is None else [seed, trial.number])
        pool = {point.digest: point for point in self._pool(measured, rng)}
        fresh = [pool[digest] for digest in pool.keys() - {each.digest for each in measured}]
        if not fresh:
            return {}
        promise = Promise(measured, self._tier.surrogate(), self._request)
        best = max(fresh, key=lambda each: promise.of(describe(each.arch, counts_of(each.arch))))
        return best.params

    def _pool(self, measured: Sequence[Measured], rng: np.random.Generator) -> list[Point]:
        """Random networks, and variations of the best within the budget, or of the best of all where none is."""
        varied_ones = [each for each in measured if each.levels]
        fitting = [each for each in varied_ones if each.feasible] or varied_ones
        now = self._tier.review([(each.digest, each.features) for each in fitting])
        order = sorted(range(len(fitting)), key=lambda i: -now[i].value)
        parents = [fitting[i] for i in order[:PARENTS]]
        found: list[Point] = []
        for i in range(POOL):
            if i % 2 and parents:
                parent = parents[i // 2 % len(parents)]
                family, levels = parent.family, varied(parent.family, parent.levels, rng)
            else:
                family = self._request.families[rng.integers(len(self._request.families))]
                levels = random_params(rng)
            found.append(Point.at(self._request, family, levels))
        return found
