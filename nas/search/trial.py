"""One trial: ask the study for a network, export it, measure it, estimate it, tell the study."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import FAULTS, DiskFull, UserError, is_full, reason
from nas.export.artifact import Exporter
from nas.files import scratch
from nas.measure.cache import REFERENCE
from nas.measure.device import device_lock, open_measurer
from nas.measure.remote import LinkLost
from nas.measure.samples import SURE_ROUNDS, MeasureError, quanta, quanta_line, settled
from nas.process import WorkerError
from nas.search.log import Clock, keep_samples
from nas.search.rows import INTERRUPTED, LATENCY_KEYS

if TYPE_CHECKING:
    import numpy as np
    import optuna

    from nas.measure.cache import Cache
    from nas.measure.samples import Measurement
    from nas.quality.tier import Tier
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest
    from search_spaces import Arch

log = logging.getLogger(__name__)
PROBES, PROBE_PAUSE_S = 4, 2.0
"""How often the reference network is measured, and the pause between, until a busy machine is refused."""
SWEPT = "trial {} was taken for dead by another worker; its result was dropped"


@dataclass
class Stage:
    """Tells a display what goes on (what, done, in all), and in which trial."""

    tell: Callable[[str, int, int], None]
    trial: int | None = None

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        self.tell(what if self.trial is None else f"trial {self.trial}: {what}", done, total)


class TrialRunner:
    """Runs one trial after the other with a persistent exporter process and a `Measurer`."""

    def __init__(
        self,
        options: SearchRequest,
        study: optuna.Study,
        tier: Tier,
        cache: Cache | None = None,
        calibration: np.ndarray | None = None,
        stage: Stage | None = None,
    ) -> None:
        self.options, self.study, self.tier, self.cache = options, study, tier, cache
        self.stage = stage or Stage(lambda *_: None)
        self._calibration = calibration
        self.notes: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> TrialRunner:
        self._folder = self._stack.enter_context(scratch(self.options.folder))
        self._exporter = self._stack.enter_context(Exporter(self._calibration))
        try:
            self.stage(f"measuring the reference network {REFERENCE}")
            with device_lock(self.options.settings.device):
                reference = self._exporter.write(reference_arch(), self.options.settings, self._folder / "reference")
                self.measurer = self._stack.enter_context(open_measurer(self.options.settings, reference, self._folder))
                self.reference_ms = self._steady(reference).p50_ms
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
        """The reference network's latency, where its threads have their CPUs for themselves.

        Raises:
            UserError: others use them, also a few seconds later: networks would be ranked by chance.
        """
        for attempt in range(PROBES):
            if attempt:
                time.sleep(PROBE_PAUSE_S)
            found = self.measurer.measure(reference, pause=self._exporter.running)
            if self.options.settings.threads == 1 or not quanta(found):
                return found
        from nas.measure.hardware import describe

        raise UserError(quanta_line(describe(self.options.settings)))

    def trial(self, run: SearchLog) -> None:
        """Ask, build, export, measure, estimate, tell."""
        from optuna.exceptions import UpdateFinishedTrialError

        from nas.study.trials import ask, fail, heartbeat

        clock, self.notes = Clock(run.phases), run.notes
        with ExitStack() as living, ExitStack() as device:
            device.enter_context(device_lock(self.options.settings.device))
            clock.lap("waiting for the device")
            trial = ask(self.study)
            self.stage.trial = trial.number
            living.callback(setattr, self.stage, "trial", None)
            try:
                living.enter_context(heartbeat(trial))
                clock.lap("storage")
                arch = suggest(trial, self.options)
                clock.lap("sampler")
                if not self._measure_and_tell(trial, arch, clock, device.close):
                    run.notes.append(SWEPT.format(trial.number))
            except LinkLost as error:
                clock.lap("timed runs")
                again = "retry_of" not in trial.user_attrs
                fail(self.study, trial, str(error), retry=again)
                run.notes.append(f"trial {trial.number}: {error}" + "; its parameters were tried again" * again)
            except UpdateFinishedTrialError:
                run.notes.append(SWEPT.format(trial.number))
            except FAULTS as error:
                clock.lap("timed runs" if isinstance(error, MeasureError) else "build and export")
                full = is_full(error)
                log.debug("trial %d failed", trial.number, exc_info=True)
                ends = full or isinstance(error, UserError)  # a full disk, a connection that does not come back
                fail(self.study, trial, reason(error), retry=ends)
                clock.lap("storage")
                if ends:
                    if full and not isinstance(error, DiskFull):
                        raise DiskFull(self.options.folder, error=error) from error
                    raise
            except KeyboardInterrupt:
                fail(self.study, trial, INTERRUPTED, retry=True)
                raise

    def _measure_and_tell(
        self, trial: optuna.Trial, arch: Arch, clock: Clock, leave_device: Callable[[], None]
    ) -> bool:
        """False if the trial had been taken for dead by another worker. leave_device: called before a training."""
        from optuna.exceptions import UpdateFinishedTrialError

        from nas.measure.cache import code_digest
        from nas.study.trials import fail, finish
        from search_spaces import table

        digest = arch.digest()
        counts = table(arch)
        clock.lap("build and export")
        latency = self._known(digest) or self._latency(trial, arch, clock)
        clock.lap("other")
        constraint = latency["latency_ms"] / self.options.budget_ms - 1
        if self.tier.trained:  # a family's shared weights are trained for whatever comes first
            leave_device()
        try:
            estimate = (self.tier.estimate if constraint <= 0 else self.tier.predict)(arch, counts)
        except UpdateFinishedTrialError:
            raise
        except FAULTS as error:  # this network's alone: it is not tried again
            if is_full(error):
                raise
            clock.lap("training")
            log.debug("trial %d failed", trial.number, exc_info=True)
            return fail(self.study, trial, reason(error))
        clock.lap("training" if self.tier.trained else "estimate")
        told = finish(
            self.study,
            trial,
            quality=estimate.score,
            throughput=latency["throughput"],
            constraint=constraint,
            attrs={
                "family": arch.family,
                "latency_ms": latency["latency_ms"],
                "feasible": int(constraint <= 0),
                "budget_ms": self.options.budget_ms,
                "params_m": counts.params() / 1e6,
                "macs_m": counts.macs() / 1e6,
                "resolution": arch.resolution,
                "arch": arch.model_dump(mode="json"),
                "detail": {
                    "digest": digest,
                    **estimate.to_dict(),
                    "training": dict(estimate.training),
                    "code": code_digest(),
                    **latency,
                },
            },
        )
        clock.lap("storage")
        return told

    def _known(self, digest: str) -> dict[str, Any] | None:
        """What an earlier trial of this study measured for the same Arch, by the same code."""
        from nas.measure.cache import code_digest

        for trial in self.study.get_trials(deepcopy=False):
            detail = trial.user_attrs.get("detail")
            if detail and detail["digest"] == digest and detail.get("code") == code_digest():
                return {key: detail.get(key) for key in LATENCY_KEYS} | {"source": "reused"}
        return None

    def _latency(self, trial: optuna.Trial, arch: Arch, clock: Clock) -> dict[str, Any]:
        """What measuring says (LATENCY_KEYS), and whether it was measured now; of a few rounds without an interval."""
        batch_size, many = self.options.settings.batch_size, self.options.throughput_at
        result, when = self._timed(trial, arch, batch_size, self.options.budget_ms, clock)
        rounds = len(result.rounds_ms)
        low, high = result.ci_ms if rounds >= SURE_ROUNDS else (None, None)
        throughput = result.throughput(batch_size)
        if many is not None:
            goal = None if result.p50_ms <= self.options.budget_ms else 0.0  # over budget: a few rounds are enough
            try:
                throughput = self._timed(trial, arch, many, goal, clock)[0].throughput(many)
            except LinkLost:
                raise
            except MeasureError as error:
                raise MeasureError(f"at batch {many}: {error}") from None
        return {
            "latency_ms": result.p50_ms,
            "latency_p95_ms": result.p95_ms,
            "latency_ci_low_ms": low,
            "latency_ci_high_ms": high,
            "samples": result.n,
            "rounds": rounds,
            "reference_ms": result.reference_p50_ms,
            "reference_drift": result.reference_drift,
            "throughput": throughput,
            "source": "measured" if when is None else f"cache, {when}",
        }

    def _cached(self, action: Callable[[Cache], Any]) -> Any:
        """What the cache says; a file that fails (a full disk, say) is told once and no longer used."""
        import sqlite3

        if self.cache is None:
            return None
        try:
            return action(self.cache)
        except sqlite3.Error as error:
            why = DiskFull(self.cache.path.parent, error=error) if is_full(error) else error
            self.cache = None
            self.notes.append(f"the cache of latencies is no longer used: {why}")

    def _timed(
        self, trial: optuna.Trial, arch: Arch, batch_size: int, budget_ms: float | None, clock: Clock
    ) -> tuple[Measurement, str | None]:
        """A network's result and, where it came from the cache, when it was measured."""
        found = self._cached(lambda cache: cache.get(arch, batch_size, self.reference_ms))
        if found is not None and not quanta(found[1]) and settled(found[1].rounds_ms, budget_ms):
            when, result = found
        else:
            when = None
            settings = replace(self.options.settings, batch_size=batch_size)
            if settings == self.options.settings:
                self.measurer.prepare()
            self.stage("exporting")
            path = self._exporter.write(arch, settings, self._folder / "candidate")
            clock.lap("build and export")
            self.stage("measuring")
            result = self.measurer.measure(path, budget_ms, pause=self._exporter.running, batch_size=batch_size)
            clock.add("session", result.load_s)
            clock.lap("timed runs", less=result.load_s)
            self.reference_ms = result.reference_p50_ms
            if not quanta(result):
                self._cached(lambda cache: cache.put(arch, batch_size, result))
        record = {"trial": trial.number, "batch_size": batch_size, "cached": when}
        keep_samples(self.options.folder, record | result.to_dict())
        return result, when


def suggest(trial: optuna.Trial, options: SearchRequest) -> Arch:
    """Every parameter of the shared vocabulary, then the family's Arch."""
    from search_spaces.registry import FAMILIES
    from search_spaces.space import LEVELS, PARAMETERS

    family = trial.suggest_categorical("family", list(options.families))
    params = {name: trial.suggest_int(name, 0, LEVELS - 1) for name in PARAMETERS}
    return FAMILIES[family].space.decode(params, options.num_classes, options.resolution)


def open_cache(options: SearchRequest, say: Callable[[str], None]) -> Cache | None:
    """Earlier results of this machine; None, told in one line, where the cache's file cannot be used."""
    import sqlite3

    from nas.measure.cache import Cache, default_path, machine_of

    machine = machine_of(options.settings)
    try:
        return Cache(machine)
    except (OSError, sqlite3.Error) as error:
        say(f"no earlier latencies are used and none are kept: {default_path()}: {error}")
        return None


def reference_arch() -> Arch:
    from search_spaces import get_arch

    return get_arch(REFERENCE)
