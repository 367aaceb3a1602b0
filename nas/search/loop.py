"""The search: open a study, run its trials, and tell a display how far it is.

Workers on several machines may share a study through a database.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.files import replace_file, sweep_drafts
from nas.measure.budget import Verdict
from nas.measure.device import device_lock
from nas.quality.candidate import Candidate, Kind
from nas.search.folder import TRAINING_INPUTS, make_folder, quality_in, training_inputs, withdraw, write_hardware
from nas.search.log import Clock, SearchLog
from nas.search.precision import EXPECTED_DROP
from nas.search.published import begun_by_an_older, enqueue_published
from nas.search.request import default_study, storage_of
from nas.search.tasks import Task, Tasks, What
from nas.search.trial import TrialRunner, open_cache
from nas.search.trial_training import Stage
from nas.search.work import open_tasks
from nas.study.jobs import TRAINS, workers
from nas.study.leases import LOOK_S
from nas.units import counted

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.data.dataset import ImageData
    from nas.quality.race import RaceTier
    from nas.quality.tier import Tier
    from nas.search.ready import Entrant
    from nas.search.request import SearchRequest
    from nas.search.rows import Trial
    from nas.search.workers import Crew

AHEAD = 2
"""Networks for each worker that may wait for their training before no more are proposed: of those that wait only the
latency is known."""
CHOSEN = [Verdict.FITS, Verdict.UNSURE]
"""Verdicts of which the best is chosen, the first before the second."""
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
    request: SearchRequest,
    progress: Callable[[Progress], None],
    say: Callable[[str], None],
    phase: Callable[[str, int, int], None] = lambda *_: None,
    data: ImageData | None = None,
    crew: Crew | None = None,
) -> tuple[optuna.Study, SearchLog]:
    """Run trials until the study holds `request.trials`, the time is up, or Ctrl-C.

    Args:
        request: checked (`SearchRequest.check`).
        progress: called after each trial.
        say: called with each line to show.
        phase: called with what goes on inside a trial, how much of it is done and its total, 0 where it is not counted.
        data: the images that candidates train on, with `request.plan`.
        crew: the processes that train for this one.

    Returns:
        The study, and what happened in this process.

    Raises:
        UserError: a folder or storage that cannot be used, a study that disagrees with this request.
        KeyboardInterrupt: before the first trial could start.
    """
    return _Search(request, progress, say, phase, data, crew).run()


class _Search:
    """`search`, step by step."""

    def __init__(
        self,
        request: SearchRequest,
        progress: Callable[[Progress], None],
        say: Callable[[str], None],
        phase: Callable[[str, int, int], None],
        data: ImageData | None,
        crew: Crew | None = None,
    ) -> None:
        self.request, self.progress, self.say, self.data, self.crew = request, progress, say, data, crew
        self.stage = Stage(phase)
        self.log = SearchLog(datetime.now().astimezone().isoformat(timespec="seconds"))
        self.deadline = math.inf
        self.entrants: list[Entrant] = []
        self.study, self.created = open_run(request, data)

    def run(self) -> tuple[optuna.Study, SearchLog]:
        from nas.study.errors import storage_errors
        from nas.study.trials import sweep, waiting_for_training

        log = self.log
        with device_lock(self.request.settings.device):  # what another vitnas does there is not this machine's load
            log.hardware = write_hardware(self.request.folder, self.request.settings)
        self._describe_inputs()
        if self.crew is not None:
            self.crew.start(self.study)
        begun = time.perf_counter()
        if self.request.timeout_s is not None:
            self.deadline = begun + self.request.timeout_s
        with storage_errors(storage_of(self.request)), interruptible():
            try:
                self._run_trials()
            except KeyboardInterrupt:
                if log.tier is None:
                    raise
                log.interrupted = True
                self.say("interrupted: finishing with what was measured; the same command continues")
            except UserError as error:  # a remote device that does not come back, a full disk, no tier
                if log.tier is None or not log.trial_s or not complete(self.study):
                    if self.created and self.request.storage is None:
                        withdraw(self.study, self.request.folder)
                    raise
                log.interrupted = True
                log.failures.append(str(error))
                self.say(f"{error}; finishing with what was measured; the same command continues")
            if not log.failures:
                sweep(self.study)
                left = 0 if log.interrupted else len(waiting_for_training(self.study))
                if left:
                    self._note(f"{counted(left, 'network')} measured and not trained: the same command goes on")
        log.wall_s = time.perf_counter() - begun
        return self.study, log

    def _describe_inputs(self) -> None:
        """Say what is known of the machine, the images and the precision; the log notes what limits the result."""
        from nas.export.quantize import NOISE, calibration_images
        from nas.measure.hardware import busy_line
        from search_spaces.registry import with_earlier_space

        precisions = self.request.precisions
        lines = [busy_line(self.log.hardware)]
        lines += [
            f"the study was begun when {family} had fewer options: it goes on with these"
            for family in with_earlier_space()
            if family in self.request.families
        ]
        if self.data is not None:
            from nas.data.about import describe
            from nas.data.look import oddities

            self.say(describe(self.data))
            lines += oddities(self.data)
        if precisions != ("fp32",):
            lines.append(measured_in(precisions))
        if "int8" in precisions:
            if self.data is None:
                lines.append(NOISE)
            else:
                self.log.calibration, skipped = calibration_images(self.data, self.request.resolution or 224)
                lines.append(skipped)
        self._note(*filter(None, lines))
        if self.created and (line := left_by_an_older(self.request)):
            self.say(line)

    def _run_trials(self) -> None:
        from nas.study.trials import due, remaining

        request, study, log, starting = self.request, self.study, self.log, Clock(self.log.phases)
        log.tier = tier = self._open_tier()
        self.progress(state_of(study, request, log))
        if not due(study, request.trials, self.say, self._late):
            self.say("all trials are done: only the final steps are run again (raise --trials for more)")
            return
        with ExitStack() as stack:
            cache = open_cache(request, self.say) if request.cache else None
            if cache is not None:
                stack.callback(cache.close)
            hands_over = not request.trains
            runner = TrialRunner(request, study, tier, cache, log.calibration, self.stage, hands_over)
            stack.enter_context(runner)
            self._note(*runner.unread)
            make_trial = self._trials(stack, runner, tier)
            starting.lap("start")
            while self._goes_on():
                started = time.perf_counter()
                try:
                    if runner.training is None or not runner.training.claimed(log):
                        if not remaining(study, request.trials, look=False):  # another has claimed what waited
                            time.sleep(LOOK_S)
                            continue
                        if not make_trial() and not self._trainings_ended():
                            break
                finally:
                    log.trial_s.append(time.perf_counter() - started)
                refuse_hopeless(tier, request.families)
                around = Clock(log.phases)
                self.progress(state_of(study, request, log))
                around.lap("other")

    def _trainings_ended(self) -> bool:
        """Wait for what others train where nothing else is left to try; whether there was something, whose result may
        open what to try."""
        from nas.study.trials import in_training, sweep

        if self.request.trains or not in_training(self.study):
            return False
        waits = Clock(self.log.phases)
        self.stage(f"waiting for {counted(len(in_training(self.study)), 'training')}")
        while in_training(self.study) and not self._late():
            if self.crew is not None:
                self.crew.check()
            time.sleep(LOOK_S)
            sweep(self.study)
        waits.lap("waiting for trainings")
        self.log.exhausted = False
        self.log.notes = [note for note in self.log.notes if not note.startswith("nothing is left to try")]
        return True

    def _goes_on(self) -> bool:
        """Whether there is a trial to make; where others train, once few enough wait for that."""
        from nas.study.ledger import ledger_of
        from nas.study.trials import due, in_training, remaining, sweep, waiting_for_training

        request, study = self.request, self.study
        if request.trains:
            return bool(due(study, request.trials, self.say, self._late)) and not self._late()
        waits = Clock(self.log.phases)
        told = ended = -1
        while True:
            sweep(study)
            waiting, late = len(waiting_for_training(study, look=False)), self._late()
            trainers = workers(study, TRAINS)
            ahead = waiting < AHEAD * max(1, trainers)
            if ahead and not late and remaining(study, request.trials, look=False):
                return True
            if not in_training(study, look=False) or (late and not trainers):
                if late or not due(study, request.trials, self.say, self._late):
                    return False
                continue
            if waiting and not trainers and not self.crew and told < 0:
                told = waiting
                self.say(
                    f"nobody trains: {counted(waiting, 'network')} wait for workers (the same command, --only train)"
                )
            if self.crew is not None:
                self.crew.check()
            now = len(ledger_of(study, look=False).ended)
            if now != ended:
                ended = now
                self.progress(state_of(study, request, self.log))
                self.stage(f"waiting for {counted(len(in_training(study, look=False)), 'training')}")
            time.sleep(LOOK_S)
            waits.lap("waiting for trainings")

    def _trials(self, stack: ExitStack, runner: TrialRunner, tier: Tier) -> Callable[[], bool]:
        """What makes a trial; it returns False where nothing is left to try. stack: closed after the last one."""
        request, study, log = self.request, self.study, self.log
        if request.quality == "race":
            from nas.quality.race import RaceTier
            from nas.search.race import Race

            assert isinstance(tier, RaceTier)
            if not request.trains:
                tasks = open_tasks(request, study, tier, False, self.say, self.stage)
                stack.callback(tasks.close)
                tier.parents.elsewhere = partial(_tuned_elsewhere, tier, tasks)
            race = Race(request, study, tier, self.entrants, runner)
            stack.callback(lambda: self._note(*race.lines()))
            return lambda: race.trial(log)
        if begun_by_an_older(study):
            enqueue_published(request, study, runner.reference_ms)
            return partial(self._one, partial(runner.trial, self.log))
        from nas.search.guide import Guide

        guide = Guide(request, study, tier, runner.reference_ms, runner.measured_before())
        return partial(self._one, partial(runner.trial, self.log, guide.propose, guide.prepare))

    def _one(self, trial: Callable[[], None]) -> bool:
        """Make a trial; False where nothing is left to try, which the log notes."""
        from nas.search.guide import NothingLeft

        try:
            trial()
        except NothingLeft as why:
            self._note(f"nothing is left to try: {why}")
            self.log.exhausted = True
            return False
        return True

    def _note(self, *lines: str) -> None:
        for line in lines:
            self.say(line)
            self.log.notes.append(line)

    def _open_tier(self) -> Tier:
        """The quality tier."""
        tier, self.entrants = open_tier(self.request, self.study, self.data, self.stage, self.say, self._note)
        return tier

    def _late(self) -> bool:
        return time.perf_counter() >= self.deadline


def _tuned_elsewhere(tier: RaceTier, tasks: Tasks, name: str, px: int) -> None:
    """Have a parent tuned by a process that trains."""
    arch = tier.parents.arch(name, px)
    if arch is not None:
        tasks.result(Task(What.PARENT, Candidate(arch, Kind.READY, name=name), tier.trainer.plan.full_epochs, name))


def open_tier(
    request: SearchRequest,
    study: optuna.Study,
    data: ImageData | None,
    stage: Stage,
    say: Callable[[str], None],
    note: Callable[[str], None],
) -> tuple[Tier, list[Entrant]]:
    """The quality tier, and the networks of a race. One that trains also proposes what a study tries that an older
    vitnas has begun, unless a sampler is named."""
    from nas.quality.tier import TrainedTier
    from nas.quality.tiers import TIERS
    from nas.search.trainings import open_trainer

    trainer, entrants = None, []
    if request.plan is not None and data is not None:
        folder, seed, px = request.folder / "training", request.seed or 0, request.resolution
        devices = () if request.only == "measure" else request.train_devices
        trainer = open_trainer(
            request.plan, data, study, folder, seed, px, stage, say, devices, request.train_processes
        )
        if request.quality == "race":
            from nas.search.race import find_field

            entrants = find_field(request, study, trainer, note)
    tier = TIERS[request.quality](trainer)
    if isinstance(tier, TrainedTier) and request.sampler == "auto":
        from nas.search.propose import Proposer

        study.sampler = Proposer(tier, request)
    return tier, entrants


def open_run(request: SearchRequest, data: ImageData | None) -> tuple[optuna.Study, bool]:
    """Open the study in its folder, both made where they are missing. Families are searched along the axes that the
    study was begun with.

    Returns:
        The study, and whether its folder is new.

    Raises:
        UserError: a folder or storage that cannot be used, or a study or trainings that disagree with the request. A
            folder that was made is removed.
    """
    from nas.study.samplers import make_sampler
    from nas.study.trials import IDENTITY, identity_of, open_study
    from search_spaces.registry import use_spaces

    use_spaces(earlier=True)
    earlier = {"space": request.space()}
    use_spaces(earlier=False)
    sampler = make_sampler(request.sampler, request.seed)
    created = make_folder(request.folder)
    sweep_drafts(request.folder)
    try:
        identity = request.identity(data)
        if request.only == "train":  # the measured machine's, which this one need not reach
            identity["hardware"] = (identity_of(request.study, storage_of(request)) or {}).get("hardware")
        refuse_from_scratch(request)
        inputs = training_inputs(request.folder, identity) if request.plan else None
        study = open_study(request.study, storage_of(request), identity, sampler, earlier)
    except UserError:
        with suppress(OSError):  # it holds something
            if created:
                request.folder.rmdir()
        raise
    use_spaces(earlier=study.user_attrs[IDENTITY]["space"] != identity["space"])
    if inputs is not None:
        replace_file(request.folder / TRAINING_INPUTS, inputs)
    return study, created


def measured_in(precisions: Sequence[str]) -> str:
    """A line on the precisions of a search."""
    if len(precisions) == 1:
        return f"latency is measured in {precisions[0]}; quality is that of fp32"
    told = ", ".join(f"{each} {EXPECTED_DROP.get(each, 0.0):g}" for each in precisions[1:])
    return (
        f"each network is measured in {', '.join(precisions[:-1])} and {precisions[-1]} in turn, until it surely "
        "meets the budget; until the end, where its file is judged, its quality is that of fp32, less what lower "
        f"precisions cost others in the mean ({told})"
    )


def refuse_from_scratch(request: SearchRequest) -> None:
    """Raises: UserError: the folder of a race holds a search from scratch, as --data alone was in earlier versions."""
    if request.quality == "race" and quality_in(request.folder) == "train":
        raise UserError(
            f"{request.folder} holds a search from scratch: --from-scratch continues it; or use --study for a new one"
        )


def left_by_an_older(request: SearchRequest) -> str:
    """A line on a search from scratch that the same command began in an earlier version; "" where there is none."""
    earlier = replace(request, quality="train", study="")
    if request.quality != "race" or request.study != default_study(request) or quality_in(earlier.folder) != "train":
        return ""
    return f"{earlier.folder} holds a search from scratch: --from-scratch continues that; this is a new search"


def complete(study: optuna.Study) -> bool:
    """Whether any trial has been measured and judged."""
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def refuse_hopeless(tier: Tier, families: Sequence[str]) -> None:
    """Raises: UserError: the tier can judge none of the families."""
    if all(family in tier.failed for family in families):
        reasons = "; ".join(f"{family}: {tier.failed[family]}" for family in families)
        raise UserError(f"no family's weights could be trained to judge by ({reasons})")


def state_of(study: optuna.Study, request: SearchRequest, log: SearchLog) -> Progress:
    """Progress between trials."""
    from nas.study.ledger import ledger_of
    from nas.study.trials import remaining

    left = remaining(study, request.trials)
    feasible = [each for each in ledger_of(study, look=False).read(_placed) if each is not None]
    place, best = min(feasible, key=itemgetter(0), default=((math.inf,), None))
    recent = log.trial_s[-RECENT:] or durations(study)[-RECENT:]
    measuring = sum(log.phases[name] for name in ("build and export", "session", "timed runs"))
    return Progress(
        done=max(0, request.trials - left),
        total=request.trials,
        feasible=len(feasible),
        best=best if place[0] < len(CHOSEN) else None,
        trial_s=statistics.mean(recent) if recent else None,
        measuring_s=measuring / len(log.trial_s) if log.trial_s else 0.0,
    )


def _placed(trial: FrozenTrial) -> tuple[tuple[float, ...], Trial] | None:
    """A trial that is feasible, after what sorts it as `nas.search.rows.choose` would: once, not after every trial."""
    from nas.search.rows import rank, trial_of

    row = trial_of(trial)
    if not row.feasible:
        return None
    return (CHOSEN.index(row.verdict) if row.verdict in CHOSEN else len(CHOSEN), *rank(row)), row


def durations(study: optuna.Study) -> list[float]:
    """Seconds of every trial that was measured."""
    from nas.study.ledger import ledger_of

    return [seconds for seconds in ledger_of(study).read(_duration) if seconds is not None]


def _duration(trial: FrozenTrial) -> float | None:
    from optuna.trial import TrialState

    time = trial.duration if trial.state == TrialState.COMPLETE else None
    return None if time is None else time.total_seconds()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a search as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
