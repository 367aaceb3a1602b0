"""The Optuna study behind a search: where it is kept, who runs which trial, what a trial becomes.

A study is kept in a journal file (one machine) or behind a database URL (several machines).
Optuna's storages are used as they are, plus what a search that may be killed at any moment needs:

- a journal whose last line a killed writer or a full disk tore is cut back before the next append
  (one append after a torn line would make it unreadable for ever);
- `lease` and `sweep`: a trial says which process runs it, and any worker fails the trials of dead
  ones and enqueues their parameters again (Optuna's heartbeats exist only on databases and only
  inside ``study.optimize``);
- decisions that read, then write (create, sweep, enqueue) are taken by one process at a time.

Optuna's own log of operations decides who wins a race for a single trial: the first ``tell`` does.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from nas.errors import UserError
from nas.samplers import quiet_optuna

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import optuna
    import sqlalchemy
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

METRICS = ["quality", "throughput"]  # both maximised
META = "vitnas"  # the study attribute that holds what must agree to continue the study
WORKER_DIED = "worker died"
UNLEASED_S = 60.0  # a trial running this long without a lease lost its worker before `lease`
CONNECT_TIMEOUT_S = 5
JOURNAL_LOCK_GRACE_S = 30  # Optuna's default: a journal lock held this long belongs to a dead one
EXCLUSIVE_TIMEOUT_S = 60

_JOURNAL_HEAD = b'{"op_code":'  # every line of a journal starts so
_EXCLUSIVE_SQL = {  # held by the connection, so that it ends with its process
    "postgresql": [
        f"SET lock_timeout = '{EXCLUSIVE_TIMEOUT_S}s'",
        "SELECT pg_advisory_lock(86487)",
    ],
    "mysql": [f"SELECT GET_LOCK('vitnas', {EXCLUSIVE_TIMEOUT_S})"],
}

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------- opening


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
    with storage_errors(storage), _exclusive(_guard(storage)):
        backend = open_storage(storage)
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
        elif stored != meta:
            differences = "; ".join(f"{key} {old}, this command says {new}" for key, old, new in _differ(stored, meta))
            raise UserError(f"this study has {differences}; use --study for a new one")
    return study


def open_storage(storage: str | Path, read_only: bool = False) -> BaseStorage:
    """Open the journal file or database at `storage`.

    Args:
        read_only: for looking at what is there (the dashboard): nothing is created or repaired,
            and a database is handed out raw, without the cache that hides others' writes.

    Raises:
        UserError: it cannot be reached, read or written; the message hides the URL's password.
    """
    quiet_optuna()
    if "://" not in str(storage):
        return _open_journal(_journal_path(storage), read_only)
    with storage_errors(storage):
        return _open_database(str(storage), read_only)


def _open_journal(path: Path, read_only: bool) -> BaseStorage:
    from optuna.storages import JournalStorage

    if read_only and not path.exists():
        raise UserError(f"there is no study journal at {path}")
    try:
        journal = _Journal(path)
        if not read_only:
            journal.lock.acquire()  # cuts a torn last line
            journal.lock.release()
        opened = JournalStorage(journal)
        opened._thread_lock = _Uninterrupted()
        return opened
    except OSError as error:
        raise _file_error(path, error) from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"the study journal {path} is damaged: {error!r}") from error


def _open_database(storage: str, read_only: bool) -> BaseStorage:
    from optuna.storages import RDBStorage, get_storage

    url = _sql_url(storage)
    if read_only and url.get_backend_name() == "sqlite" and not Path(url.database).exists():
        raise UserError(f"there is no SQLite database at {url.database}")
    try:
        database = RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs=_engine_options(url),
            skip_compatibility_check=read_only,
            skip_table_creation=read_only,
        )
    except RuntimeError as error:  # tables of another Optuna
        raise UserError(f"cannot use the storage {mask_url(storage)}: {error}") from None
    return database if read_only else get_storage(database)


def _sql_url(storage: str) -> sqlalchemy.URL:
    """The URL with the driver to use; raises UserError without repeating any part of a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):
        url = None
    backend = url and url.get_backend_name()
    if not url or (backend != "sqlite" and "@" in f"{url.host}{url.database}"):
        raise UserError(
            f"cannot read the storage URL {mask_url(storage)}: it should look like "
            "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, a @ in the password written %40"
        )
    if backend != "sqlite" and backend not in _EXCLUSIVE_SQL:
        raise UserError(
            f"unknown database {backend!r} in {mask_url(storage)}: use postgresql://, mysql:// or sqlite:///"
        )
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise UserError("a SQLite storage needs a file: sqlite:///PATH")
    if url.drivername == "postgresql":  # SQLAlchemy 2.0 would look for psycopg2
        url = url.set(drivername="postgresql+psycopg")
    try:
        url.get_dialect().import_dbapi()
    except (ImportError, ArgumentError) as error:
        raise UserError(f"no driver for {mask_url(storage)}: {error}") from None
    return url


