"""The search: ask the study for a network, export it, measure it, estimate it, tell the study.

A trial that cannot be built, exported or measured is a failed trial with its reason. On a CPU the device that is
measured is the one that computes, so a worker holds the device's lock for a whole trial, but for its training, which
gives way to what is timed (`nas.lock`); workers on several machines share a study through a database.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.data.inputs import identity
from nas.errors import FAULTS, DiskFull, UserError, is_full, reason
from nas.export.artifact import Exporter
from nas.files import replace_file, scratch, sweep_drafts, unwritable
from nas.identity import older
from nas.measure.cache import REFERENCE
from nas.measure.device import check_settings, device_label, device_lock, open_measurer
from nas.measure.protocol import SURE_ROUNDS, MeasureError, quanta, quanta_line, settled
from nas.measure.remote import LinkLost
from nas.measure.runtime import Settings
from nas.process import WorkerError
from nas.search.rows import INTERRUPTED, LATENCY_KEYS

if TYPE_CHECKING:
    import numpy as np
    import optuna

    from nas.data.dataset import ImageData
    from nas.measure.cache import Cache
    from nas.measure.protocol import Measurement
    from nas.networks.targets import Target
    from nas.quality.schooling import Lessons
    from nas.quality.tier import Tier
    from search_spaces import Arch

log = logging.getLogger(__name__)
PROBES, PROBE_PAUSE_S = 4, 2.0
"""How often the reference network is measured, and the pause between, until a busy machine is refused."""
JOURNAL, HARDWARE, LESSONS = "study.journal", "hardware.json", "lessons.json"
ELSEWHERE = ("budget_ms", "families", "space", "hardware", "throughput_at")
"""What a study must agree on and a training does not depend on."""
RECENT = 20
"""Trials whose time says how long the next ones take."""
SWEPT = "trial {} was taken for dead by another worker; its result was dropped"
PHASES = (
    "start",
    "waiting for the device",
    "sampler",
    "build and export",
    "session",
    "timed runs",
    "training",
    "estimate",
    "storage",
    "other",
)


@dataclass(frozen=True)
class Options:
    """What a search is asked to do.

    resolution: of all networks (None: it is searched). lessons: how it trains. throughput_at: batch size whose
    throughput is the second objective (None: that of the latency). against: networks of the closing run (`targets`).
    cache: whether latencies measured earlier on this machine count.
    """

    budget_ms: float
    settings: Settings
    families: tuple[str, ...]
    trials: int
    timeout_s: float | None
    study: str
    out: Path
    storage: str | None
    sampler: str
    seed: int | None
    num_classes: int
    quality: str = "prior"
    resolution: int | None = None
    lessons: Lessons | None = None
    throughput_at: int | None = None
    against: tuple[Target, ...] = ()
    cache: bool = True

    @property
    def folder(self) -> Path:
        return self.out / self.study


@dataclass
class Progress:
    """What a display shows between trials. trial_s: seconds that one took lately, None before the first; measuring_s:
    without its training."""

    done: int
    total: int
    feasible: int
    best: dict[str, Any] | None
    trial_s: float | None
    measuring_s: float


@dataclass
class Stage:
    """Tells a display what goes on (what, done, in all), and in which trial."""

    tell: Callable[[str, int, int], None]
    trial: int | None = None

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        self.tell(what if self.trial is None else f"trial {self.trial}: {what}", done, total)


@dataclass
class Run:
    """What happened in this process, for the breakdown and the exit.

    hardware: as described at the start. calibration: images for int8, where there are any. failures: a line for what
    ended it before its time.
    """

    started: str
    wall_s: float = 0.0
    trial_s: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    tier: Tier | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    calibration: np.ndarray | None = None


def default_study(options: Mapping[str, Any]) -> str:
    """Study name from device, runtime, budget, families, and whatever else is not as it is by default."""
    from nas.measure.device import default_threads
    from search_spaces.registry import FAMILIES

    settings = options["settings"]
    parts = [
        device_label(settings.device),
        settings.runtime if settings.precision == "fp32" else f"{settings.runtime}-{settings.precision}",
        f"{options['budget_ms']:g}ms",
        "all" if set(options["families"]) == set(FAMILIES) else "+".join(sorted(options["families"])),
    ]
    for form, value, usual in (
        ("{}t", settings.threads, default_threads(settings.device)),
        ("b{}", settings.batch_size, 1),
        ("at{}", options.get("throughput_at"), None),
        ("{}px", options.get("resolution"), None),
        ("{}c", options.get("num_classes") or 1000, 1000),
        ("{}", options["quality"], "prior"),
    ):
        if value != usual:
            parts.append(form.format(value))
    return "-".join(parts)


def meta(options: Options, data: ImageData | None = None) -> dict[str, Any]:
    """What must agree for a command to continue a study; `data` are the images of its lessons."""
    from nas.measure.hardware import fingerprint
    from search_spaces.registry import FAMILIES
    from search_spaces.space import fingerprint as space_fingerprint

    agreed = {
        "budget_ms": options.budget_ms,
        "families": sorted(options.families),
        "space": space_fingerprint({name: FAMILIES[name].space for name in options.families}),
        "num_classes": options.num_classes,
        "quality": options.quality,
        "hardware": fingerprint(options.settings),
    }
    if options.resolution is not None:
        agreed["resolution"] = options.resolution
    if options.throughput_at is not None:
        agreed["throughput_at"] = options.throughput_at
    if options.lessons is not None:
        lessons = options.lessons
        agreed["training"] = {
            "train_images": lessons.images,
            "epochs": lessons.epochs,
            "seed": options.seed or 0,
        }
        agreed |= identity(data, parent=network_of(lessons.parent))
    return agreed


def network_of(name: str | None) -> tuple[Arch, str | Path] | None:
    """The Arch of a trained network, and where its weights are; None without a name."""
    from nas.networks.targets import find_target

    if name is None:
        return None
    target = find_target(name)
    return target.arch, target.weights or "timm"


def search(
    options: Options,
    progress: Callable[[Progress], None],
    say: Callable[[str], None],
    phase: Callable[[str, int, int], None] = lambda *_: None,
    data: ImageData | None = None,
) -> tuple[optuna.Study, Run]:
    """Run trials until the study holds `options.trials`, the time is up, or Ctrl-C.

    Args:
        phase: called with what goes on inside a trial, what is done of it and its total, 0 where nothing is counted.
        data: the images of `options.lessons`.

    Raises:
        UserError: settings this machine cannot measure, a folder or storage that cannot be used, a study that
            disagrees with this command.
    """
    from nas.export.quantize import NOISE, calibration_images
    from nas.measure.hardware import busy_line
    from nas.quality.schooling import open_schooling
    from nas.quality.tiers import TIERS
    from nas.study.samplers import make_sampler
    from nas.study.storage import storage_errors
    from nas.study.trials import due, open_study, sweep

    check_settings(options.settings)
    sampler = make_sampler(options.sampler, options.seed)
    made = make_folder(options.folder)
    sweep_drafts(options.folder)
    storage = storage_of(options)
    try:
        agreed = meta(options, data)
        lessons = lessons_of(options.folder, agreed) if options.lessons else None
        study = open_study(options.study, storage, agreed, sampler)
    except UserError:
        with suppress(OSError):  # it holds something
            if made:
                options.folder.rmdir()
        raise
    if lessons is not None:
        replace_file(options.folder / LESSONS, lessons)
    run = Run(datetime.now().astimezone().isoformat(timespec="seconds"))
    with device_lock(options.settings.device):  # what another vitnas does there is not this machine's load
        run.hardware = write_hardware(options)
    lines = [busy_line(run.hardware)]
    if data is not None:
        from nas.data.about import describe
        from nas.data.look import oddities

        say(describe(data))
        lines += oddities(data)
    if options.settings.precision != "fp32":
        lines.append(f"latency is measured in {options.settings.precision}; quality is that of fp32")
    if options.settings.precision == "int8":
        if data is None:
            lines.append(NOISE)
        else:
            run.calibration, skipped = calibration_images(data, options.resolution or 224)
            lines.append(skipped)
    for line in filter(None, lines):
        say(line)
        run.notes.append(line)
    begun = time.perf_counter()
    deadline = begun + options.timeout_s if options.timeout_s is not None else None
    with ExitStack() as stack:
        stack.enter_context(storage_errors(storage))
        stack.enter_context(interruptible())
        try:
            starting = Clock(run.phases)

            def late() -> bool:
                return deadline is not None and time.perf_counter() >= deadline

            stage = Stage(phase)
            progress(state_of(study, options, run))
            schooling = None
            if options.lessons is not None and data is not None:
                folder, seed = options.folder / "training", options.seed or 0
                schooling = open_schooling(options.lessons, data, study, folder, seed, options.resolution, stage, say)
            run.tier = TIERS[options.quality](schooling)
            if run.tier.trained and options.sampler == "auto":
                from nas.search.propose import Proposer

                study.sampler = Proposer(run.tier, options)
            if not due(study, options.trials, say, late):
                say("no trial is left to begin: only the end is made again (more --trials add some)")
            else:
                known = open_cache(options, say) if options.cache else None
                if known is not None:
                    stack.callback(known.close)
                worker = stack.enter_context(TrialRunner(options, study, run.tier, known, run.calibration, stage))
                enqueue_published(options, study, worker.reference_ms)
                starting.lap("start")
                while due(study, options.trials, say, late) and not late():
                    started = time.perf_counter()
                    try:
                        worker.trial(run)
                    finally:
                        run.trial_s.append(time.perf_counter() - started)
                    refuse_hopeless(run.tier, options.families)
                    around = Clock(run.phases)
                    progress(state_of(study, options, run))
                    around.lap("other")
        except KeyboardInterrupt:
            if run.tier is None:
                raise
            run.interrupted = True
            say("interrupted: finishing with what was measured; the same command continues")
        except UserError as error:  # a remote device that does not come back, a full disk, no tier
            if run.tier is None or not run.trial_s or not complete(study):
                if made and options.storage is None:
                    withdraw(study, options.folder)
                raise
            run.interrupted = True
            run.failures.append(str(error))
            say(f"{error}; finishing with what was measured; the same command continues")
        if not run.failures:
            sweep(study)
    run.wall_s = time.perf_counter() - begun
    return study, run


def withdraw(study: optuna.Study, folder: Path) -> None:
    """Remove a study that this process has made, where it has no trial and no other worker is seen: it would bind the
    command that is tried next, with other threads, say."""
    from nas.study.storage import alone

    def decide() -> None:
        if not study.get_trials(deepcopy=False) and not (folder / "tmp").exists():
            for name in (JOURNAL, f"{JOURNAL}.guard", HARDWARE, LESSONS):
                (folder / name).unlink(missing_ok=True)

    alone(study._storage, decide)
    with suppress(OSError):  # it holds something
        folder.rmdir()


def complete(study: optuna.Study) -> bool:
    """Whether any trial has been measured and judged."""
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def refuse_hopeless(tier: Tier, families: Sequence[str]) -> None:
    """Raises: UserError: the tier can judge none of the families."""
    if all(family in tier.failed for family in families):
        reasons = "; ".join(f"{family}: {tier.failed[family]}" for family in families)
        raise UserError(f"no family's weights could be trained to judge by ({reasons})")


def lessons_of(folder: Path, agreed: Mapping[str, Any]) -> str:
    """What a folder's trainings depend on, for its `LESSONS`: they are found there by their networks alone.

    Raises:
        UserError: trainings of others are there, though the study may not be: its journal was removed, say.
    """
    from nas.study.trials import _differ

    wanted = json.loads(json.dumps({key: value for key, value in agreed.items() if key not in ELSEWHERE}))
    found = wanted
    if (folder / LESSONS).is_file():
        found = json.loads((folder / LESSONS).read_text())
    elif any((folder / name).exists() for name in ("final", "training", "kept")):
        found = {}
    if older(found, wanted):
        raise UserError(f"{folder} holds trainings of an older vitnas; use --study for a new one")
    differences = "; ".join(f"{key} {old}, this command says {new}" for key, old, new in _differ(found, wanted))
    if differences:
        raise UserError(f"{folder} holds trainings with {differences}; use --study for a new one")
    return json.dumps(wanted, indent=1)


class TrialRunner:
    """Runs one trial after the other with a persistent exporter process and a `Measurer`."""

    def __init__(
        self,
        options: Options,
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

    def trial(self, run: Run) -> None:
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


class Clock:
    """Adds the time since the last lap to a phase."""

    def __init__(self, phases: dict[str, float]) -> None:
        self._phases, self._last = phases, time.perf_counter()

    def lap(self, phase: str, less: float = 0.0) -> None:
        now = time.perf_counter()
        self._phases[phase] += now - self._last - less
        self._last = now

    def add(self, phase: str, seconds: float) -> None:
        self._phases[phase] += seconds


def suggest(trial: optuna.Trial, options: Options) -> Arch:
    """Every parameter of the shared vocabulary, then the family's Arch."""
    from search_spaces.registry import FAMILIES
    from search_spaces.space import LEVELS, PARAMETERS

    family = trial.suggest_categorical("family", list(options.families))
    params = {name: trial.suggest_int(name, 0, LEVELS - 1) for name in PARAMETERS}
    return FAMILIES[family].space.decode(params, options.num_classes, options.resolution)


