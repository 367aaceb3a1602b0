"""The end of a search: it judges, measures and trains the best, and writes the files of a run's folder."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, cast

from nas.ending import Ending
from nas.files import FolderInUse, folder_lock
from nas.intervals import guessing
from nas.measure.budget import Verdict
from nas.measure.runtime import LOWER
from nas.measure.samples import BUSY_SPREAD
from nas.search.accuracy import Accuracies, FinalTrainings
from nas.search.advice import advice, latencies
from nas.search.best import BestFolder, Weights
from nas.search.closing import ClosingInterrupted, closing_run, is_due, without
from nas.search.contest import RACE, contest_of, contestants, decision, opponents, winner_of, with_winner
from nas.search.final import weights_of
from nas.search.folder import has_ended
from nas.search.log import breakdown
from nas.search.lower import LowerFiles, time_anew
from nas.search.outcome import Fastest, Outcome, ShortTraining, TierFacts, Validation, Winner
from nas.search.precision import lowers
from nas.search.repredict import repredict
from nas.search.request import storage_of
from nas.search.rows import (
    ACCURACY,
    ClosingRow,
    Network,
    OutsideRow,
    Trial,
    best_of,
    candidate_of,
    choose,
    known,
    rank,
    rows_of,
)
from nas.search.words import protocol, skipped_lines, ties_of, winner_line
from nas.search.work import open_tasks
from nas.study.errors import storage_errors
from nas.units import counted

if TYPE_CHECKING:
    import optuna

    from nas.data.about import Summary
    from nas.quality.tier import TrainedTier
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest
    from nas.search.teaching import Teaching

LOCK = ".end.lock"


def finish_run(
    request: SearchRequest,
    study: optuna.Study,
    log: SearchLog,
    command: str,
    phase: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    take_over: Callable[[], None] | None = None,
) -> Outcome:
    """Judge what was found, measure the best side by side, train them fully, and write best/ and the run's files.

    Workers on one folder end one after the other. A step that fails, or that Ctrl-C ends, is told and recorded, and the
    next goes on; after Ctrl-C those that take long are left out. What is known is written before the final trainings.

    Args:
        take_over: called before the first full training, which this process makes, and what it wants after that; None:
            who trained before goes on.

    Raises:
        KeyboardInterrupt: another worker is at its end, and after Ctrl-C that is not waited for; or a run before has
            come to its end with the same trials, and its results stay.
        FolderInUse: so it is, after an error that ended the trials.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(request.folder, waiting=not log.interrupted, name=LOCK, say=say))
        except FolderInUse:
            if log.failures:
                raise
            say("another worker of this search is at its end, and writes the report")
            raise KeyboardInterrupt from None
        return _Finish(request, study, log, command, phase, say, take_over).run()


