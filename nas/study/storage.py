"""Where a study is kept: a journal file (one machine) or a database behind a URL (several machines).

Optuna's storages are used as they are, plus what a search that may be killed at any moment needs:

- a journal whose last line a killed writer or a full disk tore is cut back before the next append
  (one append after a torn line would make it unreadable for ever);
- Ctrl-C and SIGTERM wait until the journal's file and Optuna's memory of it agree;
- `alone`, for decisions that read, then write: one process at a time takes them;
- a database that goes away during a search is waited for;
- what goes wrong with a file or a server is told in one line, without the URL's password.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from nas.errors import DiskFull, UserError, is_full
from nas.files import tell
from nas.study.samplers import quiet_optuna
from nas.text import _SECRETS, mask_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import sqlalchemy
    from optuna.storages import BaseStorage
    from optuna.trial import TrialState

T = TypeVar("T")
PATIENCE_S = 600  # how long a lost database is waited for
PAUSES_S = (0.2, 5.0)  # between attempts: the first, and the longest
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
    if read_only and not _holds_studies(url):
        raise UserError(f"{mask_url(storage)} holds no study")
    try:
        database = RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs=_engine_options(url),
            skip_table_creation=read_only,
        )
    except RuntimeError as error:  # tables of another Optuna
        told = str(error).replace("$STORAGE_URL", shlex.quote(mask_url(storage)))
        raise UserError(f"cannot use the storage {mask_url(storage)}: {told}") from None
    if read_only:
        return database
    cached = get_storage(database)
    return cached if url.get_backend_name() == "sqlite" else _Patient(cached, storage)


def _holds_studies(url: sqlalchemy.URL) -> bool:
    """Whether the database has Optuna's tables."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(url, **_engine_options(url), poolclass=sqlalchemy.NullPool)
    return sqlalchemy.inspect(engine).has_table("studies")


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
    if backend == "sqlite" and url.host:
        raise UserError(
            f"{mask_url(storage)} names the host {url.host!r}: for a file write sqlite:///{url.host}/{url.database}"
        )
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise UserError("a SQLite storage needs a file: sqlite:///PATH")
    if url.drivername == "postgresql":  # SQLAlchemy 2.0 would look for psycopg2
        url = url.set(drivername="postgresql+psycopg")
    try:
        url.get_dialect().import_dbapi()
    except (ImportError, ArgumentError) as error:
        hint = ": pip install '.[postgresql]'" if url.drivername == "postgresql+psycopg" else ""
        raise UserError(f"no driver for {mask_url(storage)}: {error}{hint}") from None
    return url


def _engine_options(url: sqlalchemy.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}  # Optuna's default loses to "database is locked"
    return {"connect_args": {"connect_timeout": CONNECT_TIMEOUT_S}, "pool_pre_ping": True}


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
        raise UserError(f"cannot use the storage {mask_url(str(storage))}: {_reason(error, storage)}") from None


def _reason(error: Exception, storage: str | Path) -> str:
    """What a driver says, in one line without the password of `storage`."""
    cause = error.__cause__ or error
    text = str(getattr(cause, "orig", None) or cause).strip() or type(cause).__name__
    passwords = [found for secret in _SECRETS for _, found in secret.findall(str(storage)) if found]
    for form in (*passwords, *map(unquote, passwords)):
        text = text.replace(form, "***")
    return text.splitlines()[0]


# ---------------------------------------------------------------- a database that goes away


