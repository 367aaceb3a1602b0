"""Optuna's samplers under the names the command line takes.

Under ``auto`` a study without images goes on that an older vitnas has begun: a Gaussian process while trials are few,
then NSGA-II. In others `nas.search.guide` or `nas.search.race` gives every trial its network instead.
Optuna (and torch, for the Gaussian process) is imported when a sampler is made or first samples.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from nas.errors import unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import optuna
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, TrialState

T = TypeVar("T")
GP_TRIALS = 250  # finished trials from which on "auto" is NSGA-II: thinking would take longer than measuring
POPULATION = 16  # NSGA-II: Optuna's default of 50 learns too late for a few hundred trials


def quiet_optuna() -> None:
    """Silence Optuna's info log and its warnings that a feature is experimental."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def make_sampler(name: str, seed: int | None) -> BaseSampler:
    """Build the sampler called `name` (a key of SAMPLERS).

    GPSampler sets torch to one thread and OPENBLAS_NUM_THREADS to 1 while it samples, and puts
    both back: whoever times a network must set its threads after ``study.ask()``.

    Raises:
        UserError: there is no sampler of that name.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    quiet_optuna()
    sampler = SAMPLERS[name](seed)
    for method in ("before_trial", "infer_relative_search_space", "sample_relative", "sample_independent"):
        setattr(sampler, method, _blind(getattr(sampler, method)))
    return sampler


def _blind(method: Callable[..., T]) -> Callable[..., T]:
    """A sampler's method, called with a study that does not show finished trials without parameters: Optuna's samplers
    would relate the parameters of no trial to the objectives, or fail."""
    import copy

    def call(study: optuna.Study, *more: Any) -> T:
        def get_trials(*given: Any, **named: Any) -> list[FrozenTrial]:
            trials = study._get_trials(*given, **named)
            return [trial for trial in trials if trial.params or not trial.state.is_finished()]

        shown = copy.copy(study)
        shown._get_trials = get_trials  # type: ignore[method-assign]
        return method(shown, *more)

    return call


def _gp(seed: int | None) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed)


def _tpe(seed: int | None) -> BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(multivariate=True, constant_liar=True, seed=seed)


def _nsga2(seed: int | None) -> BaseSampler:
    from optuna.samplers import NSGAIISampler

    # Defined in here because its base class must not be imported with this module.
    class NSGA2(NSGAIISampler):
        """NSGA-II that files every trial under a generation, enqueued ones too.

        Optuna does so only when it samples relatively, which a trial with given parameters never
        asks for: enqueued trials would be in no population and never be parents.
        """

        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            super().before_trial(study, trial)
            self.get_trial_generation(study, trial)

    return NSGA2(population_size=POPULATION, seed=seed)


def _random(seed: int | None) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _auto(seed: int | None) -> BaseSampler:
    from optuna.samplers import BaseSampler

    class AutoSampler(BaseSampler):
        """The Gaussian process below GP_TRIALS finished trials, NSGA-II from there on.

        NSGA-II sees every trial from the start, and so goes on from the Gaussian process's best
        rather than from a random first generation.
        """

        def __init__(self) -> None:
            self._gp = _gp(seed)
            self._nsga2 = _nsga2(seed)
            self._current = self._gp

        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            finished = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
            self._current = self._gp if finished < GP_TRIALS else self._nsga2
            self._nsga2.before_trial(study, trial)

        def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
            return self._current.infer_relative_search_space(study, trial)

        def sample_relative(
            self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]
        ) -> dict[str, Any]:
            return self._current.sample_relative(study, trial, search_space)

        def sample_independent(
            self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
        ) -> Any:
            return self._current.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            state: TrialState,
            values: Sequence[float] | None,
        ) -> None:
            self._current.after_trial(study, trial, state, values)

        def reseed_rng(self) -> None:
            self._gp.reseed_rng()
            self._nsga2.reseed_rng()

    return AutoSampler()


SAMPLERS: dict[str, Callable[[int | None], BaseSampler]] = {
    "auto": _auto,
    "gp": _gp,
    "tpe": _tpe,
    "nsga2": _nsga2,
    "random": _random,
}