def open_cache(options: Options, say: Callable[[str], None]) -> Cache | None:
    """Earlier results of this machine; None, told in one line, where the cache's file cannot be used."""
    import sqlite3

    from nas.measure.cache import Cache, default_path, machine_of

    machine = machine_of(options.settings)
    try:
        return Cache(machine)
    except (OSError, sqlite3.Error) as error:
        say(f"no earlier latencies are used and none are kept: {default_path()}: {error}")
        return None


def choices(options: Options) -> dict[str, Any]:
    """Every parameter's permitted values."""
    from search_spaces.space import LEVELS, PARAMETERS

    return {"family": list(options.families), **{name: range(LEVELS) for name in PARAMETERS}}


def reference_arch() -> Arch:
    from search_spaces import get_arch

    return get_arch(REFERENCE)


def published_order(options: Options, reference_ms: float) -> list[str]:
    """Published variants of the searched families, likeliest nearest the budget first, one of each family in front.

    Nearness goes by MACs, at the reference network's measured time per MAC: rough (within about 2x between
    families), but it only decides what is tried first.
    """
    import math

    from search_spaces import get_arch, table
    from search_spaces.registry import FAMILIES

    per_mac = reference_ms / table(reference_arch()).macs()
    distance = {
        name: abs(math.log(table(get_arch(name)).macs() * per_mac / options.budget_ms))
        for family in options.families
        for name in FAMILIES[family].variants
    }
    ordered = sorted(distance, key=distance.__getitem__)
    first = [next(n for n in ordered if n in FAMILIES[family].variants) for family in options.families]
    return first + [name for name in ordered if name not in first]


