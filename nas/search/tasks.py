"""Trainings beside the trials: each is made once for the study, by whichever of its processes takes it first.

The process that ends a search wants the best trained further, networks for a validation, and final trainings; one that
proposes wants parents tuned. It does them itself or, where it only measures, waits for processes that train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from nas.identity import text_digest
from nas.quality.candidate import Candidate
from nas.study.jobs import TRAINS, Job, do, post, result_of, take, withdraw, workers
from nas.study.leases import LOOK_S
from nas.study.trials import sweep

if TYPE_CHECKING:
    import optuna
    from pydantic import JsonValue


class What(StrEnum):
    """Which training."""

    PARENT = "parent"
    """Of a published network that others are cut from, on the search's own split."""
    COMPLETE = "complete"
    """Of a candidate, to the last rung."""
    VALIDATE = "validate"
    """Of a network, fully, to validate the tier."""
    FINAL = "final"
    """Of a network that is compared at the end, fully, from one seed."""
    TEACHER = "teacher"
    """Of a network with a teacher and without, on the search's own split."""

    @property
    def full(self) -> bool:
        """Whether `--train-processes` make it together."""
        return self in (What.VALIDATE, What.FINAL)


@dataclass(frozen=True)
class Task:
    """A training, as the study keeps it."""

    what: What
    candidate: Candidate
    epochs: int
    label: str = ""
    """What a display calls the network."""
    seed: int = 0
    teacher: str = ""
    """What it learns from; "": nothing."""
    crops: float | None = None
    """The least share of an image's area that its crops keep; None: the recipe's."""

    @property
    def name(self) -> str:
        name = f"{self.what} {self.candidate.key[:16]} {self.epochs} {self.seed}"
        return f"{name} {text_digest(self.teacher)}" if self.what == What.TEACHER else name

    @property
    def job(self) -> Job:
        candidate: Any = self.candidate.to_json()
        return Job(
            self.name,
            {
                "what": str(self.what),
                "candidate": candidate,
                "epochs": self.epochs,
                "label": self.label,
                "seed": self.seed,
                "teacher": self.teacher,
                "crops": self.crops,
            },
        )

    @classmethod
    def of(cls, job: Job) -> Self:
        """Raises: UserError: a network that cannot be read here."""
        kept: Mapping[str, Any] = job.task
        candidate = Candidate.from_json(kept["candidate"])
        what, teacher = What(kept["what"]), kept.get("teacher", "")
        return cls(what, candidate, kept["epochs"], kept["label"], kept["seed"], teacher, kept.get("crops"))


class Tasks:
    """The trainings that a process wants done, or does for others.

    Args:
        work: makes a training and returns what came of it.
        trains: this process trains; else it waits for others.
        say: told where nobody is there to be waited for.
        phase: told what is waited for.
        take_over: called before the first full training is wanted; then this process trains.
    """

    def __init__(
        self,
        study: optuna.Study,
        work: Callable[[Task], JsonValue],
        trains: bool,
        say: Callable[[str], None],
        phase: Callable[[str, int, int], None] = lambda *_: None,
        take_over: Callable[[], None] | None = None,
    ) -> None:
        self._study, self._work, self._trains, self._say, self._phase = study, work, trains, say, phase
        self._take_over = take_over
        self._posted: dict[str, Task] = {}

    def post(self, tasks: Sequence[Task]) -> None:
        """Have trainings made, unless they have been."""
        if self._take_over is not None and any(task.what.full for task in tasks):
            self._take_over()
            self._take_over, self._trains = None, True
        self._posted |= {task.name: task for task in tasks}
        post(self._study, [task.job for task in tasks])

    def result(self, task: Task) -> JsonValue:
        """What came of a training, which is made here or waited for; meanwhile others are made that were posted.

        Raises:
            TrainingError: it failed. UserError: what ends the search, a full disk, say.
        """
        if task.name not in self._posted:
            self.post([task])
        told = False
        while True:
            try:
                found = result_of(self._study, task.name)
            except KeyError:
                if self._trains and self.help([task.name, *self._posted]):
                    continue
                if not told:
                    told = True
                    what = f"the {task.what} training of {task.label or task.candidate.key[:8]}"
                    self._phase(f"waiting for {what}", 0, 0)
                    if not workers(self._study, TRAINS):
                        self._say(f"{what} is to make, and there is no worker: start some (this command, --only train)")
                time.sleep(LOOK_S)
                sweep(self._study)
            else:
                del self._posted[task.name]
                return found

    def help(self, among: Sequence[str] | None = None) -> bool:
        """Make a training that is wanted, of some names or any; False where there is none."""
        job = take(self._study, among)
        if job is None:
            return False
        task = Task.of(job)
        do(self._study, job, lambda: self._work(task))
        return True

    def forget(self, task: Task) -> None:
        """Have a training made again whose result is lost."""
        withdraw(self._study, task.name)

    def close(self) -> None:
        """Withdraw what was wanted and has no result."""
        for name in self._posted:
            withdraw(self._study, name)
        self._posted = {}
