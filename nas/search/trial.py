"""One trial: ask the study for a network, export it, measure it, estimate its quality, tell the study.

A trial that cannot be built, exported or measured is a failed trial with its reason. Its first step, until it is
measured, holds the lock of the measured device. The second, its training (`nas.search.trial_training`), is made here
without that lock, or by a worker that this one hands the trial over to. A network over the budget has no second step.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nas.errors import DiskFull, UserError, is_full, reason
from nas.export.artifact import Exporter
from nas.files import scratch
from nas.measure.cache import REFERENCE
from nas.measure.device import device_lock, open_measurer
from nas.measure.remote import LinkLost
from nas.measure.samples import AGAIN, SEARCH_PRECISION, SLOWED, MeasureError, is_decided, quanta, quanta_line
from nas.process import WorkerError
from nas.quality.candidate import Candidate, Kind
from nas.search.given import GIVEN, parameters_of
from nas.search.latency import TrialLatency
from nas.search.log import Clock, keep_samples
from nas.search.precision import Faster, first_that_fits
from nas.search.trial_training import LEASE_EXPIRED, MeasuredNetwork, Stage, TrainStep, judge, telling

if TYPE_CHECKING:
    import numpy as np
    import optuna
    from optuna.trial import FrozenTrial

    from nas.measure.cache import Cache
    from nas.measure.protocol import Measurer
    from nas.measure.remote import RemoteMeasurer
    from nas.measure.runtime import Settings
    from nas.measure.samples import Measurement
    from nas.networks.timm_network import TimmNetwork
    from nas.quality.tier import Tier
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest
    from nas.study.trials import Proposal
    from search_spaces import Arch

PROBES, PROBE_PAUSE_S = 4, 2.0
"""How often the reference network is measured, and the pause between, before a busy machine is refused."""
USUAL = 15
"""The last measurements, whose reference latencies' median is the usual one."""
T = TypeVar("T")


