"""The search: ask the study for a network, export it, measure it, estimate it, tell the study.

A trial that cannot be built, exported or measured is a failed trial with its reason. On a CPU the device that is
measured is the one that computes, so a worker holds the device's lock for a whole trial, but for its training, which
gives way to what is timed (`nas.lock`); workers on several machines share a study through a database.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.files import replace_file, sweep_drafts
from nas.measure.device import check_settings, device_lock
from nas.search.folder import TRAINING_INPUTS, make_folder, training_inputs, withdraw, write_hardware
from nas.search.log import Clock, SearchLog
from nas.search.published import enqueue_published
from nas.search.request import meta, storage_of
from nas.search.trial import Stage, TrialRunner, open_cache

if TYPE_CHECKING:
    import optuna

    from nas.data.dataset import ImageData
    from nas.quality.tier import Tier
    from nas.search.request import SearchRequest
    from nas.search.rows import Trial

RECENT = 20
"""Trials whose time says how long the next ones take."""


@dataclass
class Progress:
    """What a display shows between trials. trial_s: seconds that one took lately, None before the first; measuring_s:
    without its training."""

    done: int
    total: int
    feasible: int
    best: Trial | None
    trial_s: float | None
    measuring_s: float


def search(
    options: SearchRequest,
    progress: Callable[[Progress], None],
    say: Callable[[str], None],
    phase: Callable[[str, int, int], None] = lambda *_: None,
    data: ImageData | None = None,
) -> tuple[optuna.Study, SearchLog]:
    """Run trials until the study holds `options.trials`, the time is up, or Ctrl-C.

    Args:
        phase: called with what goes on inside a trial, what is done of it and its total, 0 where nothing is counted.
        data: the images that candidates train on, with `options.plan`.

    Raises:
        UserError: settings this machine cannot measure, a folder or storage that cannot be used, a study that
            disagrees with this command.
    """
    from nas.export.quantize import NOISE, calibration_images
    from nas.measure.hardware import busy_line
    from nas.quality.tiers import TIERS
    from nas.search.trainings import open_trainer
    from nas.study.errors import storage_errors
    from nas.study.samplers import make_sampler
    from nas.study.trials import due, open_study, sweep

    check_settings(options.settings)
    sampler = make_sampler(options.sampler, options.seed)
    made = make_folder(options.folder)
    sweep_drafts(options.folder)
    storage = storage_of(options)
    try:
        agreed = meta(options, data)
        inputs = training_inputs(options.folder, agreed) if options.plan else None
        study = open_study(options.study, storage, agreed, sampler)
    except UserError:
        with suppress(OSError):  # it holds something
            if made:
                options.folder.rmdir()
        raise
    if inputs is not None:
        replace_file(options.folder / TRAINING_INPUTS, inputs)
    run = SearchLog(datetime.now().astimezone().isoformat(timespec="seconds"))
    with device_lock(options.settings.device):  # what another vitnas does there is not this machine's load
        run.hardware = write_hardware(options.folder, options.settings)
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
            trainer = None
            if options.plan is not None and data is not None:
                folder, seed = options.folder / "training", options.seed or 0
                trainer = open_trainer(options.plan, data, study, folder, seed, options.resolution, stage, say)
            run.tier = TIERS[options.quality](trainer)
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


def complete(study: optuna.Study) -> bool:
    """Whether any trial has been measured and judged."""
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def refuse_hopeless(tier: Tier, families: Sequence[str]) -> None:
    """Raises: UserError: the tier can judge none of the families."""
    if all(family in tier.failed for family in families):
        reasons = "; ".join(f"{family}: {tier.failed[family]}" for family in families)
        raise UserError(f"no family's weights could be trained to judge by ({reasons})")


def state_of(study: optuna.Study, options: SearchRequest, run: SearchLog) -> Progress:
    """Progress between trials."""
    from nas.search.rows import choose, rows_of
    from nas.study.trials import remaining

    rows = rows_of(study)
    left = remaining(study, options.trials)
    feasible = [row for row in rows if row.feasible]
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


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a search as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