class _Finish:
    """`finish_run`, step by step."""

    def __init__(
        self,
        request: SearchRequest,
        study: optuna.Study,
        log: SearchLog,
        command: str,
        phase: Callable[[str, int, int], None] | None,
        say: Callable[[str], None],
        take_over: Callable[[], None] | None,
    ) -> None:
        self.request, self.study, self.log, self.command, self.phase = request, study, log, command, phase
        self.tier = known(log.tier)
        self.trained = cast("TrainedTier", self.tier) if self.tier.trained else None
        waits = phase or (lambda *_: None)
        self.tasks = None
        if self.trained:
            self.tasks = open_tasks(request, study, self.trained, request.trains, say, waits, take_over)
        self.say, self.end = say, Ending(say)
        self.end.interrupted = log.interrupted
        self.lower = LowerFiles(request, self.trained) if self.trained and lowers(request.precisions) else None
        self.best = BestFolder(request, log, self.trained, self._step, self.lower)
        self.notes: list[str] = []
        self.rows = rows_of(study)
        kept = study.user_attrs.get("validation")
        self.validation = None if kept is None else Validation.from_json(kept)
        self.final: list[ClosingRow] = []
        self.outside: list[OutsideRow] = []
        self.accuracy: FinalTrainings | None = None
        self.teaching: Teaching | None = None

    def run(self) -> Outcome:
        try:
            return self._run()
        finally:
            if self.tasks:
                self.tasks.close()

    def _run(self) -> Outcome:
        stands = has_ended(self.request.folder, sum(row.complete for row in self.rows))
        if self.trained:
            self._judge(self.trained)
        else:
            self.rows, line = repredict(self.tier, self.rows)
            self.notes += [line] if line else []
        self._measure()
        if self.lower and not self.end.interrupted:
            self._price(self.lower, [row for row in self.final if not row.error])
        if self.trained and self.final and self.winner and not self.end.interrupted:
            if weights_of(self.request, candidate_of(self.winner)) is None:
                self._write()
                stands = False
            if not self.end.interrupted:
                self._train(self.trained)
        if stands and self.end.interrupted and not self._failures():
            self.say("the results of the run that had ended with these trials stay as they are")
            raise KeyboardInterrupt
        return self._write()

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        with self.end.step(what), storage_errors(storage_of(self.request)):
            yield

    @property
    def races(self) -> bool:
        """Whether the search compares what it found with ready networks."""
        return self.tier.name == RACE

    @property
    def opponents(self) -> tuple[ClosingRow | None, ClosingRow | None]:
        return opponents(self.final, self.request.budget_ms)

    @property
    def feasible(self) -> list[Trial]:
        return [row for row in self.rows if row.feasible]

    @property
    def winner(self) -> Network | None:
        if self.final:
            return next((row for row in self.final if row.role == "winner"), None)
        return choose(self.feasible)

    def _judge(self, tier: TrainedTier) -> None:
        """Validate the tier, and train the best to its last rung; estimates by all trainings."""
        from nas.search.final import review, settle
        from nas.search.validate import validate

        if not self.end.interrupted:
            with self._step("validation"):
                self.validation = validate(
                    self.request, self.study, tier, self.rows, self.notes.append, known(self.tasks)
                )
        found = self.validation
        selects = not tier.needs_validation if found is None else found.selects
        if not selects:
            why = "has not been validated" if found is None else "cannot be told from 0"
            self.notes.append(
                f"the tier {tier.name} does not choose: its tau with full trainings {why}; the most parameters "
                "within the budget choose"
            )
        self.rows = review(tier, self.rows, selects)
        if not self.end.interrupted:
            with self._step("training of the best to the end"):
                self.rows = settle(self.study, tier, self.rows, selects, self.notes.append, known(self.tasks))

    def _closing_run(self) -> None:
        watched = None
        if self.phase:
            self.phase("exporting the best for the closing side-by-side run", 0, 0)
            watched = partial(self.phase, "closing side-by-side run")
        try:
            self.final, self.outside = closing_run(
                self.request, self.rows, self.log.calibration, watched, self.notes.append
            )
        except ClosingInterrupted as cut:
            self.final, self.outside = cut.final, cut.outside
            raise

    def _measure(self) -> None:
        if not self.end.interrupted:
            with self._step("closing side-by-side run"):
                if is_due(self.request, self.rows):
                    self._closing_run()
        if self.feasible and not self.final:
            left_out = "closing side-by-side run" + (" and no final training" if self.request.plan else "")
            self.notes.append(f"this run made no {left_out}; latencies are those of the single trials")
        if self.request.against and self.feasible and not self.outside:
            self.notes.append(
                "no network of --against was measured: there was no closing run, or they are all in its table"
            )

    def _price(self, files: LowerFiles, rows: Sequence[ClosingRow], trained: bool = False) -> bool:
        """Judge networks of the closing run in their precisions: those that cost more than they may are infeasible, and
        so are those that cannot be judged.

        Args:
            trained: whether their full trainings were due. Before that a network whose weights are not kept is left to
                be judged after its own.

        Returns:
            Whether any of them has become so.
        """
        lost, device = False, self.request.settings.device
        if device != "cpu" and any(self._precision_of(row) in LOWER for row in rows):
            self.notes.append(f"what lower precisions cost is judged on this machine's CPU, not on {device}")
        for row in rows:
            precision = self._precision_of(row)
            if precision not in LOWER:
                continue
            infeasible, unknown = True, "judging it failed"
            with self._step(f"{precision} of {row.label}"):
                if self.phase:
                    self.phase(f"judging {row.label} in {precision}", 0, 0)
                made = files.of(candidate_of(row), precision)
                unknown = "" if made else "no weights of it are kept"
                infeasible = not made.price.within if made else trained
                if made:
                    told = f"{row.label}: {made.price.lines[0]}"
                    self.notes += [told] * (told not in self.notes)
                    if made.price.within and not made.price.as_timed and made.content is not None:
                        self.final, over = time_anew(files, self.final, row, made, self.notes.append)
                        lost = lost or over
            if self.end.interrupted:
                return lost
            if unknown:
                so = "infeasible, as " * infeasible
                self.notes.append(f"{row.label}: {so}what {precision} costs is not known: {unknown}")
            if infeasible and ACCURACY not in row.over:
                self.final, lost = without(self.final, row, ACCURACY), True
        return lost

    def _precision_of(self, row: Network) -> str:
        return row.precision or self.request.settings.precision

    def _train(self, tier: TrainedTier) -> None:
        """Full trainings over the same seeds: of the winner and of the published network nearest it by one recipe; in a
        race of the networks that are compared, which settle the winner."""
        from nas.search.final import final_tasks, have_trained, trainings_in

        winner = next(row for row in self.final if row.role == "winner")
        baseline = None if self.races else baseline_of(self.final, winner)
        rows = (
            contestants(self.final, self.request.budget_ms)
            if self.races
            else [winner, *([baseline] if baseline else [])]
        )
        found: dict[str, Accuracies] = {}
        tasks = known(self.tasks)
        if self.races:
            with self._step("trial of a teacher"):
                self._find_teacher(tier, rows)
            if self.teaching is None or self.end.interrupted:
                if not self.end.interrupted:
                    self.notes.append("no final training was made, as all are to learn from one teacher or none")
                return
        taught_by = self.teaching.teacher if self.teaching else ""
        with self._step("final trainings"):
            wanted = [final_tasks(self.request, tier, row.label, candidate_of(row), taught_by) for row in rows]
            for each in wanted:
                tasks.post(each)
            if self.phase:
                self.phase("final trainings", 0, trainings_in(self.request, tier, [*chain(*wanted)]))
        for row in rows:
            if self.end.interrupted:
                return
            with self._step(f"final training of {row.label}"):
                self.notes += have_trained(self.request, tier, tasks, row.label, candidate_of(row), taught_by)
                found[row.label] = self._trained(tier, row)
                self.final = [replace(each, accuracy=found.get(each.label)) for each in self.final]
            if self.end.interrupted:
                return
        due = [row for row in self.final if row.label in found or row.role == "winner"]
        if self.lower and self._price(self.lower, due, trained=True):
            if self.winner and not self.end.interrupted:
                self._train(tier)  # what was trained is kept
                return
            epochs, why = known(self.request.plan).full_epochs, "not compared: one of them is infeasible"
            self.accuracy = FinalTrainings(tuple(found.values()), epochs, tier.recipe(epochs).name, why)
            return
        if self.races and found:
            self._crown(tier, len(found) == len(rows))
        elif winner.label in found:
            self.accuracy = self._trainings(tier, winner, baseline, list(found.values()))

    def _find_teacher(self, tier: TrainedTier, rows: Sequence[ClosingRow]) -> None:
        """Settle once what the final trainings of a race learn from."""
        from nas.quality.race import RaceTier
        from nas.search.final import earlier_crops
        from nas.search.teaching import find_teaching

        if self.teaching is None:
            assert isinstance(tier, RaceTier)
            tasks = known(self.tasks)
            self.teaching = find_teaching(self.request, self.study, tier, rows, tasks, self.notes.append)
            if crops := earlier_crops(self.request):
                self.notes.append(f"final trainings crop to {crops:.0%} of an image or more, as those made before")

    def _trained(self, tier: TrainedTier, row: ClosingRow) -> Accuracies:
        """A network's full trainings, and its accuracies as it is shipped."""
        from nas.search.final import train_fully

        candidate, precision = candidate_of(row), self._precision_of(row)
        found = train_fully(self.request, tier, row.label, candidate, self.teaching.teacher if self.teaching else "")
        if self.lower is None or precision not in LOWER:
            return found
        if self.phase:
            self.phase(f"judging {row.label} in {precision}", 0, 0)
        shipped = None
        with self._step(f"accuracy of {row.label} in {precision}"):
            shipped = self.lower.shipped(candidate, precision, found)
        if shipped is None:
            return found
        if lost := len(found.top1) - len(shipped.top1):
            self.notes.append(
                f"{row.label}: an earlier version kept no weights of {counted(lost, 'seed')}: its accuracy in "
                f"{precision} is of the others"
            )
        return shipped

    def _crown(self, tier: TrainedTier, whole: bool) -> None:
        """Settle the winner by the full trainings. whole: none of them has failed."""
        from nas.search.accuracy import compare_means, verdict

        winner = winner_of(self.final, self.request.budget_ms)
        self.final = with_winner(self.final, winner)
        made, ready = self.opponents
        rows = sorted(
            (row.accuracy for row in self.final if row.accuracy),
            key=lambda each: (each.label != winner.label, -each.mean),
        )
        epochs = known(self.request.plan).full_epochs
        trained = [row for row in self.final if row.accuracy and not row.accuracy.as_begun]
        recipes = dict.fromkeys(tier.recipe(epochs, candidate_of(row)).name for row in trained)
        told = FinalTrainings(tuple(rows), epochs, " or ".join(recipes), "")
        if made and ready and made.accuracy and ready.accuracy:
            comparison = compare_means(made.accuracy, ready.accuracy)
            told = replace(told, comparison=comparison, verdict=verdict(comparison, made.accuracy, ready.accuracy))
        else:
            why = f"no {'ready network' if ready is None else 'network that the search made up'} is within the budget"
            told = replace(told, verdict=why if whole else "not compared: a training failed")
        self.accuracy = told

    def _trainings(
        self, tier: TrainedTier, winner: ClosingRow, baseline: ClosingRow | None, found: Sequence[Accuracies]
    ) -> FinalTrainings:
        """The winner's full trainings, and how they compare with those of the published network."""
        from nas.search.accuracy import compare_means, verdict

        epochs = known(self.request.plan).full_epochs
        told = FinalTrainings(tuple(found), epochs, tier.recipe(epochs).name, "")
        if len(found) < 2 or baseline is None:
            why = "the winner is itself a published network" if winner.name else "no published network beside it"
            return replace(told, verdict=f"the training of {baseline.label} failed" if baseline else why)
        comparison = compare_means(*found)
        over = {
            Verdict.FITS: "",
            Verdict.UNSURE: f"; {baseline.label} may be over the budget",
            Verdict.OVER: f"; {baseline.label} is over the budget, as every published network tried",
        }
        words = verdict(comparison, *found) + over[known(baseline.verdict)]
        return replace(told, comparison=comparison, verdict=words)

    def _write(self) -> Outcome:
        """Write best/ and the run's files."""
        from nas.search.report import write_run

        weights = None
        if self.winner is None:
            self.best.clear()
        else:
            if self.phase:
                self.phase("writing best/", 0, 0)
            weights = self.best.write(self.winner)
        outcome = self._outcome(weights)
        with self._step("report"):
            write_run(self.request.folder, outcome)
            self.study.set_user_attr("result", winner_line(outcome))
        return replace(outcome, failures=self._failures(), interrupted=self.end.interrupted)

    def _failures(self) -> tuple[str, ...]:
        return *self.log.failures, *self.end.failures

    def _outcome(self, weights: Weights | None) -> Outcome:
        """weights: those in best/."""
        from nas.search.opening import ruled_out

        request, log, rows, winner = self.request, self.log, self.rows, self.winner
        fastest = next(iter(latencies(rows, self.final)), None)
        kept = weights.kept if weights else None
        return Outcome(
            study=request.study,
            command=self.command,
            started=log.started,
            finished=datetime.now().astimezone().isoformat(timespec="seconds"),
            interrupted=self.end.interrupted,
            failures=self._failures(),
            budget_ms=request.budget_ms,
            limits=request.limits,
            settings=request.settings,
            precisions=request.precisions,
            throughput_at=request.throughput_at,
            num_classes=request.num_classes,
            seed=request.seed,
            sampler=request.sampler,
            hardware=log.hardware,
            data=self._about_data(),
            quality_tier=self._tier_facts(),
            validation=self.validation,
            accuracy=self.accuracy,
            families=request.families,
            ruled_out=() if self.races else ruled_out(request, rows),
            trials=tuple(rows),
            final=tuple(self.final),
            against=tuple(self.outside),
            winner=Winner.of(winner) if winner else None,
            fastest=Fastest.of(fastest) if fastest else None,
            contest=contest_of(self.final, request.budget_ms) if self.races and self.final and winner else None,
            teaching=self.teaching,
            ties=() if self.races and self.accuracy else tuple(ties_of(self.final)),
            advice=tuple(advice(request, log, rows, self.final, self.command)) if winner is None else (),
            notes=(*log.notes, *self.notes, *self._remarks(weights)),
            skipped=tuple(skipped_lines(request, rows)),
            protocol=protocol(request),
            breakdown=breakdown(log),
            trials_per_minute=60 * len(log.trial_s) / log.wall_s if log.trial_s else 0.0,
            median_trial_s=statistics.median(log.trial_s) if log.trial_s else 0.0,
            untrained=weights is None,
            short_training=ShortTraining(kept.epochs, kept.images) if kept else None,
        )

    def _about_data(self) -> Summary | None:
        from nas.data.about import summary

        return summary(self.trained.trainer.data) if self.trained else None

    def _tier_facts(self) -> TierFacts:
        tier, held_out = self.tier, self.trained.held_out() if self.trained else None
        rungs = self.trained.rung_ranks() if self.trained else ()
        return TierFacts(tier.name, tier.label, tier.note, tier.trained, held_out, tuple(rungs))

    def _remarks(self, weights: Weights | None) -> Iterator[str]:
        """What a reader of the figures should know. weights: those in best/."""
        if self.trained:
            from nas.data.batches import skipped_line

            skipped = skipped_line(self.trained.trainer.loaders)
            if skipped:
                yield skipped
        if weights and weights.price:
            yield from (f"best/{weights.file}: {line}" for line in weights.price.lines)
        if self.accuracy:
            told = guessing(self.accuracy.rows[0].ci, self.request.num_classes)
            if told:
                yield f"{self.accuracy.rows[0].label}: {told}"
        if self.races and self.final:
            found, ready = self.opponents
            if self.accuracy and self.accuracy.comparison:
                yield decision(known(found), known(ready), self.accuracy.rows[0].label)
            yield from remarks_on_size(found, self.final)
        for row in self.accuracy.rows if self.accuracy else ():
            if row.before:
                yield f"{row.label}: {row.before.words}, which its own training and seconds do not count"
            if row.as_begun:
                yield f"{row.label} is as its final training begins: {row.start}"
        yield from self._remarks_on_winner(weights)
        yield from remarks_on_latency(self.rows)

    def _remarks_on_winner(self, weights: Weights | None) -> Iterator[str]:
        first, winner = best_of(self.feasible), self.winner
        if weights and weights.kept:
            yield weights.kept.words
        elif self.trained and winner and weights is None:
            yield "best/ is untrained: the search has kept no training of this network"
        if self.trained and self.final and winner and self.accuracy is None:
            yield "the final trainings are not finished: the same command goes on with them"
        if self.final and winner is None:
            yield "every trial that had met the budget was over it in the closing side-by-side run"
            if (self.best.folder / "model.safetensors").is_file():
                yield "best/ is left as it was: a trained network that met the budget in an earlier run"
        elif self.final and first and winner and not self._stands(first, winner):
            yield f"{first.label} ranked first in the search but not among those that fit in the closing run"

    def _stands(self, first: Trial, winner: Network) -> bool:
        """Whether what ranked first in the search is within the budget in the closing run as surely as the winner."""
        return any(row.trial == first.trial and row.verdict == winner.verdict for row in self.final)


