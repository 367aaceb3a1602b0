"""The Optuna study behind a search: which process runs which trial, and how a trial ends.

Any number of processes on any number of machines may work on one study, and each may be killed at any moment. A trial
therefore carries a lease (`lease`) that names the process that runs it; any worker fails the trials whose lease has
expired and enqueues their parameters again (`sweep`). Optuna's own heartbeats exist only on databases and only inside
``study.optimize``. One process at a time takes a decision that reads, then writes (create, ask, sweep, enqueue).

A trial that needs a training keeps what was measured of it (`MEASURED`). Its worker goes on with the training or hands
the trial over: it stays RUNNING, without a lease, until a worker claims it. Where that one dies, the trial waits again,
so that no network is measured twice.

The first ``tell`` of a trial wins a race for it, by the order of Optuna's log of operations.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nas.errors import UserError
from nas.identity import differences, older
from nas.study.errors import storage_errors
from nas.study.exclusive import exclusive
from nas.study.leases import BEAT_S, LEASE_S, LOOK_S, Lease, beating
from nas.study.ledger import Ledger, ledger_of
from nas.study.storage import alone, open_storage
from nas.text import mask_url
from nas.version import version

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

T = TypeVar("T")
METRICS = ["quality", "throughput"]  # both maximised
IDENTITY = "vitnas"  # the study attribute that holds the study's identity
MEASURED = "measured"  # the attribute of a trial that is trained, or waits for that: what its training needs
DEATHS = 3  # of a trial's training workers, after which it is failed: it may be what kills them

_LOST = "lost"  # the attribute that counts them
_mine: set[int] = set()
"""Ids of the trials that this process has asked for or claimed. An answer may be lost after its server has acted on it:
a trial that is leased to this process and not among these is nobody's."""
_BOOKKEEPING = {"lease", "error", "retry", "retry_of", MEASURED, _LOST}  # attributes that a retry does not inherit


def open_study(
    name: str,
    storage: str | Path,
    identity: Mapping[str, Any],
    sampler: BaseSampler,
    earlier: Mapping[str, Any] | None = None,
) -> optuna.Study:
    """Create the study `name` in `storage`, or load it to continue it.

    Any number of processes may do so at the same moment: one creates it, the others load it. Loading reseeds the
    sampler, as a resumed run or a second worker would otherwise draw the same random parameters again; a seed therefore
    repeats a search only where one process runs it without a break.

    Args:
        storage: path of a journal file, or a postgresql://, mysql:// or sqlite:/// URL.
        identity: what must agree to continue the study; JSON values by name. Inner mappings are compared key by key.
        earlier: values of it that an older study has instead, and goes on with.
        sampler: an Optuna sampler.

    Raises:
        UserError: the storage cannot be used, or the study there has another identity.
    """
    import optuna

    given = json.loads(json.dumps(identity))  # as the storage returns it

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
        stored = study.user_attrs.get(IDENTITY)
        accepted = {key: value for key, value in (earlier or {}).items() if stored and stored.get(key) == value}
        if stored is None:
            if study.get_trials(deepcopy=False):
                raise UserError(
                    f"the study {name!r} in {mask_url(str(storage))} was not made by vitnas; use --study for a new one"
                )
            study.set_metric_names(METRICS)
            study.set_user_attr(IDENTITY, given)
        elif older(stored, given):
            raise UserError("this study was begun by an older vitnas; use --study for a new one")
        elif stored.get("quality") != given.get("quality"):
            was, now = (_tier(identity) for identity in (stored, given))
            raise UserError(f"this study was begun with {was}, this command says {now}; use --study for a new one")
        elif stored != given | accepted:
            raise UserError(f"this study has {differences(stored, given | accepted)}; use --study for a new one")
        others = [held for held in _leases(study).values() if held.version not in ("", version()) and held.is_fresh()]
        for other in others:
            minutes = max((held.expires - time.time()) / 60 for held in others)
            killed = f" (where it was killed, {minutes:.0f} minutes)" if other.elsewhere else ""
            raise UserError(
                f"vitnas {other.version} works at this study, and this is {version()}: give all workers the same "
                f"version, or wait for its end{killed}"
            )
        return study

    with storage_errors(storage):
        with exclusive(storage):
            backend = open_storage(storage)
        return alone(backend, load_or_create)