def _engine_options(url: sqlalchemy.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}  # Optuna's default loses to "database is locked"
    return {"connect_args": {"connect_timeout": CONNECT_TIMEOUT_S}, "pool_pre_ping": True}


def mask_url(url: str) -> str:
    """`url` with its password, in the authority or in a query parameter, replaced by ***."""
    url = re.sub(r"(://[^:@/?]*:).*@", r"\1***@", url)
    return re.sub(r"(?i)(\b(?:password|passwd|pwd)=)[^&]*", r"\1***", url)


@contextmanager
def storage_errors(storage: str | Path) -> Iterator[None]:
    """Turn what a database raises inside the block into a UserError with the password hidden.

    For any stretch of code that uses a study: a server may go away at any time.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ or error
        text = str(getattr(cause, "orig", None) or cause) or type(cause).__name__
        for secret in re.findall(r"://[^:@/?]*:(.+)@|(?i:password|passwd|pwd)=([^&]+)", str(storage)):
            for form in filter(None, (*secret, *map(unquote, secret))):
                text = text.replace(form, "***")
        raise UserError(f"cannot use the storage {mask_url(str(storage))}: {text.splitlines()[0]}") from None


def _differ(stored: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that differ, with both values, sub-dicts as "hardware.cpu"."""
    for key in [*stored, *(k for k in given if k not in stored)]:
        old, new = stored.get(key, "unset"), given.get(key, "unset")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from ((f"{key}.{sub}", *values) for sub, *values in _differ(old, new))
        elif old != new:
            yield key, old, new


# ---------------------------------------------------------------------- the journal file


class _JournalLock:
    """Optuna's lock of a journal file; whoever takes it first cuts off a torn last line.

    The open() lock, not Optuna's default symlink lock: a symlink left by a killed process dangles
    once the run's folder is moved, and Optuna then waits for ever, beyond any grace period.
    """

    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileOpenLock

        self._path = path
        self._lock = JournalFileOpenLock(str(path), grace_period=JOURNAL_LOCK_GRACE_S)

    def acquire(self) -> bool:
        self._lock.acquire()
        try:
            self._cut_torn_line()
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        self._lock.release()

    def _cut_torn_line(self) -> None:
        with self._path.open("r+b") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            torn = file.seek(0, os.SEEK_END) - whole
            file.truncate(whole)
        _log.warning("%s: cut %d bytes of an unfinished last line", self._path, torn)


class _Journal:
    """Optuna's journal file backend, telling what went wrong with the file in one line."""

    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileBackend

        self.path = path
        self.lock = _JournalLock(path)
        self._file = JournalFileBackend(str(path), lock_obj=self.lock)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            self._file.append_logs(logs)
        except OSError as error:
            raise _file_error(self.path, error) from error


