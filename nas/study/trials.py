"""The Optuna study behind a search: who runs which trial, and what a trial becomes.

Any number of processes, on any number of machines, may work on one study, and each may be killed
at any moment. `lease` and `sweep` see to that: a trial says which process runs it, and any worker
fails the trials of dead ones and enqueues their parameters again (Optuna's heartbeats exist only on
databases and only inside ``study.optimize``). Decisions that read, then write (create, ask, sweep,
enqueue) are taken by one process at a time.

Optuna's own log of operations decides who wins a race for a single trial: the first ``tell`` does.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserError
from nas.identity import older
from nas.study.storage import PATIENCE_S, alone, exclusive, open_storage, storage_errors
from nas.text import mask_url

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    import optuna
    from optuna.trial import FrozenTrial

METRICS = ["quality", "throughput"]  # both maximised
META = "vitnas"  # the study attribute that holds what must agree to continue the study
BEAT_S = 30.0  # between two extensions of a lease
LEASE_S = PATIENCE_S + 4 * BEAT_S  # so that no lease ends while its worker waits for a lost database
LOOK_S = 2.0  # between two looks at other machines' leases

_BOOKKEEPING = {"lease", "error", "retry", "retry_of"}  # attributes that a retry does not inherit


def open_study(name: str, storage: str | Path, meta: dict[str, Any], sampler: Any) -> optuna.Study:
    """Create the study `name` in `storage`, or load it to continue it.

    Any number of processes may do so at the same moment: one creates, the others load. Whoever
    loads gets the sampler reseeded, or a resumed run and a second worker would draw the same
    random parameters again; so `seed` repeats a search run by one process in one go.

    Args:
        storage: path of a journal file, or a postgresql://, mysql:// or sqlite:/// URL.
        meta: what must agree to continue the study (JSON; one level of sub-dicts is compared key
            by key). Stored as one study attribute.
        sampler: an Optuna sampler.

    Raises:
        UserError: the storage cannot be used, or the study there disagrees with `meta`.
    """
    import optuna

    meta = json.loads(json.dumps(meta))

    def load_or_create() -> optuna.Study:
        try:
            study = optuna.load_study(study_name=name, storage=backend, sampler=sampler)
            sampler.reseed_rng()
        except KeyError:
            study = optuna.create_study(
                study_name=name,
                storage=backend,
                sampler=sampler,
                directions=["maximize"] * len(METRICS),
            )
        stored = study.user_attrs.get(META)
        if stored is None:
            if study.get_trials(deepcopy=False):
                raise UserError(
                    f"the study {name!r} in {mask_url(str(storage))} was not made by vitnas; use --study for a new one"
                )
            study.set_metric_names(METRICS)
            study.set_user_attr(META, meta)
        elif older(stored, meta):
            raise UserError("this study was begun by an older vitnas; use --study for a new one")
        elif stored != meta:
            differences = "; ".join(f"{key} {old}, this command says {new}" for key, old, new in _differ(stored, meta))
            raise UserError(f"this study has {differences}; use --study for a new one")
        return study

    with storage_errors(storage):
        with exclusive(storage):
            backend = open_storage(storage)
        return alone(backend, load_or_create)


def _differ(stored: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that differ, with both values, sub-dicts as "hardware.cpu"."""
    for key in [*stored, *(k for k in given if k not in stored)]:
        old, new = stored.get(key, "unset"), given.get(key, "unset")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from ((f"{key}.{sub}", *values) for sub, *values in _differ(old, new))
        elif old != new:
            yield key, old, new


# ------------------------------------------------------------------------- running a trial


def ask(study: optuna.Study) -> optuna.Trial:
    """A new trial, leased to this process.

    Both are one decision: who decides next and finds a running trial without a lease knows that its worker died.
    """

    def decide() -> optuna.Trial:
        trial = study.ask()
        lease(trial)
        return trial

    return alone(study._storage, decide)