def enqueue_published(options: Options, study: optuna.Study, reference_ms: float) -> None:
    """Enqueue the published variants nearest the budget: one a family at least, a quarter of the trials at most.

    The choice is made once a study; a worker that joins enqueues what one killed meanwhile had not.
    """
    from nas.study.storage import alone
    from nas.study.trials import enqueue
    from search_spaces.api import find_variant
    from search_spaces.registry import FAMILIES

    order = published_order(options, reference_ms)
    count = max(len(options.families), options.trials // 4)

    def choose() -> list[str]:
        if "published" not in study.user_attrs:
            study.set_user_attr("published", order[:count])
        return study.user_attrs["published"]

    for name in alone(study._storage, choose):
        family, variant = find_variant(name)
        params = {"family": family, **FAMILIES[family].space.encode(variant.values)}
        enqueue(study, params, {"name": name}, choices(options))


def state_of(study: optuna.Study, options: Options, run: Run) -> Progress:
    """Progress between trials."""
    from nas.search.rows import choose, rows_of
    from nas.study.trials import remaining

    rows = rows_of(study)
    left = remaining(study, options.trials)
    feasible = [row for row in rows if row["feasible"]]
    recent = run.trial_s[-RECENT:] or durations(study)[-RECENT:]
    measuring = sum(run.phases[name] for name in ("build and export", "session", "timed runs"))
    return Progress(
        done=max(0, options.trials - left),
        total=options.trials,
        feasible=len(feasible),
        best=choose(feasible),
        trial_s=statistics.mean(recent) if recent else None,
        measuring_s=measuring / len(run.trial_s) if run.trial_s else 0.0,
    )


def durations(study: optuna.Study) -> list[float]:
    """Seconds of every trial that was measured."""
    from optuna.trial import TrialState

    return [each.duration.total_seconds() for each in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])]


def storage_of(options: Options) -> str | Path:
    return options.storage or options.folder / JOURNAL


def make_folder(folder: Path) -> bool:
    """Create a run's folder and see that it can be written; returns whether it was not there.

    Raises:
        UserError: it cannot.
    """
    made = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            made = True
        except FileExistsError:
            folder.mkdir(exist_ok=True)  # raises where it is a file
        with tempfile.TemporaryFile(dir=folder):
            pass
        return made
    except OSError as error:
        raise unwritable(folder, error) from None


def write_hardware(options: Options) -> dict[str, Any]:
    """What hardware.json holds of the machine that is measured, as it was at the start."""
    from nas.measure.hardware import describe

    described = describe(options.settings)
    options.folder.mkdir(parents=True, exist_ok=True)  # its maker may have been refused and removed it, empty
    replace_file(options.folder / HARDWARE, json.dumps(described, indent=1) + "\n")
    return described


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a search as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def keep_samples(folder: Path, record: dict[str, Any]) -> None:
    """Append one line to samples.jsonl; a last line torn by a kill or a full disk is left to itself."""
    path = folder / "samples.jsonl"
    with path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        line = json.dumps({"host": socket.gethostname(), **record})
        file.write((("\n" if torn else "") + line + "\n").encode())
