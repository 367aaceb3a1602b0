"""The second step of a trial: the network that was measured is trained and judged, and the study is told.

The step needs no measured device. What it goes by is kept in the trial, so that any worker of the study can make it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

from nas.errors import FAULTS, DiskFull, TrainingError, UserError, is_full, reason
from nas.measure.remote import LinkLost
from nas.measure.samples import MeasureError
from nas.quality.candidate import Candidate
from nas.search.contest import RACE
from nas.search.given import origin
from nas.search.latency import TrialLatency
from nas.search.log import Clock
from nas.search.precision import as_shipped
from nas.search.rows import INTERRUPTED
from nas.study.jobs import TRAINS, workers

if TYPE_CHECKING:
    from collections.abc import Callable

    import optuna

    from nas.measure.budget import Limits
    from nas.networks.counts import Counts
    from nas.quality.tier import Estimate, Tier, TrainedTier
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest

logger = logging.getLogger(__name__)
LEASE_EXPIRED = "trial {}: its lease expired; another worker retried it, so this result was dropped"
UNABLE = 2
"""Trials in a row that a worker cannot train before it ends: a GPU that is lost fails each within a second."""
WAITS = "trial {} is measured and waits for its training: the same command goes on with it"


@dataclass
class Stage:
    """Tells a display what goes on (what, done, total), and in which trial."""

    tell: Callable[[str, int, int], None]
    trial: int | None = None

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        self.tell(what if self.trial is None else f"trial {self.trial}: {what}", done, total)

    @contextmanager
    def of(self, trial: int) -> Iterator[None]:
        self.trial = trial
        try:
            yield
        finally:
            self.trial = None


@dataclass(frozen=True)
class MeasuredNetwork:
    """What a training needs to know of a trial, as the trial keeps it."""

    candidate: Candidate
    latency: TrialLatency
    features: Sequence[float]
    """See `nas.quality.surrogate.describe_candidate`: what is proposed meanwhile goes by them."""

    @classmethod
    def of(cls, candidate: Candidate, counts: Counts, latency: TrialLatency) -> Self:
        from nas.quality.surrogate import describe_candidate

        return cls(candidate, latency, describe_candidate(candidate, counts).tolist())

    def to_json(self) -> dict[str, object]:
        return {
            "candidate": self.candidate.to_json(),
            "latency": self.latency.to_json(),
            "features": [*self.features],
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, object]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a network that cannot be read here, of another version of timm's, say.
        """
        from pydantic import TypeAdapter

        latency = TypeAdapter(dict[str, object]).validate_python(kept["latency"])
        features = TypeAdapter(list[float]).validate_python(kept["features"])
        try:
            candidate = Candidate.from_json(kept["candidate"])
        except UserError as error:
            raise ValueError(str(error)) from None
        return cls(candidate, TrialLatency.read(latency), features)


class TrainStep:
    """Trains what was measured, one trial after another."""

    def __init__(self, request: SearchRequest, study: optuna.Study, tier: Tier, stage: Stage) -> None:
        self._request, self._study, self._tier, self._stage = request, study, tier, stage
        self.passed_on: set[int] = set()
        """Numbers of trials that this process cannot train, and other workers may."""
        self._unable = 0
        """How many in a row."""

    def claimed(self, log: SearchLog) -> bool:
        """Train the oldest trial that waits for it; False where none does.

        Raises:
            UserError: what ends the search: a full disk, or `UNABLE` trials in a row that cannot be trained here. The
                trial waits again.
            KeyboardInterrupt: as UserError.
        """
        from nas.study.trials import MEASURED, claim, fail, heartbeat, pass_on

        clock = Clock(log.phases)
        others = workers(self._study, TRAINS) > 1
        trial = claim(self._study, self.passed_on if others else ())
        clock.lap("storage")
        if trial is None:
            return False
        why = ""
        with self._stage.of(trial.number), telling(self._request, self._study, trial, log, clock):
            with heartbeat(trial):
                try:
                    found = MeasuredNetwork.from_json(trial.user_attrs[MEASURED])
                    told = self.train(trial, found, clock, passes_on=others)
                except Unable as error:
                    why, told = str(error), True
                except ValueError as error:  # another version of timm, say
                    why, told = reason(error), True
            if why and not others:
                told = fail(self._study, trial, why)
            elif why and pass_on(self._study, trial, why):
                self.passed_on.add(trial.number)
                log.notes.append(f"trial {trial.number} cannot be trained here, and waits for another worker: {why}")
            if not told:
                log.notes.append(LEASE_EXPIRED.format(trial.number))
        self._unable = self._unable + 1 if why and others else 0
        if self._unable >= UNABLE:
            raise UserError(f"this process trains no more, which others may: {why}")
        return True

    def train(self, trial: optuna.Trial, found: MeasuredNetwork, clock: Clock, passes_on: bool = False) -> bool:
        """Train a network as far as its tier lets it go, and tell the study.

        Args:
            passes_on: another worker may try what this one cannot.

        Returns:
            False if the trial's lease had expired and another worker finished it.

        Raises:
            Unable: this worker cannot train it.
        """
        from nas.networks.counts import counts_of

        request, tier, candidate = self._request, self._tier, found.candidate
        with cast("TrainedTier", tier).trainer.alone():
            counts = counts_of(candidate.network)
            return judge(
                request,
                self._study,
                tier,
                trial,
                candidate,
                counts,
                found.latency,
                clock,
                trains=True,
                passes_on=passes_on,
            )