class _Patient:
    """A database's storage whose calls wait for a lost server, PATIENCE_S at most; told as it goes and as it is back.

    An answer may be lost after the server has acted on it, so that each call must bear to be made twice: attributes
    and parameters are then stored again, whether a trial was told is looked up, and trials are made in `alone` only.
    Only the main thread waits: a lease that cannot be extended now is extended at the next beat.
    """

    def __init__(self, storage: BaseStorage, url: str) -> None:
        import sqlalchemy

        self._storage, self._url = storage, url
        self._alone: int | None = None
        self._gave_up = False
        sqlalchemy.event.listen(storage._backend.engine, "checkout", self._keep_connection)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        return partial(self.wait, found) if callable(found) else found

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; a second attempt is content with what the first one stored."""
        attempts = 0

        def store() -> bool:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                trial = self._storage.get_trial(trial_id)
                if trial.state == state and (values is None or trial.values == list(values)):
                    return True
            return self._storage.set_trial_state_values(trial_id, state, values)

        return self.wait(store)

    def wait(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The call's result, made again as long as the server is lost."""
        try:
            result = call(*args, **kwargs)
        except _database_errors() as error:
            here = threading.current_thread() is threading.main_thread() and self._alone is None
            if self._gave_up or not here or not _is_lost(error):
                raise
            return self._outlast(error, partial(call, *args, **kwargs))
        self._gave_up = False
        return result

    def _outlast(self, error: Exception, call: Callable[[], T]) -> T:
        """The call's result once the server is back. Ctrl-C ends this wait and spares what it leads to another."""
        self._gave_up = True
        lost, pause = time.monotonic(), PAUSES_S[0]
        tell(
            f"the database {mask_url(self._url)} is away ({_reason(error, self._url)}): it is waited for, "
            f"{PATIENCE_S / 60:g} minutes at most"
        )
        while time.monotonic() + pause < lost + PATIENCE_S:
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])
            try:
                result = call()
            except _database_errors() as again:
                if not _is_lost(again):
                    raise
                error = again
            else:
                self._gave_up = False
                tell(f"the database is back after {time.monotonic() - lost:.0f} s")
                return result
        raise error

    def decide(self, action: Callable[[], T]) -> T:
        """The result of `action`, whose calls all use the connection that holds the lock: they end with it."""
        sessions = self._storage._backend.scoped_session
        with exclusive(self._storage) as connection:
            sessions.remove()
            sessions(bind=connection)
            self._alone = threading.get_ident()
            try:
                return action()
            finally:
                self._alone = None
                sessions.remove()

    def _keep_connection(self, *_: Any) -> None:
        if self._alone == threading.get_ident():
            raise ConnectionError("the connection that held the lock was lost")


def _database_errors() -> tuple[type[Exception], ...]:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError, StorageInternalError, ConnectionError


def _is_lost(error: Exception) -> bool:
    """Whether there is no connection to the server any more, or it is stopping or starting."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError):
        return isinstance(cause, ConnectionError | PendingRollbackError)  # the latter where Optuna asked once more
    code = getattr(cause.orig, "sqlstate", None)
    refused = isinstance(cause, OperationalError) and (code is None or code.startswith("57P"))
    return cause.connection_invalidated or refused


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
    if is_full(error):
        return DiskFull(path.parent, error=error)
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


def alone(storage: BaseStorage, decide: Callable[[], T]) -> T:
    """What `decide` returns, called while no other process of this storage decides (see `exclusive`).

    A lost database takes the lock with it: `decide` is then called again, and reads again.
    """
    if isinstance(storage, _Patient):
        return storage.wait(storage.decide, decide)
    with exclusive(storage):
        return decide()


@contextmanager
def exclusive(storage: str | Path | BaseStorage) -> Iterator[sqlalchemy.Connection | None]:
    """Hold what only one process at a time may hold of all that use this storage.

    The kernel, or the database server, frees it when its holder dies.

    Args:
        storage: where it is, or what `open_storage` opened there.

    Yields:
        The connection that holds it, of a server.

    Raises:
        UserError: the path or URL cannot be used, or another process holds it for EXCLUSIVE_TIMEOUT_S.
        SQLAlchemyError: what a server says of either (see `storage_errors`).
    """
    guard = _guard(storage)
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
            yield None
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
            connection.commit()
            yield connection


def _guard(storage: str | Path | BaseStorage) -> Path | sqlalchemy.Engine:
    """What `exclusive` locks: the file beside which a lock file is put, or the server to ask."""
    if isinstance(storage, str | Path):
        if "://" not in str(storage):
            return _journal_path(storage)
        import sqlalchemy

        url = _sql_url(str(storage))
        engine = sqlalchemy.create_engine(url, **_engine_options(url), poolclass=sqlalchemy.NullPool)
    elif isinstance(storage._backend, _Journal):
        return storage._backend.path
    else:
        engine = storage._backend.engine
    return Path(engine.url.database).absolute() if engine.dialect.name == "sqlite" else engine
