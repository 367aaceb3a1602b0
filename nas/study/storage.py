"""Where a study is kept: a journal file (one machine), a database behind a URL (several machines), or either behind a
proxy (`serve`, hundreds of workers).

Optuna's storages are used as they are, plus what a search that may be killed at any moment needs: a journal that
survives a torn last line and interrupts (`journal`), decisions that one process at a time takes (`alone`), a database
that goes away and comes back (`patient`), and errors in one line without the URL's password (`errors`).
"""

from __future__ import annotations

import shlex
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nas.errors import UserError
from nas.study.database import engine_options, holds_studies, is_proxy, sql_url
from nas.study.errors import file_error, storage_errors
from nas.study.exclusive import exclusive, open_proxy
from nas.study.journal import Journal, UninterruptedLock, journal_path
from nas.study.patient import PatientStorage
from nas.study.samplers import quiet_optuna
from nas.text import mask_url

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Iterator

    from optuna.storages import BaseStorage
    from optuna.storages.journal import BaseJournalBackend

T = TypeVar("T")


def open_storage(storage: str | Path, read_only: bool = False) -> BaseStorage:
    """Open the journal file, database or proxy at `storage`.

    Args:
        read_only: for the dashboard: nothing is created or repaired, and a database comes without the cache that hides
            other processes' writes.

    Raises:
        UserError: it cannot be reached, read or written; the message hides the URL's password.
    """
    quiet_optuna()
    if "://" not in str(storage):
        return _open_journal(journal_path(storage), read_only)
    with storage_errors(storage):
        return (_open_proxy if is_proxy(storage) else _open_database)(str(storage), read_only)


def _open_journal(path: Path, read_only: bool) -> BaseStorage:
    from optuna.storages import JournalStorage

    if read_only and not path.exists():
        raise UserError(f"there is no study journal at {path}")
    try:
        journal = Journal(path)
        if not read_only:
            journal.lock.acquire()  # cuts a torn last line
            journal.lock.release()
        opened = JournalStorage(cast("BaseJournalBackend", journal))
        opened._thread_lock = cast("LockType", UninterruptedLock())
        return opened
    except OSError as error:
        raise file_error(path, error) from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"the study journal {path} is damaged: {error!r}") from error


def _open_proxy(storage: str, read_only: bool) -> BaseStorage:
    proxy = open_proxy(storage)
    with suppress(KeyError):  # the server is there
        proxy.get_study_id_from_name("")
    return proxy if read_only else cast("BaseStorage", PatientStorage(proxy, storage))


def _open_database(storage: str, read_only: bool) -> BaseStorage:
    from optuna.storages import RDBStorage, get_storage

    url = sql_url(storage)
    if read_only and url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        raise UserError(f"there is no SQLite database at {url.database}")
    if read_only and not holds_studies(url):
        raise UserError(f"{mask_url(storage)} holds no study")
    try:
        database = RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs=engine_options(url),
            skip_table_creation=read_only,
        )
    except RuntimeError as error:  # tables of another Optuna
        told = str(error).replace("$STORAGE_URL", shlex.quote(mask_url(storage)))
        raise UserError(f"cannot use the storage {mask_url(storage)}: {told}") from None
    if read_only:
        return database
    cached = get_storage(database)
    return cached if url.get_backend_name() == "sqlite" else cast("BaseStorage", PatientStorage(cached, storage))


def alone(storage: BaseStorage, decide: Callable[[], T]) -> T:
    """Call `decide` while no other process of this storage decides (see `exclusive`); returns its result.

    A lost server takes the lock with it: `decide` is then called again, and reads again.
    """
    if isinstance(patient := cast(Any, storage), PatientStorage):
        result: T = patient.wait(patient.decide, decide)
        return result
    with exclusive(storage):
        return decide()


@contextmanager
def holding(storage: BaseStorage) -> Iterator[None]:
    """Hold the lock of a storage for the calls that this thread makes, which end with it."""
    with storage.holding() if isinstance(storage, PatientStorage) else exclusive(storage):
        yield
