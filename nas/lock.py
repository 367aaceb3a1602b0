"""Who has a device of this machine: one that measures, or any number that compute and give way to it.

There are two locks a kind of device, files in a folder that all users share. Who measures takes the gate and then the
device, and keeps both. Trainings and other long computations share the devices; before each batch they look at the
gates, and where one is shut they let go of the devices until it is open again. So a timing waits for a batch at most,
and a training only while something is timed.

VITNAS_LOCKS: another folder for the locks.
"""

import contextlib
import fcntl
import logging
import math
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from nas.files import close_lock, open_lock

T = TypeVar("T")

KINDS = ("cpu", "cuda")
SHARED_FOLDERS = ("/run/lock", "/var/lock", "/tmp")
PATIENCE_S = 2  # before a wait is told
WAIT_S = 20
TOGETHER_S = 1800  # processes that train together wait for each other for an hour at most
POLL_S = 0.05
told: set[str] = set()
_log = logging.getLogger(__name__)


def folder() -> Path:
    """The same for all users and whatever their TMPDIR: the first that anyone may write to."""
    if given := os.environ.get("VITNAS_LOCKS"):
        return Path(given)
    for name in SHARED_FOLDERS:
        with contextlib.suppress(OSError):
            if os.stat(name).st_mode & stat.S_IWOTH and os.access(name, os.W_OK):
                return Path(name)
    return Path(tempfile.gettempdir())


def tell_once(line: str) -> None:
    if line not in told:
        told.add(line)
        _log.warning("%s", line)


class ProcessLock:
    """A lock on a name: one holder, or several that share it, among all processes and users of this machine.

    Where the file system has no locks, or the file cannot be had, that is told once, and nobody waits.
    """

    def __init__(self, name: str):
        self._path = folder() / name
        self._file: int | None = None

    def acquire(self, timeout_s: float, shared: bool = False) -> bool:
        """Whether it is held now; False where another process kept it for timeout_s (infinity: not polled)."""
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        deadline = time.monotonic() + timeout_s
        while not self._locked(how if timeout_s == math.inf else how | fcntl.LOCK_NB):
            if time.monotonic() >= deadline:
                self.release()
                return False
            time.sleep(POLL_S)
        return True

    def release(self) -> None:
        if self._file is not None:
            close_lock(self._file)
            self._file = None

    def _locked(self, how: int) -> bool:
        try:
            while True:
                if self._file is None:
                    self._file = _open(self._path)
                fcntl.flock(self._file, how)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                        return True
                self.release()  # somebody tidied up the folder: others lock another file by now
        except BlockingIOError:
            return False
        except OSError as error:
            tell_once(f"{self._path} cannot be locked ({error.strerror}): nobody is kept from disturbing a measurement")
            return True


def _open(path: Path) -> int:
    """Another user's file, in a folder where only owners may write to theirs, can be opened but not "created"."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return open_lock(path, os.O_RDONLY | os.O_NOFOLLOW)
        with contextlib.suppress(FileExistsError):
            created = os.open(path, os.O_CREAT | os.O_EXCL, 0o644)
            os.fchmod(created, 0o644)  # whatever the umask
            os.close(created)


class DeviceLock:
    """Of a kind of device of this machine, for who measures on it."""

    def __init__(self, kind: str):
        self._gate, self._device = ProcessLock(f"vitnas-{kind}.gate"), ProcessLock(f"vitnas-{kind}.lock")
        self._through = False

    def acquire(self, timeout_s: float) -> bool:
        """Whether it is had now; a place at the gate is kept until `release`."""
        deadline = time.monotonic() + timeout_s
        self._through = self._through or self._gate.acquire(timeout_s)
        return self._through and self._device.acquire(max(0, deadline - time.monotonic()))

    def release(self) -> None:
        self._device.release()
        self._gate.release()
        self._through = False


def in_turn(items: Iterable[T]) -> Iterator[T]:
    """The items, each of them when nothing is timed on this machine; until the next one it is this process's turn.

    A process that holds a device to measure has its turn already. Of several that train together (torchrun) the first
    one waits, and the others for it, so it does not wait for ever.
    """
    with turn:
        for item in items:
            turn.give_way()
            yield item


class _Turn:
    """This process's share in the devices: had while anything computes in turn and nothing here measures."""

    def __init__(self) -> None:
        self._computing = self._measuring = 0
        self._held: list[ProcessLock] = []
        self._waited_enough = False

    def __enter__(self) -> None:
        self._computing += 1

    def __exit__(self, *_: object) -> None:
        self._computing -= 1
        if not self._computing:
            self._let_go()

    def stand_back(self, change: int) -> None:
        """Something here begins (1) or ends (-1) to measure."""
        self._measuring += change
        self._let_go()

    def give_way(self) -> None:
        """Have the turn on return, and let those measure that wait for it before."""
        together = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if self._measuring or (together and int(os.environ.get("LOCAL_RANK", 0))):
            return
        gates = [ProcessLock(f"vitnas-{kind}.gate") for kind in KINDS]
        while not (all(map(_is_open, gates)) and (self._held or self._take())):
            self._let_go()
            limit_s = math.inf if not together else 0 if self._waited_enough else TOGETHER_S
            if not all(_wait_for(gate, limit_s) for gate in gates):
                tell_once(f"another process still measures after {TOGETHER_S} s: training goes on beside it")
                self._waited_enough = True
                return
        self._waited_enough = False

    def _take(self) -> bool:
        for kind in KINDS:
            self._held.append(ProcessLock(f"vitnas-{kind}.lock"))
            if not self._held[-1].acquire(POLL_S, shared=True):
                return False
        return True

    def _let_go(self) -> None:
        while self._held:
            self._held.pop().release()


def _wait_for(gate: ProcessLock, limit_s: float) -> bool:
    """Whether nobody measures behind a gate any more, within limit_s; a wait is told, once."""
    try:
        if gate.acquire(min(PATIENCE_S, limit_s), shared=True):
            return True
        tell_once("waiting for another vitnas process that measures on this machine")
        return gate.acquire(limit_s, shared=True)
    finally:
        gate.release()


def _is_open(gate: ProcessLock) -> bool:
    """Whether nobody measures behind a gate or waits for it."""
    try:
        return gate.acquire(0, shared=True)
    finally:
        gate.release()


turn = _Turn()