class TrialRunner:
    """Runs trials one after another, with one exporter process and one `Measurer` for all of them."""

    measurer: Measurer | RemoteMeasurer
    reference_ms: float
    """Median latency of the reference network, when it was last measured."""
    _lately: deque[float]
    """That of the last measurements."""
    unread: tuple[str, ...]
    """What cannot be read of a network here, a line each."""

    def __init__(
        self,
        request: SearchRequest,
        study: optuna.Study,
        tier: Tier,
        cache: Cache | None = None,
        calibration: np.ndarray | None = None,
        stage: Stage | None = None,
        hands_over: bool = False,
    ) -> None:
        """hands_over: other workers train what is measured."""
        self.request, self.study, self.tier, self.cache = request, study, tier, cache
        self.stage = stage or Stage(lambda *_: None)
        self.training = None if hands_over else TrainStep(request, study, tier, self.stage)
        self._calibration = calibration
        self.notes: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> TrialRunner:
        settings = self.request.settings
        self._folder = self._stack.enter_context(scratch(self.request.folder))
        self._exporter = self._stack.enter_context(Exporter(self._calibration))
        try:
            self.stage(f"measuring the reference network {REFERENCE}")
            with device_lock(settings.device):
                reference = self._exporter.write(reference_arch(), settings, self._folder / "reference")
                self.measurer = self._stack.enter_context(open_measurer(settings, reference, self._folder))
                found = self._steady(reference)
                self.reference_ms, self.unread = found.p50_ms, tuple(found.unread)
                self._lately = deque([found.p50_ms], USUAL)
                if self.request.limits.memory_mb is not None and found.memory_mb is None:
                    raise UserError(f"--memory-budget cannot be kept: {'; '.join(found.unread)}")
        except (MeasureError, WorkerError) as error:
            self._stack.close()
            raise UserError(f"the reference network {REFERENCE} cannot be measured here: {error}") from None
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _steady(self, reference: Path) -> Measurement:
        """Measure the reference network until its threads have their CPUs to themselves.

        Raises:
            UserError: other processes still use these CPUs a few seconds later; networks would be ranked by chance.
        """
        for attempt in range(PROBES):
            if attempt:
                time.sleep(PROBE_PAUSE_S)
            found = self.measurer.measure(reference, pause=self._exporter.running)
            if self.request.settings.threads == 1 or not quanta(found):
                return found
        from nas.measure.hardware import describe

        raise UserError(quanta_line(describe(self.request.settings)))

    def trial(
        self,
        log: SearchLog,
        propose: Callable[[], Proposal | None] = lambda: None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Run one trial, and tell the study its result or why it failed; none where others have begun the last ones.

        Args:
            propose, prepare: as `nas.study.trials.ask` calls them; with the device's lock, as they take a CPU.

        Raises:
            UserError: what ends the search: a full disk, or a connection that does not come back. The trial is retried.
            KeyboardInterrupt: the trial is retried by the next run of the command.
        """
        from nas.study.trials import MEASURED, AllBegun, ask, hand_over, heartbeat

        clock, self.notes = Clock(log.phases), log.notes
        with ExitStack() as device:
            device.enter_context(device_lock(self.request.settings.device))
            clock.lap("waiting for the device")
            try:
                trial = ask(self.study, propose, prepare, self.request.trials)
            except AllBegun:
                return
            finally:
                clock.lap("sampler")
            with self.stage.of(trial.number), telling(self.request, self.study, trial, log, clock):
                with heartbeat(trial):
                    clock.lap("storage")
                    candidate = suggest(trial, self.request, self.tier)
                    clock.lap("sampler")
                    if not self._measure_and_tell(trial, candidate, clock, device.close):
                        log.notes.append(LEASE_EXPIRED.format(trial.number))
                if self.training is None and MEASURED in trial.user_attrs:
                    hand_over(trial)
                    clock.lap("storage")

    def _measure_and_tell(
        self, trial: optuna.Trial, candidate: Candidate, clock: Clock, leave_device: Callable[[], None]
    ) -> bool:
        """Measure a network; where it is to be trained, do so or keep what was measured for others; tell the study.

        Args:
            leave_device: called before a training.

        Returns:
            False if the trial's lease had expired and another worker finished it.
        """
        from nas.networks.counts import counts_of
        from nas.study.trials import MEASURED, fail

        try:
            counts = counts_of(candidate.network)
        except UserError as error:  # this network's alone: the search goes on
            clock.lap("build and export")
            return fail(self.study, trial, reason(error))
        clock.lap("build and export")
        network = candidate.network
        latency = self._known(network.digest()) or self._latency_of(trial, network, clock)
        clock.lap("other")
        budget_ms = self.request.budget_ms
        may_fit = latency.excess(budget_ms) <= 0 or (candidate.kind == Kind.READY and latency.holds(budget_ms))
        may_fit = may_fit and not latency.over(self.request.limits)
        if self.tier.trained:  # a family's shared weights are trained for whatever comes first
            leave_device()
        if not (may_fit and self.tier.trained):
            return judge(self.request, self.study, self.tier, trial, candidate, counts, latency, clock, trains=may_fit)
        found = MeasuredNetwork.of(candidate, counts, latency)
        trial.set_user_attr(MEASURED, found.to_json())
        clock.lap("storage")
        return self.training is None or self.training.train(trial, found, clock)

    def _known(self, digest: str) -> TrialLatency | None:
        """What an earlier trial of this study measured for the same network, by the same code."""
        from nas.measure.cache import code_digest
        from nas.study.ledger import ledger_of

        for detail in ledger_of(self.study, look=False).read(_detail_of):
            if detail and detail["digest"] == digest and detail.get("code") == code_digest():
                return TrialLatency.read({**detail, "source": "reused"})
        return None

    def _latency_of(self, trial: optuna.Trial, network: Arch | TimmNetwork, clock: Clock) -> TrialLatency:
        """The latency of a network in the first precision of the search in which it surely meets the budget."""
        return first_that_fits(
            self.request,
            Faster.of_study(self.request.precisions, self.study),
            network.family,
            lambda precision, within: self._latency(trial, network, clock, precision, within),
            lambda line: self.notes.append(f"trial {trial.number}: {line}"),
        )

    def _latency(
        self, trial: optuna.Trial, network: Arch | TimmNetwork, clock: Clock, precision: str, within: float
    ) -> TrialLatency:
        """The latency of a network in a precision, and its throughput at the batch size that the search asks for.

        Args:
            within: half-width of the latency's interval, as a share of it.
        """
        settings, many = replace(self.request.settings, precision=precision), self.request.throughput_at
        batch_size = settings.batch_size
        result, when = self._timed(trial, network, settings, self.request.budget_ms, clock, within)
        throughput = result.throughput(batch_size)
        if many is not None:
            goal = None if result.p50_ms <= self.request.budget_ms else 0.0  # over budget: a few rounds are enough
            try:
                larger = replace(settings, batch_size=many)
                throughput = self._timed(trial, network, larger, goal, clock)[0].throughput(many)
            except LinkLost:
                raise
            except MeasureError as error:
                raise MeasureError(f"at batch {many}: {error}") from None
        return TrialLatency.of(result, throughput, "measured" if when is None else f"cache, {when}", precision)

    def measured_before(self) -> list[tuple[Arch, float]]:
        """As `Cache.relative`; none where several precisions are tried, as it knows one, or without a cache."""
        if len(self.request.precisions) > 1:
            return []
        return self._cached(lambda cache: cache.relative(self.request.settings.batch_size)) or []

    def _cached(self, action: Callable[[Cache], T]) -> T | None:
        """What the cache returns. A cache whose file fails (a full disk, say) is noted once and no longer used."""
        import sqlite3

        if self.cache is None:
            return None
        try:
            return action(self.cache)
        except sqlite3.Error as error:
            why = DiskFull(self.cache.path.parent, error=error) if is_full(error) else error
            self.cache = None
            self.notes.append(f"the cache of latencies is no longer used: {why}")
            return None

    def _timed(
        self,
        trial: optuna.Trial,
        network: Arch | TimmNetwork,
        settings: Settings,
        budget_ms: float | None,
        clock: Clock,
        within: float = SEARCH_PRECISION,
    ) -> tuple[Measurement, str | None]:
        """A network's measurement and, where it is from the cache, when it was made."""
        when: str | None = None
        batch_size, precision = settings.batch_size, self._other_precision(settings)
        found = self._cached(lambda cache: cache.get(network, batch_size, self.reference_ms, precision))
        if found is not None and not quanta(found[1]) and is_decided(found[1].rounds_ms, budget_ms, within):
            when, result = found
        else:
            result = self._measured(network, settings, budget_ms, clock, within)
        record = {"trial": trial.number, "batch_size": batch_size, "cached": when}
        record |= {"precision": precision} if precision else {}
        keep_samples(self.request.folder, record | result.to_dict())
        return result, when

    def _other_precision(self, settings: Settings) -> str | None:
        """Where it is not that of the reference network."""
        return settings.precision if settings.precision != self.request.settings.precision else None

    def _measured(
        self, network: Arch | TimmNetwork, settings: Settings, budget_ms: float | None, clock: Clock, within: float
    ) -> Measurement:
        """Export a network and measure it; the cache keeps the result, unless the machine was busy."""
        precision = self._other_precision(settings)
        if settings == self.request.settings:
            self.measurer.prepare()
        self.stage("exporting")
        path = self._exporter.write(network, settings, self._folder / "candidate")
        clock.lap("build and export")
        self.stage("measuring")

        def measure() -> Measurement:
            found = self.measurer.measure(
                path,
                budget_ms,
                pause=self._exporter.running,
                batch_size=settings.batch_size,
                precision=within,
                computed_in=precision,
            )
            clock.add("session", found.load_s)
            clock.lap("timed runs", less=found.load_s)
            return found

        result, usual_ms = measure(), statistics.median(self._lately)
        for _ in range(AGAIN):
            if not slowed(result, usual_ms, budget_ms):
                break
            self.notes.append(
                f"the reference network took {result.reference_p50_ms:.3g} ms, usually {usual_ms:.3g}: the machine was "
                "slower, so a network that may meet the budget is measured again"
            )
            try:
                result = min(result, measure(), key=lambda each: each.reference_p50_ms or math.inf)
            except LinkLost:
                raise
            except MeasureError as error:
                self.notes.append(f"not measured again: {error}")
                break
        if result.reference_p50_ms is not None:
            self.reference_ms = result.reference_p50_ms
            self._lately.append(self.reference_ms)
        if not quanta(result):
            self._cached(lambda cache: cache.put(network, settings.batch_size, result, precision))
        return result


def suggest(trial: optuna.Trial, request: SearchRequest, tier: Tier | None = None) -> Candidate:
    """The candidate of a trial: that which it was given, or what the sampler makes up.

    The sampler chooses every parameter of the shared vocabulary, and they are decoded to the family's Arch. A given
    candidate that has parameters brings them.

    Args:
        tier: says where the weights of what the sampler makes up are from; None: they are random.

    Raises:
        ValueError: a given candidate that cannot be read here.
    """
    from search_spaces.registry import FAMILIES
    from search_spaces.space import LEVELS, PARAMETERS

    given = trial.user_attrs.get(GIVEN)
    if given is not None:
        try:
            candidate = Candidate.from_json(given)
        except UserError as error:  # another version of timm's, say
            raise ValueError(str(error)) from None
        if not parameters_of(request, candidate):
            return candidate
    family = trial.suggest_categorical("family", list(request.families))
    params = {name: trial.suggest_int(name, 0, LEVELS - 1) for name in PARAMETERS}
    if given is not None:
        return candidate
    arch = FAMILIES[family].space.decode(params, request.num_classes, request.resolution)
    found = tier.candidate_of(arch) if tier else Candidate(arch)
    return replace(found, name=trial.user_attrs.get("name", ""))


def slowed(found: Measurement, usual_ms: float, budget_ms: float | None) -> bool:
    """Whether a network is over a budget only because the machine was slow: the reference network took `SLOWED` times
    its usual latency or more in the same rounds, and without that the network is within the budget.

    Args:
        usual_ms: the usual latency of the reference network.
    """
    reference_ms = found.reference_p50_ms
    if budget_ms is None or reference_ms is None or reference_ms < SLOWED * usual_ms:
        return False
    return found.p50_ms > budget_ms >= found.p50_ms * usual_ms / reference_ms


def open_cache(request: SearchRequest, say: Callable[[str], None]) -> Cache | None:
    """Open the latencies that this machine has cached; None, and one line to `say`, where their file cannot be used."""
    import sqlite3

    from nas.measure.cache import Cache, default_path, machine_of

    machine = machine_of(request.settings)
    try:
        return Cache(machine)
    except (OSError, sqlite3.Error) as error:
        say(f"no earlier latencies are used and none are kept: {default_path()}: {error}")
        return None


def reference_arch() -> Arch:
    """The network that every measurement is compared with."""
    from search_spaces import get_arch

    return get_arch(REFERENCE)


def _detail_of(trial: FrozenTrial) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = trial.user_attrs.get("detail")
    return found
