"""What a process knows of a study's trials: those that have ended never change, and are looked at once.

Without it each trial would cost time in proportion to all before it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

T = TypeVar("T")
_LEDGERS: WeakKeyDictionary[optuna.Study, Ledger] = WeakKeyDictionary()


class Ledger:
    """Of one study; `ledger_of` brings it up to date."""

    def __init__(self) -> None:
        self.open: list[FrozenTrial] = []
        """The trials that wait or run, by number."""
        self.ended: list[FrozenTrial] = []
        """The others, in the order in which this process saw them end."""
        self.counted = 0
        """Ended trials that are not run again."""
        self.owed: dict[int, FrozenTrial] = {}
        """Failed trials that are to be run again and that no other trial retries, by number."""
        self._known = 0
        self._retried: set[int] = set()
        self._read: dict[Callable[[FrozenTrial], object], tuple[list[int], list[object]]] = {}

    def update(self, trials: list[FrozenTrial]) -> None:
        """Take in what has changed. trials: all of the study, by number, which counts from 0."""
        from optuna.trial import TrialState

        changed = [trials[trial.number] for trial in self.open]
        for trial in trials[self._known :]:
            changed.append(trial)
            if (first := trial.user_attrs.get("retry_of")) is not None:
                self._retried.add(first)
                self.owed.pop(first, None)
        self._known, self.open = len(trials), []
        for trial in changed:
            if not trial.state.is_finished():
                self.open.append(trial)
                continue
            self.ended.append(trial)
            again = trial.user_attrs.get("retry")
            self.counted += not again
            if again and trial.state == TrialState.FAIL and trial.number not in self._retried:
                self.owed[trial.number] = trial

    def read(self, what: Callable[[FrozenTrial], T]) -> list[T]:
        """What a function says of every ended trial, in order. It is asked once of each: give the same function each
        time, and one that goes by the trial alone."""
        numbers, found = self._read.setdefault(what, ([], []))
        for trial in self.ended[len(found) :]:
            said, place = what(trial), bisect(numbers, trial.number)
            numbers.insert(place, trial.number)
            found.insert(place, said)
        return [*found]  # type: ignore[list-item]

    @property
    def running(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return [trial for trial in self.open if trial.state == TrialState.RUNNING]

    @property
    def waiting(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return [trial for trial in self.open if trial.state == TrialState.WAITING]


def ledger_of(study: optuna.Study, look: bool = True) -> Ledger:
    """The ledger of a study, as it is now.

    Args:
        look: False: as it was at the last look. A look at a database costs milliseconds for each trial that runs.
    """
    ledger = _LEDGERS.setdefault(study, Ledger())
    if look:
        ledger.update(study.get_trials(deepcopy=False))
    return ledger