class Unable(Exception):
    """This worker cannot make a training; the reason."""


def is_of_worker(error: BaseException) -> bool:
    """Whether a training failed for want of what another worker may have: memory, a file, weights, a GPU that works."""
    from nas.training.device import out_of_memory

    cause = error.__cause__ if isinstance(error, TrainingError) else error
    if cause is None:
        return False
    return isinstance(cause, OSError | UserError) or out_of_memory(cause) or "CUDA error" in str(cause)


def judge(
    request: SearchRequest,
    study: optuna.Study,
    tier: Tier,
    trial: optuna.Trial,
    candidate: Candidate,
    counts: Counts,
    latency: TrialLatency,
    clock: Clock,
    *,
    trains: bool,
    passes_on: bool = False,
) -> bool:
    """Estimate the quality of a measured network, and tell the study.

    Args:
        trains: the tier may train it.
        passes_on: another worker may try what this one cannot.

    Returns:
        False if the trial's lease had expired and another worker finished it.

    Raises:
        Unable: with `passes_on`, it is this worker that lacks something: memory, a file.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    from nas.study.trials import fail, finish

    try:
        estimate = (tier.estimate if trains else tier.predict)(candidate, counts)
    except UpdateFinishedTrialError:
        raise
    except FAULTS as error:  # this network's alone: it is not retried
        if is_full(error):
            raise
        clock.lap("training")
        logger.debug("trial %d failed", trial.number, exc_info=True)
        if passes_on and is_of_worker(error):
            raise Unable(reason(error)) from error
        return fail(study, trial, reason(error))
    clock.lap("training" if tier.trained else "estimate")
    estimate = as_shipped(estimate, latency)
    limits = request.limits
    told = finish(
        study,
        trial,
        quality=estimate.score,
        throughput=latency.throughput,
        constraint=latency.excess(request.budget_ms),
        attrs=attributes(candidate, counts, latency, estimate, request.budget_ms, limits)
        | (origin(candidate) if tier.name == RACE else {}),
        limits=limits.excess(latency.memory_mb, latency.file_mb),
    )
    clock.lap("storage")
    return told


def attributes(
    candidate: Candidate,
    counts: Counts,
    latency: TrialLatency,
    estimate: Estimate,
    budget_ms: float,
    limits: Limits,
) -> dict[str, object]:
    """The attributes of a measured trial in its study: columns of the dashboard, and the rest as its detail."""
    from nas.measure.cache import code_digest

    network, over = candidate.network, latency.over(limits)
    document: object = json.loads(network.to_json())
    return {
        "family": network.family,
        "latency_ms": latency.latency_ms,
        "feasible": int(latency.excess(budget_ms) <= 0 and not over),
        "budget_ms": budget_ms,
        "params_m": counts.params / 1e6,
        "macs_m": counts.macs / 1e6,
        "resolution": network.resolution,
        "arch": document,
        "detail": {
            "digest": network.digest(),
            "key": candidate.key,
            **estimate.to_dict(),
            "training": estimate.training.to_json() if estimate.training else {},
            "code": code_digest(),
            **latency.to_json(),
            **({"over": [*over]} if over else {}),
        },
    }


@contextmanager
def telling(
    request: SearchRequest, study: optuna.Study, trial: optuna.Trial, log: SearchLog, clock: Clock
) -> Iterator[None]:
    """Tell the study and the log how a trial ends where the block raises.

    Raises:
        UserError: what ends the search: a full disk, or a connection that does not come back. The trial is retried; one
            that is measured waits for its training.
        KeyboardInterrupt: as UserError.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    from nas.study.trials import fail

    try:
        yield
    except LinkLost as error:
        clock.lap("timed runs")
        again = "retry_of" not in trial.user_attrs
        fail(study, trial, str(error), retry=again)
        log.notes.append(f"trial {trial.number}: {error}" + "; its parameters were tried again" * again)
    except UpdateFinishedTrialError:
        log.notes.append(LEASE_EXPIRED.format(trial.number))
    except FAULTS as error:
        clock.lap("timed runs" if isinstance(error, MeasureError) else "build and export")
        logger.debug("trial %d failed", trial.number, exc_info=True)
        full = is_full(error)
        try:
            if full or isinstance(error, UserError):  # a full disk, a connection that does not come back
                _give_up(study, trial, reason(error), log)
            else:
                fail(study, trial, reason(error))
        finally:
            clock.lap("storage")
        if full and not isinstance(error, DiskFull):
            raise DiskFull(request.folder, error=error) from error
        if full or isinstance(error, UserError):
            raise
    except KeyboardInterrupt:
        _give_up(study, trial, INTERRUPTED, log)
        raise


def _give_up(study: optuna.Study, trial: optuna.Trial, why: str, log: SearchLog) -> None:
    """Let a trial wait for its training where it is measured; else fail it and enqueue it again."""
    from optuna.exceptions import UpdateFinishedTrialError

    from nas.study.trials import MEASURED, fail, hand_over

    if MEASURED not in trial.user_attrs:
        fail(study, trial, why, retry=True)
        return
    with suppress(UpdateFinishedTrialError):
        hand_over(trial)
        log.notes.append(WAITS.format(trial.number))