def remarks_on_size(made: ClosingRow | None, final: Sequence[ClosingRow]) -> Iterator[str]:
    """Why a network goes before a sister with a better score, if it does."""
    if made is not None and made.parent:
        sisters = (row for row in final if (row.parent, row.verdict) == (made.parent, made.verdict))
        if better := next((row for row in sisters if rank(row) < rank(made)), None):
            yield (
                f"{made.label} goes before {better.label}, also cut from {made.parent}: their estimates differ by less "
                "than a standard error of the images that judge, and it has lost less of its parent"
            )


def remarks_on_latency(rows: Sequence[Trial]) -> Iterator[str]:
    """Whether latencies are from earlier runs, or of a busy machine."""
    measured = [row for row in rows if row.complete]
    cached = [row for row in measured if row.source.startswith("cache")]
    if cached:
        yield (
            f"{len(cached)} of {len(measured)} trials took their latency from this machine's cache, measured while "
            "it ran at the same speed (--no-cache measures again); the closing run is measured now"
        )
    drifts = [row.reference_drift for row in measured if row.reference_drift is not None]
    drift = statistics.median(drifts) if drifts else 0.0
    if drift > BUSY_SPREAD:
        yield (
            f"this machine was busy: within a trial the reference network's latency moved by {drift:.0%} (median); "
            "run again on a quiet machine for figures to rely on"
        )


def baseline_of(final: Sequence[ClosingRow], winner: ClosingRow) -> ClosingRow | None:
    """The published network within budget whose latency is nearest the winner's, or of those that may be within it; the
    fastest one where there are none."""
    if winner.name:
        return None
    published = [row for row in final if row.name and not row.error]
    for wanted in (Verdict.FITS, Verdict.UNSURE):
        within = [row for row in published if row.verdict == wanted]
        if within:
            return min(within, key=lambda row: abs(known(row.latency_ms) - known(winner.latency_ms)))
    return min(published, key=lambda row: known(row.latency_ms), default=None)