@contextmanager
def heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Extend a trial's lease every BEAT_S, in a thread, while the block runs, whatever it does."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from sqlalchemy.exc import SQLAlchemyError

    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                lease(trial)
            except UpdateFinishedTrialError:
                return
            except (UserError, SQLAlchemyError, StorageInternalError):  # the block's own calls meet and tell it
                continue

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LOOK_S)  # a lost server may keep it longer


def lease(trial: optuna.Trial, seconds: float = LEASE_S) -> None:
    """Store in `trial` that this process runs it and extends this lease within `seconds`.

    On this machine the process itself is looked at and the time does not matter; workers on other machines go by the
    time, so clocks should agree within a small part of it.
    """
    process = _process(os.getpid())
    assert process is not None
    trial.set_user_attr(
        "lease",
        {"host": _host(), "pid": os.getpid(), "started": process, "expires": time.time() + seconds},
    )


def sweep(study: optuna.Study) -> list[int]:
    """Fail the running trials whose worker is dead and enqueue their parameters again, once.

    A trial is told FAIL with the attributes ``error: "worker died"`` and, unless it was itself a
    retry (``retry_of``), ``retry: true``. What is enqueued is derived from the study: every failed
    trial marked ``retry`` that no trial names in its ``retry_of``. So a sweeper killed between
    telling and enqueueing loses nothing (the next sweep enqueues), and none enqueues twice, since
    sweepers take turns. A worker that was only thought dead (its clock or its network was off) and
    finishes at that moment keeps its result if its ``tell`` comes first; else `finish` returns
    False. The retry starts from the parameters alone: constraint and results are not carried over.

    Returns:
        The numbers of the trials that this call failed.
    """
    swept: list[int] = []

    def decide() -> None:
        for trial in _dead(study):
            if _tell_fail(study, trial, "worker died", retry="retry_of" not in trial.user_attrs):
                swept.append(trial.number)
        for trial in _owed(study):
            kept = {k: v for k, v in trial.user_attrs.items() if k not in _BOOKKEEPING}
            study.enqueue_trial(_params(trial), {**kept, "retry_of": trial.number})

    if _dead(study) or _owed(study):
        alone(study._storage, decide)
    return swept


def finish(
    study: optuna.Study,
    trial: optuna.Trial,
    quality: float,
    throughput: float,
    constraint: float,
    attrs: Mapping[str, Any],
) -> bool:
    """Store a measured trial: its constraint "latency" (<= 0 fits the budget), attributes, values.

    Every measured trial is COMPLETE with a quality, over budget or not: TPE would learn as much
    from PRUNED ones, NSGA-II and the Gaussian process would learn nothing. Each key of `attrs` is
    one write (1 ms in a journal, 10 in a database): put what nobody sorts by into one dict.

    Args:
        quality, throughput: the two objectives.
        attrs: JSON values by name; numbers become the dashboard's columns.

    Returns:
        False if the trial was swept meanwhile, as of a dead worker: the result is then dropped.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        trial.set_constraint("latency", constraint)
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
        told = study.tell(trial, [quality, throughput], state=TrialState.COMPLETE, skip_if_finished=True)
    except UpdateFinishedTrialError:
        return False
    return told.state == TrialState.COMPLETE


def fail(study: optuna.Study, trial: optuna.Trial, reason: str, retry: bool = False) -> bool:
    """Tell `trial` FAIL, with `reason` as its attribute ``error``.

    Args:
        retry: enqueue its parameters again, for a trial that was only interrupted.

    Returns:
        False if it was finished meanwhile.
    """
    told = _tell_fail(study, trial, reason, retry)
    if retry:
        sweep(study)
    return told


def remaining(study: optuna.Study, total: int) -> int:
    """How many more trials to start so that `total` are finished or running.

    A trial that is to be run again is not counted: its retry will be. Asked before each trial, several workers
    overshoot by at most one each.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    return max(0, total - sum(t.state != TrialState.WAITING and not t.user_attrs.get("retry") for t in trials))