class _Uninterrupted:
    """The lock under which JournalStorage works, holding Ctrl-C and SIGTERM back until its work is done.

    An exception in the midst leaves the file locked for the grace period, or the trials in memory one short, so that
    what follows is stored under other trials (tried: 13 and 2 of 900 interrupts).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handlers: dict[int, Any] = {}
        self._held: set[int] = set()

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # the only one that signals interrupt
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers.setdefault(number, signal.signal(number, lambda number, _: self._held.add(number)))
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if threading.current_thread() is threading.main_thread():
            while self._handlers:
                signal.signal(*self._handlers.popitem())
            held, self._held = self._held, set()
            for number in held:
                signal.raise_signal(number)


def _file_error(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return UserError(
            f"disk full while writing {path}: finished trials are kept; free space and run the same command again"
        )
    return UserError(f"cannot use {path}: {error.strerror or error}")


def _journal_path(storage: str | Path) -> Path:
    """The path of a journal, made or not; UserError if something else is there."""
    path = Path(storage).absolute()
    try:
        os.stat(os.path.join(path.parent, ""))
        if not path.exists():
            return path
        if not path.is_file():
            raise UserError(f"{path} is not a file: --storage takes a journal file or a URL")
        with path.open("rb") as file:
            head = file.read(len(_JOURNAL_HEAD))
    except OSError as error:
        raise _file_error(path, error) from error
    if not _JOURNAL_HEAD.startswith(head):
        hint = f"; for SQLite write sqlite:///{path}" if head.startswith(b"SQLite") else ""
        raise UserError(f"{path} is not an Optuna journal: it is left as it was{hint}")
    return path


# ------------------------------------------------------------------- one process at a time


def _guard(storage: str | Path) -> Path | sqlalchemy.Engine:
    """What `_exclusive` locks for a storage that is not open yet."""
    if "://" not in str(storage):
        return _journal_path(storage)
    import sqlalchemy

    url = _sql_url(str(storage))
    return sqlalchemy.create_engine(url, **_engine_options(url), poolclass=sqlalchemy.NullPool)


def _guard_of(study: optuna.Study) -> Path | sqlalchemy.Engine:
    backend = study._storage._backend
    return backend.path if isinstance(backend, _Journal) else backend.engine


@contextmanager
def _exclusive(guard: Path | sqlalchemy.Engine) -> Iterator[None]:
    """Hold what only one process at a time may hold of all that use this storage.

    The kernel, or the database server, frees it when its holder dies.
    """
    if not isinstance(guard, Path) and guard.dialect.name == "sqlite":
        guard = Path(guard.url.database).absolute()
    if isinstance(guard, Path):
        import filelock

        lock = filelock.FileLock(f"{guard}.guard", timeout=EXCLUSIVE_TIMEOUT_S)
        try:
            os.stat(guard.parent)  # filelock would make the folder
            lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"another process keeps {guard}.guard locked") from error
        except OSError as error:
            raise _file_error(guard, error) from error
        try:
            yield
        finally:
            lock.release()
    else:
        import sqlalchemy

        with guard.connect() as connection:
            connection.detach()  # closed, not pooled, at the end: that is what frees the lock
            for statement in _EXCLUSIVE_SQL[guard.dialect.name]:
                result = connection.execute(sqlalchemy.text(statement))
            if result.scalar() == 0:  # MySQL's way of saying that the time is up
                raise UserError("another process keeps the study's database locked")
            yield


# ------------------------------------------------------------------------- running a trial


def lease(trial: optuna.Trial, seconds: float) -> None:
    """Store in `trial` that this process runs it and means to be done within `seconds`.

    Call it right after ``study.ask()``, before the first suggestion (which is when the sampler thinks), and again
    to extend it. On this machine the process itself is looked at and the time does not matter; workers on other
    machines go by the time, so clocks should agree within a small part of it.
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
    if not (_dead(study) or _owed(study)):
        return []
    with _exclusive(_guard_of(study)):
        swept = [
            trial.number
            for trial in _dead(study)
            if _tell_fail(study, trial, WORKER_DIED, retry="retry_of" not in trial.user_attrs)
        ]
        for trial in _owed(study):
            kept = {k: v for k, v in trial.user_attrs.items() if k not in _BOOKKEEPING}
            study.enqueue_trial(_params(trial), {**kept, "retry_of": trial.number})
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


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were told, measured or failed."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]


def remaining(study: optuna.Study, total: int) -> int:
    """How many more trials to start so that `total` are finished or running.

    A trial that is to be run again is not counted: its retry will be. Asked before each trial, several workers
    overshoot by at most one each.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    return max(0, total - sum(t.state != TrialState.WAITING and not t.user_attrs.get("retry") for t in trials))


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
    with _exclusive(_guard_of(study)):
        if any(_params(trial) == params for trial in study.get_trials(deepcopy=False)):
            return False
        study.enqueue_trial(dict(params), dict(attrs))
    return True


_BOOKKEEPING = {"lease", "error", "retry", "retry_of"}


def _dead(study: optuna.Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return [t for t in study.get_trials(False, [TrialState.RUNNING]) if _worker_is_dead(t)]


def _worker_is_dead(trial: FrozenTrial) -> bool:
    held = trial.user_attrs.get("lease")
    if held is None:
        return time.time() - trial.datetime_start.timestamp() > UNLEASED_S
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
