"""A study's journal file on one machine: torn last lines are cut, and interrupts wait for a write to end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nas.errors import UserError
from nas.study.errors import file_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.storages.journal._file import BaseJournalFileLock

JOURNAL_LOCK_GRACE_S = 30
"""Optuna's default: a journal lock held for longer belongs to a dead process."""
_JOURNAL_HEAD = b'{"op_code":'
"""How every line of a journal starts."""

_log = logging.getLogger(__name__)


class JournalLock:
    """Optuna's lock of a journal file; whoever takes it first cuts off a torn last line.

    A killed writer or a full disk leaves such a line, and one append after it makes the journal unreadable for ever.
    It is the open() lock, not Optuna's default symlink lock: a symlink left by a killed process dangles once the run's
    folder is moved, and Optuna then waits for ever, beyond any grace period.
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


class Journal:
    """Optuna's journal file backend, whose errors are one line each."""

    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileBackend

        self.path = path
        self.lock = JournalLock(path)
        self._file = JournalFileBackend(str(path), lock_obj=cast("BaseJournalFileLock", self.lock))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            self._file.append_logs(logs)
        except OSError as error:
            raise file_error(self.path, error) from error


class UninterruptedLock:
    """The lock under which JournalStorage works, holding Ctrl-C and SIGTERM back until its work is done.

    An exception inside it leaves the file locked for the grace period, or the trials in memory one short, so that what
    follows is stored under other trials (observed: 13 and 2 of 900 interrupts).
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


def journal_path(storage: str | Path) -> Path:
    """The absolute path of a journal, which may not exist yet.

    Raises:
        UserError: something else is there, or it cannot be read.
    """
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
        raise file_error(path, error) from error
    if not _JOURNAL_HEAD.startswith(head):
        hint = f"; for SQLite write sqlite:///{path}" if head.startswith(b"SQLite") else ""
        raise UserError(f"{path} is not an Optuna journal: it is left as it was{hint}")
    return path