def due(
    study: optuna.Study, total: int, say: Callable[[str], None], expired: Callable[[], bool] = lambda: False
) -> int:
    """How many more trials to start (see `remaining`), after a sweep.

    Where there are none, other machines' workers are waited for until each shows that it lives, or until its lease
    ends: what a dead one has left is to be done here.

    Args:
        say: told that there is a wait.
        expired: ends the wait.
    """
    sweep(study)
    left = remaining(study, total)
    silent = {} if left else _elsewhere(study)
    if silent and not expired():
        minutes = (max(held["expires"] for held in silent.values()) - time.time()) / 60
        say(
            f"waiting for a sign of life of other machines' workers (trial {', '.join(map(str, silent))}): without one "
            f"within {minutes:.0f} minutes they are taken for dead"
        )
    while silent and not left and not expired():
        time.sleep(LOOK_S)
        sweep(study)
        left = remaining(study, total)
        now = _elsewhere(study)
        silent = {number: held for number, held in silent.items() if now.get(number) == held}
    return left


def enqueue(
    study: optuna.Study,
    params: Mapping[str, int],
    attrs: Mapping[str, Any],
    choices: Mapping[str, Collection[Any]],
) -> bool:
    """Enqueue a trial with these parameters and user attributes, unless the study has it already.

    Args:
        params: a value for every parameter.
        choices: the permitted values by name.

    Returns:
        False if a trial with the same parameters is waiting, running or done, here or elsewhere.

    Raises:
        ValueError: a name is unknown or missing, or a value not permitted (Optuna would only warn).
    """
    if params.keys() != choices.keys():
        raise ValueError(f"unknown or missing parameters: {sorted(params.keys() ^ choices.keys())}")
    for name, permitted in choices.items():
        if params[name] not in permitted:
            raise ValueError(f"{name} = {params[name]!r} is not among {permitted}")

    def decide() -> bool:
        if any(_params(trial) == params for trial in study.get_trials(deepcopy=False)):
            return False
        study.enqueue_trial(dict(params), dict(attrs))
        return True

    return alone(study._storage, decide)


def _elsewhere(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """The leases of the trials that run on other machines, by number."""
    from optuna.trial import TrialState

    leases = {t.number: t.user_attrs.get("lease") for t in study.get_trials(False, [TrialState.RUNNING])}
    return {number: held for number, held in leases.items() if held and held["host"] != _host()}


def _dead(study: optuna.Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return [t for t in study.get_trials(False, [TrialState.RUNNING]) if _worker_is_dead(t)]


def _worker_is_dead(trial: FrozenTrial) -> bool:
    held = trial.user_attrs.get("lease")
    if held is None:  # see `ask`
        return True
    if held["host"] != _host():
        return time.time() > held["expires"]
    started = _process(held["pid"])
    return started is None or abs(started - held["started"]) > 1


def _owed(study: optuna.Study) -> list[FrozenTrial]:
    """Failed trials to be run again that nobody has enqueued yet."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    paid = {t.user_attrs.get("retry_of") for t in trials}
    return [
        t
        for t in trials
        if t.state == TrialState.FAIL and t.user_attrs.get("retry") and t.number not in paid and _params(t)
    ]


def _params(trial: FrozenTrial) -> dict[str, Any]:
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _tell_fail(study: optuna.Study, trial: optuna.Trial | FrozenTrial, reason: str, retry: bool) -> bool:
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        study._storage.set_trial_user_attr(trial._trial_id, "error", reason)
        if retry:
            study._storage.set_trial_user_attr(trial._trial_id, "retry", True)
        study.tell(trial.number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):  # told by another process, before or just now
        return False
    return True


def _host() -> str:
    """Where a process id means something: this machine since it was booted, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _process(pid: int) -> float | None:
    """When process `pid` was started, in seconds after boot (clocks are stepped); None if dead."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time() - psutil.boot_time()
    except psutil.NoSuchProcess:
        return None
