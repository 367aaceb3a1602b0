"""What the processes of a study share besides its trials: who is at work, and trainings that one of them makes for all.

Such a job is made once, by whichever process takes it first. Each of its attributes has a key of its own and one
process at a time that writes it: `TASK`, by who wants it done; `HELD`, the lease of who does it; `RESULT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nas.errors import TrainingError, UserError
from nas.study.leases import Lease, beating
from nas.study.trials import alone_in

if TYPE_CHECKING:
    import optuna
    from pydantic import JsonValue

TASK, HELD, RESULT = "job: ", "job held: ", "job result: "
WORKER = "worker "
"""With a number, the attribute that holds the lease of a process, and what it does; used again once it has ended."""
MEASURES, TRAINS = "measures", "trains"
_taken: set[str] = set()
"""Names of the jobs that this process has. An answer may be lost after its server has acted on it: a job that is leased
to this process and not among these is nobody's."""


@contextmanager
def at_work(study: optuna.Study, does: Sequence[str]) -> Iterator[None]:
    """Have the study say while the block runs that this process works for it.

    does: `MEASURES`, which the end of the search goes with, `TRAINS` or both.
    """
    key = ""

    def replace_the_dead() -> None:
        """Forget those whose part this process has: who measures ends the search, and so what all have done for it."""
        attrs: Mapping[str, Any] = study.user_attrs
        for name in [name for name, value in attrs.items() if name.startswith(WORKER) and value]:
            if (MEASURES in does or MEASURES not in attrs[name]["does"]) and _is_dead(attrs, name):
                study.set_user_attr(name, None)

    def choose() -> str:
        """A key that nobody has."""
        replace_the_dead()
        attrs: Mapping[str, Any] = study.user_attrs
        known = [name for name in attrs if name.startswith(WORKER)]
        name = next((name for name in known if not attrs[name]), f"{WORKER}{len(known)}")
        study.set_user_attr(name, mine())
        return name

    def leave() -> None:
        replace_the_dead()
        if is_mine():
            study.set_user_attr(key, None)

    def mine() -> dict[str, Any]:
        return {"does": [*does], **Lease.mine().to_json()}

    def is_mine() -> bool:
        held: Any = study.user_attrs.get(key)
        return bool(held) and Lease.read(held).is_mine()

    def extend() -> bool:
        nonlocal key
        if is_mine():
            study.set_user_attr(key, mine())
        else:  # it has none yet, or was taken for dead
            key = alone_in(study, choose)
        return True

    extend()
    with beating(extend):
        try:
            yield
        except UserError:  # of a storage that is lost, or withdrawn, perhaps; the lease expires
            raise
        except BaseException:
            alone_in(study, leave)
            raise
    alone_in(study, leave)


def workers(study: optuna.Study, does: str) -> int:
    """How many processes measure, or train, this one included."""
    attrs = study.user_attrs
    return sum(not _is_dead(attrs, key) for key in _at_work(attrs, does))


def has_died(study: optuna.Study, does: str) -> bool:
    """Whether a process that measured, or trained, has died, and none has come in its place."""
    attrs = study.user_attrs
    return any(_is_dead(attrs, key) for key in _at_work(attrs, does))


def _at_work(attrs: Mapping[str, Any], does: str) -> list[str]:
    return [key for key, value in attrs.items() if key.startswith(WORKER) and value and does in value["does"]]


def _is_dead(attrs: Mapping[str, Any], key: str) -> bool:
    return Lease.read(attrs[key]).has_expired(key)


@dataclass(frozen=True)
class Job:
    """Something to be done once."""

    name: str
    """Its own in the study."""
    task: Mapping[str, JsonValue]
    """What a process must know to do it."""


def post(study: optuna.Study, jobs: Sequence[Job]) -> None:
    """Have jobs done, unless they are or have been."""
    for job in jobs:
        if study.user_attrs.get(TASK + job.name) is None:
            study.set_user_attr(TASK + job.name, dict(job.task))


def withdraw(study: optuna.Study, name: str) -> None:
    """Forget a job and its result; who does it now is not disturbed."""
    study.set_user_attr(TASK + name, None)
    study.set_user_attr(RESULT + name, None)


def take(study: optuna.Study, among: Sequence[str] | None = None) -> Job | None:
    """A job that nobody does or has done, leased to this process; None where there is none.

    among: names of those that it may be, the first first; None: any.
    """

    def decide() -> Job | None:
        found = _open(study)
        name = next((each for each in (sorted(found) if among is None else among) if each in found), None)
        if name is None:
            return None
        study.set_user_attr(HELD + name, Lease.mine().to_json())
        return Job(name, found[name])

    offered = _open(study)
    found = alone_in(study, decide) if offered.keys() & (offered if among is None else among) else None
    if found is not None:
        _taken.add(found.name)
    return found


def do(study: optuna.Study, job: Job, work: Callable[[], JsonValue]) -> None:
    """Do a job that was taken, and keep its result. A training that fails is its result, too.

    Raises:
        UserError, KeyboardInterrupt: what `work` raises; another process may then take the job.
    """

    def extend() -> bool:
        held = study.user_attrs.get(HELD + job.name)
        if held is None or not Lease.read(held).is_mine():  # it is over, or was taken for dead
            return False
        study.set_user_attr(HELD + job.name, Lease.mine().to_json())
        return True

    try:
        with beating(extend):
            try:
                found: dict[str, JsonValue] = {"found": work()}
            except TrainingError as error:
                found = {"error": str(error)}
        study.set_user_attr(RESULT + job.name, found)
    finally:
        _taken.discard(job.name)
        study.set_user_attr(HELD + job.name, None)


def result_of(study: optuna.Study, name: str) -> JsonValue:
    """What came of a job.

    Raises:
        KeyError: it is not done.
        TrainingError: it failed; it is withdrawn, so that the next command tries again.
    """
    found: Any = study.user_attrs.get(RESULT + name)
    if found is None:
        raise KeyError(name)
    if "error" in found:
        withdraw(study, name)
        raise TrainingError(found["error"])
    kept: JsonValue = found["found"]
    return kept


def any_done(study: optuna.Study, start: str) -> bool:
    """Whether there is a result of a job whose name starts so."""
    return any(key.startswith(RESULT + start) and kept for key, kept in study.user_attrs.items())


def _open(study: optuna.Study) -> dict[str, Mapping[str, JsonValue]]:
    """The tasks of jobs that nobody does or has done, by name."""
    attrs: Mapping[str, Any] = study.user_attrs
    tasks = {key.removeprefix(TASK): value for key, value in attrs.items() if key.startswith(TASK) and value}
    return {name: task for name, task in tasks.items() if not attrs.get(RESULT + name) and not _is_held(attrs, name)}


def _is_held(attrs: Mapping[str, Any], name: str) -> bool:
    held: Any = attrs.get(HELD + name)
    if not held:
        return False
    found = Lease.read(held)
    return not (found.has_expired(HELD + name) or (name not in _taken and found.is_mine()))