def identity_of(name: str, storage: str | Path) -> dict[str, Any] | None:
    """What must agree to continue the study `name`; None where there is none.

    Raises:
        UserError: the storage cannot be used.
    """
    if "://" not in str(storage) and not Path(storage).exists():
        return None
    with storage_errors(storage):
        backend = open_storage(storage)
        try:
            study = backend.get_study_id_from_name(name)
        except KeyError:
            return None
        found: dict[str, Any] | None = backend.get_study_user_attrs(study).get(IDENTITY)
        return found


def _tier(identity: Mapping[str, Any]) -> str:
    """How a study estimates quality, as options of a command."""
    return f"--quality {identity.get('quality')} {'and' if 'training' in identity else 'without'} --data"


def alone_in(study: optuna.Study, decide: Callable[[], T]) -> T:
    """Call `decide` while no other process of this study decides; see `nas.study.storage.alone`."""
    return alone(study._storage, decide)


class AllBegun(Exception):
    """Other workers have begun the last trials."""


@dataclass(frozen=True)
class Proposal:
    """What a trial is to try."""

    params: Mapping[str, str | int]
    choices: Mapping[str, Sequence[str | int]]
    """The permitted values of every parameter, as `enqueue` takes them."""
    attrs: Mapping[str, Any]


def ask(
    study: optuna.Study,
    propose: Callable[[], Proposal | None] = lambda: None,
    prepare: Callable[[], None] = lambda: None,
    total: int | None = None,
) -> optuna.Trial:
    """A new trial, leased to this process: one that waits or, where none does, one that the sampler proposes.

    All of it is one decision: who decides next and finds a running trial without a lease knows that its worker died.

    Args:
        propose: called where no trial waits; what it gives, or enqueues, is the new trial.
        prepare: called before the decision, where no trial waits: what would keep others from theirs.
        total: of the study's trials.

    Raises:
        AllBegun: so many are finished or running by now, and none waits.
    """
    if not ledger_of(study).waiting:
        prepare()

    def decide() -> optuna.Trial:
        if not ledger_of(study).waiting:
            if total is not None and not remaining(study, total, look=False):
                raise AllBegun
            proposal = propose()
            if proposal is not None:
                return _begun_with(study, proposal)
        trial = study.ask()
        lease(trial)
        return trial

    return _kept(alone_in(study, decide))


def _begun_with(study: optuna.Study, proposal: Proposal) -> optuna.Trial:
    """A trial that runs, leased to this process: in one call of the storage, where one a parameter, one for the lease
    and three for a trial that waited first would keep others from their decisions."""
    import optuna
    from optuna.trial import TrialState, create_trial

    space = distributions(proposal.choices)
    template = create_trial(
        state=TrialState.RUNNING,
        params=dict(proposal.params),
        distributions={name: space[name] for name in proposal.params},
        user_attrs={**proposal.attrs, "lease": Lease.mine(LEASE_S).to_json()},
    )
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id, template_trial=template))


def distributions(choices: Mapping[str, Sequence[str | int]]) -> dict[str, BaseDistribution]:
    """Optuna's, of parameters by their permitted values: a range of numbers, or words."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    return {
        name: IntDistribution(values[0], values[-1]) if isinstance(values, range) else CategoricalDistribution(values)
        for name, values in choices.items()
    }


@contextmanager
def heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Extend a trial's lease every BEAT_S, in a thread, while the block runs, whatever it does."""

    def extend() -> bool:
        held = trial.storage.get_trial(trial._trial_id).user_attrs.get("lease")
        if held is None or not Lease.read(held).is_mine():  # it was handed over, or taken for dead
            return False
        lease(trial)
        return True

    with beating(extend, BEAT_S):
        yield


def lease(trial: optuna.Trial, seconds: float = LEASE_S) -> None:
    """Store in `trial` that this process runs it and extends this lease within `seconds`."""
    trial.set_user_attr("lease", Lease.mine(seconds).to_json())


def hand_over(trial: optuna.Trial) -> None:
    """Give up the lease of a trial that keeps what was measured of it: a worker that trains claims it."""
    assert MEASURED in trial.user_attrs
    trial.set_user_attr("lease", None)


