"""What a search from scratch tries next: how it begins, then what its sampler finds, until nothing better is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.samplers import RandomSampler

from nas.quality.prior import PriorTier
from nas.quality.tier import TrainedTier
from nas.search import trial
from nas.search.finder import BySize, ByTraining, Finder
from nas.search.opening import Opening
from nas.search.published import choices
from nas.search.seen import Point, Seen
from nas.study.trials import Proposal
from nas.threads import one_blas_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna

    from nas.quality.tier import Tier
    from nas.search.request import SearchRequest
    from search_spaces import Arch


class NothingLeft(Exception):
    """No further network is worth a trial; the message says why."""


class Guide:
    """Guides the trials of a study that no older vitnas has begun; each worker has one.

    It is no `BaseSampler`: Optuna asks one only once a trial exists, for parameters alone. A proposal is decided
    before, under the lock that keeps two workers from the same network; it may have a name, and there may be none.

    Args:
        reference_ms: median latency of the reference network.
        before: networks that were measured before the study, and their latencies over the reference network's.
    """

    def __init__(
        self,
        request: SearchRequest,
        study: optuna.Study,
        tier: Tier,
        reference_ms: float,
        before: Sequence[tuple[Arch, float]] = (),
    ) -> None:
        self._request, self._study = request, study
        self._seen = Seen(request, trial.reference_arch(), reference_ms, before)
        size = BySize(tier if isinstance(tier, PriorTier) else PriorTier(recipes=False))
        self._opening = Opening(request, self._seen, size.score)
        self._begun: tuple[tuple[int, ...], Point | None] | None = None
        """What the beginning said last, and of what."""
        self._finder: Finder | None = None
        if request.sampler == "auto":
            judge = ByTraining(tier, size) if isinstance(tier, TrainedTier) else size
            self._finder = Finder(request, self._seen, judge)
            self._finder.add(self._opening.shapes())
            study.sampler = RandomSampler()  # every trial is given its network

    def prepare(self) -> None:
        """Compare networks, so that `propose` keeps nobody waiting; others may decide meanwhile. Call both as
        `nas.study.trials.ask` does, which has just looked at the study's trials."""
        self._seen.read(self._study, look=False)
        with one_blas_thread():
            self._seen.learn()
            if self._finder is None:
                return
            others_try = any(not each.ended for each in self._seen.tried)  # and may end the beginning meanwhile
            if self._beginning() is None or (others_try and self._finder.choice is None):
                self._finder.compare()

    def propose(self) -> Proposal | None:
        """A network of the beginning, after it what the finder proposes; None where the user has named a sampler.

        Raises:
            NothingLeft: no network can meet the budget, or none that was compared last is better than the best, or
                untried.
        """
        self._seen.read(self._study, look=False)
        budget = f"{self._request.budget_ms:g} ms{self._request.limits.words}"
        if self._opening.hopeless():
            raise NothingLeft(f"the smallest shape of every family was measured, far over {budget}")
        point = self._beginning()
        if point is None and self._finder is not None:
            if self._finder.nothing_better():
                why = "none promises more than the best"
                raise NothingLeft(f"of the networks compared last, over {budget} or not, {why}")
            point = self._finder.propose()
            if point is None:
                raise NothingLeft("every network that was compared has been tried")
        if point is None:
            return None
        return Proposal(point.params, choices(self._request), {"name": point.name} if point.name else {})

    def _beginning(self) -> Point | None:
        """As `Opening.next`, which is asked again only where something has changed."""
        now = self._seen.state
        if self._begun is None or self._begun[0] != now:
            self._begun = now, self._opening.next()
        return self._begun[1]
