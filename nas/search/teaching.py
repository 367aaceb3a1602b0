"""The teacher of a race's final trainings: that of --teacher, else the best larger network that was tuned on the user's
images, else a larger ready one that is tuned to teach; where it helps.

The first contestant is trained twice on the search's own split, with it and without, and judged on the images held out
of it. The answer is made once for a study, before any final training, and holds for all of them: equal terms.
docs/results/race.md says what a teacher was worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from pydantic import FiniteFloat, TypeAdapter

from nas.errors import DiskFull, TrainingError, UserError
from nas.quality.candidate import Candidate, Kind
from nas.quality.plan import NO_TEACHER
from nas.search.accuracy import Accuracies, compare_means
from nas.search.folder import FINAL
from nas.search.rows import ClosingRow, candidate_of, known
from nas.search.tasks import Task, Tasks, What
from nas.study.jobs import any_done
from nas.units import counted

if TYPE_CHECKING:
    import optuna
    from pydantic import JsonValue

    from nas.quality.race import RaceTier
    from nas.search.request import SearchRequest

KEPT = "teacher"
"""The attribute of the study that holds the answer."""
MOST = 2.5
"""Times a student's multiply-accumulates that a ready network has at most which is tuned only to teach: each final
training takes the time of its answers, too."""


@dataclass(frozen=True)
class TeacherGain:
    """What a teacher was worth to a network, on images held out of the tuning: its accuracy with it, less without."""

    student: str
    points: FiniteFloat
    low: FiniteFloat
    """Ends of its 95% interval."""
    high: FiniteFloat
    images: int
    epochs: int
    """Of each of the two trainings."""
    seconds: FiniteFloat
    """Both took, the tuning of the teacher left out."""

    @property
    def helps(self) -> bool:
        return self.points > 0

    @property
    def words(self) -> str:
        return (
            f"{self.points:+.1f} points (95%: {self.low:+.1f} to {self.high:+.1f}) of {self.images:,} held-out images, "
            f"{self.student} trained for {counted(self.epochs, 'epoch')} with it and without ({self.seconds:.0f} s)"
        )


@dataclass(frozen=True)
class Teaching:
    """Which teacher was tried."""

    name: str = ""
    """efficientvit_m1@64, or a folder; "" without one."""
    gain: TeacherGain | None = None
    why: str = ""
    """There is none, in words; "" where that was asked for."""
    asked: str | None = None
    """As `TrainingPlan.teacher`."""

    @property
    def teacher(self) -> str:
        """What all final trainings learn from; "": nothing."""
        return self.name if self.gain and self.gain.helps else ""

    @property
    def words(self) -> str:
        if self.gain is None:
            return f"no teacher in the final trainings: {self.why}" if self.why else ""
        what = "all final trainings learn from it" if self.gain.helps else "it does not help and is left out"
        if self.gain.helps and self.gain.low <= 0:
            what += ", though it may not help: the interval holds 0"
        return f"teacher {self.name}: {self.gain.words}: {what}"

    @classmethod
    def kept_in(cls, study: optuna.Study) -> Self | None:
        """The study's; None where it has none yet."""
        found = study.user_attrs.get(KEPT)
        return None if found is None else TypeAdapter(cls).validate_python(found)

    def to_json(self) -> dict[str, object]:
        """The fields of result.json."""
        return {"teacher": self.teacher or None, "teacher_gain": self.gain and {"of": self.name, **asdict(self.gain)}}


def find_teaching(
    request: SearchRequest,
    study: optuna.Study,
    tier: RaceTier,
    rows: Sequence[ClosingRow],
    tasks: Tasks,
    note: Callable[[str], None],
) -> Teaching:
    """The teacher of the final trainings of a race, which is told. One is tried now where none has been, or another is
    asked for, unless there are final trainings: then that stays, and what is not used is told.

    Args:
        rows: what is trained fully, the winner so far first.

    Raises:
        UserError: it cannot be tried now, as its folder is not here, say; another run may.
    """
    found, asked = Teaching.kept_in(study), known(request.plan).teacher
    begun = any((request.folder / FINAL).glob("*-seed*")) or any_done(study, f"{What.FINAL} ")
    if found is None and begun:
        why = "" if asked == NO_TEACHER else "some had been made without one"
        found = Teaching(why=why, asked=asked)
    elif found is None or (not begun and (found.asked != asked or found.why)):
        found = _tried(request, tier, rows, tasks)
    study.set_user_attr(KEPT, asdict(found))
    if found.words:
        note(found.words)
    if found.asked != asked:
        given = f"--teacher {asked}" if asked else "a run without --teacher"
        learnt = f"learnt from {found.teacher}" if found.teacher else "had no teacher"
        note(f"{given} changes nothing: this study has final trainings, which {learnt}; another --study tries it")
    return found