def claim(study: optuna.Study, passing_over: Collection[int] = ()) -> optuna.Trial | None:
    """The oldest trial that waits for its training, leased to this process; None where there is none.

    passing_over: numbers of trials that it is not to be.
    """
    import copy

    import optuna

    def decide() -> optuna.Trial | None:
        waiting = waiting_for_training(study, passing_over)
        if not waiting:
            return None
        asked = copy.copy(study)
        asked.sampler = optuna.samplers.RandomSampler()  # the study's proposes whenever a trial is made
        trial = optuna.Trial(asked, waiting[0]._trial_id)
        lease(trial)
        return trial

    found = alone_in(study, decide) if waiting_for_training(study, passing_over) else None
    return None if found is None else _kept(found)


def _kept(trial: optuna.Trial) -> optuna.Trial:
    _mine.add(trial._trial_id)
    return trial


def pass_on(study: optuna.Study, trial: optuna.Trial, why: str) -> bool:
    """Have another worker train a trial that this one cannot; the `DEATHS`th time it is failed instead.

    Returns:
        Whether it waits again.
    """
    lost = trial.user_attrs.get(_LOST, 0) + 1
    if lost >= DEATHS:
        fail(study, trial, why)
        return False
    trial.set_user_attr(_LOST, lost)
    hand_over(trial)
    return True


def waiting_for_training(
    study: optuna.Study, passing_over: Collection[int] = (), look: bool = True
) -> list[FrozenTrial]:
    """The trials that are measured and that nobody trains, oldest first, but for some by their numbers.

    Args:
        look: as `ledger_of` takes it.
    """
    waiting = [trial for trial in in_training(study, look) if trial.user_attrs.get("lease") is None]
    return [trial for trial in waiting if trial.number not in passing_over]


def in_training(study: optuna.Study, look: bool = True) -> list[FrozenTrial]:
    """The trials that are trained or wait for that, oldest first.

    Args:
        look: as `ledger_of` takes it.
    """
    return [trial for trial in ledger_of(study, look).running if MEASURED in trial.user_attrs]


def sweep(study: optuna.Study) -> list[int]:
    """Fail the running trials whose lease has expired and enqueue their parameters again, once.

    One that keeps what was measured waits for its training again, until `DEATHS` workers have died in it.

    A trial is told FAIL with the attributes ``error: "worker died"`` and, unless it was itself a retry (``retry_of``),
    ``retry: true``. What is enqueued is derived from the study: every failed trial marked ``retry`` that no trial names
    in its ``retry_of``. A process killed between telling and enqueueing therefore loses nothing, as the next sweep
    enqueues, and no trial is enqueued twice, as sweeps take turns. A worker that is alive after all (its clock or its
    network was off) keeps its result if its ``tell`` comes first; else `finish` returns False. The retry starts from
    the parameters alone: constraint and results are not carried over.

    The study's ledger is up to date afterwards.

    Returns:
        The numbers of the trials that this call failed.
    """
    swept: list[int] = []

    def decide() -> None:
        for trial in _dead(ledger_of(study)):
            lost = trial.user_attrs.get(_LOST, 0) + 1
            if MEASURED not in trial.user_attrs:
                again = "retry_of" not in trial.user_attrs
                told = _tell_fail(study, trial, "worker died", again)
            elif told := lost >= DEATHS:
                told = _tell_fail(study, trial, f"{lost} workers died while they trained it", retry=False)
            else:
                _wait_again(study, trial, lost)
            if told:
                swept.append(trial.number)
        for trial in _owed(ledger_of(study)):
            kept = {k: v for k, v in trial.user_attrs.items() if k not in _BOOKKEEPING}
            study.enqueue_trial(_params(trial), {**kept, "retry_of": trial.number})

    now = ledger_of(study)
    if _dead(now) or _owed(now):
        alone_in(study, decide)
        ledger_of(study)
    return swept


