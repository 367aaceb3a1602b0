"""A search that races: which networks with which weights, and one trial after another until nothing is left to try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nas.intervals import of_share
from nas.networks.counts import counts_of
from nas.networks.targets import find_target
from nas.quality.candidate import Candidate
from nas.quality.plan import NO_TEACHER
from nas.quality.teacher import check_named
from nas.search.choose import Chooser, latencies_of, tried_in
from nas.search.given import enqueue_candidate
from nas.search.log import Clock
from nas.search.ready import Entrant, Field, find_entrants
from nas.search.trial import reference_arch
from nas.search.weights import agree_on_weights
from nas.units import counted, listed
from search_spaces import get_arch, list_models

if TYPE_CHECKING:
    import optuna

    from nas.quality.race import RaceTier
    from nas.quality.trainer import CandidateTrainer
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest
    from nas.search.trial import TrialRunner

NO_WEIGHTS = (
    "no pretrained weights were found: every network begins with random ones, which on some thousand images costs many "
    "points of accuracy; --weights-from DIR gives weights"
)
FEW_JUDGE = 100
"""Images that judge below which it is told how little they say."""


class NothingLeft(Exception):
    """Every candidate that was offered has been tried."""


def find_field(
    request: SearchRequest, study: optuna.Study, trainer: CandidateTrainer, note: Callable[[str], None]
) -> list[Entrant]:
    """The networks that race, which is told, as it is where few images judge; the study keeps which weights they have.

    Raises:
        UserError: as `nas.search.ready.find_entrants`, `nas.search.weights.agree_on_weights` and `check_teacher`.
    """
    check_teacher(trainer)
    if trainer.judged < FEW_JUDGE:
        known = of_share(50.0, trainer.judged)
        note(
            f"{counted(trainer.judged, 'image')} judge: a top-1 of 50% is known within "
            f"{(known.high - known.low) / 2:.0f} points, so which of two networks is better is often chance; more "
            "training images help"
        )
    store = trainer.weights
    entrants, lacking = find_entrants(request.families, request.resolution, request.num_classes, store)
    agree_on_weights(study, trainer.folder, store)
    if not entrants:
        note(NO_WEIGHTS)
        return entrants
    note(f"pretrained networks in the race: {', '.join(each.name for each in entrants)}")
    if lacking:
        note(f"left out, as their weights cannot be had: {listed(lacking)}")
    for why in store.left_out.values():
        note(f"left out: {why}")
    if request.sampler != "auto":
        note(
            f"--sampler {request.sampler} makes up networks of any family and resolution: a parent is tuned for each "
            "pair of these that comes up, which takes as long as a final training; without --sampler few parents are"
        )
    return entrants


def check_teacher(trainer: CandidateTrainer) -> None:
    """See at the start that the network of --teacher can teach at the end.

    Raises:
        UserError: it cannot.
    """
    name = trainer.plan.teacher
    if name is None or name == NO_TEACHER:
        return
    published = name.partition("@")[0]
    if published in list_models():
        trainer.weights.apart().get(get_arch(published))  # a study without it must go on, too
        find_target(name)  # refuses a resolution that it does not take
    else:
        check_named(name, trainer)


class Race:
    """Makes the trials of a race."""

    def __init__(
        self,
        request: SearchRequest,
        study: optuna.Study,
        tier: RaceTier,
        entrants: Sequence[Entrant],
        runner: TrialRunner,
    ) -> None:
        self._request, self._study, self._tier, self._runner = request, study, tier, runner
        reference = counts_of(reference_arch()).macs, runner.reference_ms
        self._field = Field(entrants, request.budget_ms, reference)
        self._chooser = Chooser(tier, request, self._field)
        self._weights = tier.trainer.weights.digests

    def trial(self, log: SearchLog) -> bool:
        """Make a trial; False where nothing is left to try, which the log notes.

        Raises:
            UserError: as `TrialRunner.trial`, `Chooser.offer` and `agree_on_weights`.
            KeyboardInterrupt: as `TrialRunner.trial`.
        """
        clock = Clock(log.phases)
        self._runner.stage("choosing a network")
        before = self._chooser.opened
        offered = self._chooser.offer(self._study)
        clock.lap("sampler" if self._chooser.opened == before else "training")  # of a parent
        try:
            self._runner.trial(log, lambda: self._enqueue_one(offered))
        except NothingLeft:
            if offered:  # other workers have taken them
                return True
            log.notes.append(f"nothing is left to try: {self._chooser.why_none(self._study)}")
            log.exhausted = True
            return False
        store = self._tier.trainer.weights
        if store.digests != self._weights:  # some were downloaded
            agree_on_weights(self._study, self._tier.trainer.folder, store)
            self._weights = store.digests
        return True

    def lines(self) -> list[str]:
        """What a reader should know of the ready networks: which were not measured, and that none fits."""
        budget_ms = self._request.budget_ms
        latencies = latencies_of(tried_in(self._study))
        lines = []
        if over := self._field.over(latencies_of(self._chooser.tried(self._study))):
            lines.append(f"surely over {budget_ms:g} ms, and so not measured: {', '.join(over)}")
        if over := sorted(self._chooser.over_limits - latencies.keys()):
            limits = self._request.limits.words.removeprefix(", ")
            lines.append(f"surely over {limits}, and so not measured: {', '.join(over)}")
        if latencies and min(latencies.values()) > budget_ms:
            name = min(latencies, key=latencies.__getitem__)
            lines.append(
                f"no ready network met {budget_ms:g} ms in its trial: the fastest, {name}, "
                f"took {latencies[name]:.3g} ms"
            )
        return lines

    def _enqueue_one(self, offered: Sequence[Candidate]) -> None:
        """Enqueue the first candidate that is in no trial, while no other process of the study decides; none where the
        user's sampler makes one up.

        Raises:
            NothingLeft: all are in a trial.
        """
        if not offered and self._request.sampler != "auto":
            return
        if not any(enqueue_candidate(self._request, self._study, candidate) for candidate in offered):
            raise NothingLeft