def _tried(request: SearchRequest, tier: RaceTier, rows: Sequence[ClosingRow], tasks: Tasks) -> Teaching:
    plan = known(request.plan)
    if plan.teacher == NO_TEACHER:
        return Teaching(asked=plan.teacher)
    pretrained = (row for row in rows if row.kind != Kind.SCRATCH and tier.tuning_pays(candidate_of(row)))
    student = next(pretrained, None)
    if student is None:
        return Teaching(why="no pretrained network is tuned in them", asked=plan.teacher)
    name = tier.teacher_name(candidate_of(student)) or larger_ready(request, tier, candidate_of(student))
    if name is None:
        why = (
            f"no network was tuned on your images that is larger and better than {student.label}, nor are there "
            f"weights here of another one that likely is, with up to {MOST:g} times its multiply-accumulates"
        )
        return Teaching(why=f"{why} (--teacher names one)")
    task = Task(What.TEACHER, candidate_of(student), plan.full_epochs, student.label, teacher=name)
    try:
        gain = TypeAdapter(TeacherGain).validate_python(tasks.result(task))
    except TrainingError as error:
        return Teaching(why=f"{name}: {error}", asked=plan.teacher)
    except UserError as error:
        if plan.teacher is not None or isinstance(error, DiskFull):
            raise
        return Teaching(why=f"{name}: {error}")
    return Teaching(name, gain, asked=plan.teacher)


def larger_ready(request: SearchRequest, tier: RaceTier, student: Candidate) -> str | None:
    """The ready network that may teach a student best, by the search's own prediction at the student's resolution: of
    those with weights on this machine that no run has tuned yet, that need more multiply-accumulates, up to `MOST`
    times, and that is likely better. With its resolution, as `RaceTier.teacher_name`; None: there is none."""
    from nas.networks.counts import counts_of
    from nas.networks.pretrained import label_of
    from nas.quality.surrogate import describe_candidate
    from nas.search.ready import find_entrants
    from search_spaces import ArchError

    store, px = tier.trainer.weights, student.network.resolution
    macs, own, surrogate = counts_of(student.network).macs, tier.top1_of(student), tier.surrogate()
    found: dict[str, tuple[float, int]] = {}
    for entrant in find_entrants(request.families, request.resolution, request.num_classes, store)[0]:
        if store.here(entrant.network) is None or tier.parents.record(entrant.name, px) is not None:
            continue
        try:
            candidate = entrant.at(px)
            counts = counts_of(candidate.network)
        except (ArchError, UserError):  # it takes no such images
            continue
        if not macs < counts.macs <= MOST * macs:
            continue
        guess = surrogate.predict(describe_candidate(candidate, counts), candidate.key)
        if guess.value > own:
            found[f"{label_of(entrant.network)}@{px}"] = guess.value, counts.macs
    return max(found, key=found.__getitem__, default=None)


def try_teacher(tier: RaceTier, task: Task) -> JsonValue:
    """Train a network with a teacher and without; a `TeacherGain` as the study keeps it.

    Raises:
        TrainingError: the loss is no longer finite. UserError: the teacher cannot be had.
    """
    *judged, seconds = tier.try_teacher(task.candidate, task.teacher, task.epochs, task.label)
    taught, alone = (Accuracies(task.label, [each.top1], each.total, 0.0, [[*each.hits]]) for each in judged)
    found = compare_means(taught, alone)
    gain = TeacherGain(task.label, found.difference, *found.ci, alone.images, task.epochs, seconds)
    kept: JsonValue = asdict(gain)
    return kept