def finish(
    study: optuna.Study,
    trial: optuna.Trial,
    quality: float,
    throughput: float,
    constraint: float,
    attrs: Mapping[str, Any],
    limits: Mapping[str, float] | None = None,
) -> bool:
    """Store a measured trial: its constraint "latency" (<= 0 fits the budget), attributes, values.

    Every measured trial is COMPLETE with a quality, over budget or not: TPE would learn as much from PRUNED ones, but
    NSGA-II and the Gaussian process nothing. Each key of `attrs` is one write (1 ms in a journal, 10 ms in a database),
    so values that nobody sorts by belong into one dict.

    Args:
        quality, throughput: the two objectives.
        attrs: JSON values by name; numbers become the dashboard's columns.
        limits: further constraints by name, as that of the latency.

    Returns:
        False if the lease expired and another worker retried the trial: the result is then dropped.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        for name, excess in {"latency": constraint, **(limits or {})}.items():
            trial.set_constraint(name, excess)
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
        told = study.tell(trial, [quality, throughput], state=TrialState.COMPLETE, skip_if_finished=True)
    except UpdateFinishedTrialError:
        return False
    return bool(told.state == TrialState.COMPLETE)


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


def remaining(study: optuna.Study, total: int, look: bool = True) -> int:
    """How many more trials to start so that `total` are finished or running.

    A trial that is to be run again is not counted: its retry will be.

    Args:
        look: as `ledger_of` takes it.
    """
    now = ledger_of(study, look)
    return max(0, total - now.counted - sum(not trial.user_attrs.get("retry") for trial in now.running))


def due(
    study: optuna.Study, total: int, say: Callable[[str], None], expired: Callable[[], bool] = lambda: False
) -> int:
    """How many more trials to start (see `remaining`) or to train, after a sweep.

    Where there are none, wait until each worker on another machine has extended its lease, or until its lease expires:
    this process then retries its trial.

    Args:
        say: told that there is a wait.
        expired: ends the wait.
    """
    left = _left(study, total)
    silent = {} if left else _elsewhere(study)
    if silent and not expired():
        minutes = max(held.left_s(number) for number, held in silent.items()) / 60
        say(
            f"waiting for other machines' workers (trial {', '.join(map(str, silent))}) to extend their leases: one "
            f"that is not extended expires within {minutes:.0f} minutes, and its trial is retried here"
        )
    while silent and not left and not expired():
        time.sleep(LOOK_S)
        left = _left(study, total)
        now = _elsewhere(study)
        silent = {number: held for number, held in silent.items() if now.get(number) == held}
    return left


def _left(study: optuna.Study, total: int) -> int:
    """How many trials to start or to train, after a sweep."""
    sweep(study)
    return remaining(study, total, look=False) + len(waiting_for_training(study, look=False))


def enqueue(
    study: optuna.Study,
    params: Mapping[str, int | str],
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
        now = ledger_of(study)
        if params in [*now.read(_params), *map(_params, now.open)]:
            return False
        study.enqueue_trial(dict(params), dict(attrs))
        return True

    return alone_in(study, decide)


def _leases(study: optuna.Study) -> dict[int, Lease]:
    """Of the trials that run, by number."""
    found = {t.number: t.user_attrs.get("lease") for t in ledger_of(study).running}
    return {number: Lease.read(held) for number, held in found.items() if held}


def _elsewhere(study: optuna.Study) -> dict[int, Lease]:
    """The leases of the trials that run on other machines, by number."""
    return {number: held for number, held in _leases(study).items() if held.elsewhere}


def _dead(now: Ledger) -> list[FrozenTrial]:
    return [trial for trial in now.running if _worker_is_dead(trial)]


def _worker_is_dead(trial: FrozenTrial) -> bool:
    held = trial.user_attrs.get("lease")
    if held is None:  # see `ask` and `hand_over`
        return MEASURED not in trial.user_attrs
    found = Lease.read(held)
    return found.has_expired(trial.number) or (trial._trial_id not in _mine and found.is_mine())


def _wait_again(study: optuna.Study, trial: FrozenTrial, lost: int) -> None:
    """Let a trial wait for its training, unless its worker was alive after all and has told it."""
    from optuna.exceptions import UpdateFinishedTrialError

    with suppress(UpdateFinishedTrialError):
        study._storage.set_trial_user_attr(trial._trial_id, _LOST, lost)
        study._storage.set_trial_user_attr(trial._trial_id, "lease", None)


def _owed(now: Ledger) -> list[FrozenTrial]:
    """Failed trials to be run again that nobody has enqueued yet."""
    return [trial for _, trial in sorted(now.owed.items()) if _begun(trial)]


def _begun(trial: FrozenTrial) -> bool:
    """Whether a trial was enqueued, or has parameters: what another can try again."""
    return "fixed_params" in trial.system_attrs or bool(trial.params)


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
