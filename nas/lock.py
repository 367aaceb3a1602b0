"""Locks on the devices of this machine: one process measures, or any number of processes compute.

Each kind of device has two locks, files in a folder that all users share: a gate and the device itself. A process that
measures takes the gate, then the device, and keeps both. Trainings and other long computations share the devices.
Before each batch they check the gates; where one is closed they release the devices until it opens. So a measurement
waits for one batch at most, and a training waits only while something is measured. Of the processes that train on a
GPU, one has it at a time (`training_alone`).

The environment variable VITNAS_LOCKS names another folder for the locks.
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

DEVICE_KINDS = ("cpu", "cuda")
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

    Where the file system has no locks, or the file cannot be opened, a warning is logged once, and nobody waits.
    """

    def __init__(self, name: str):
        self._path = folder() / name
        self._file: int | None = None

    def acquire(self, timeout_s: float, shared: bool = False) -> bool:
        """Take the lock; returns False if another process holds it for timeout_s (infinity: not polled)."""
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
    """The lock of a kind of device of this machine, for a process that measures."""

    def __init__(self, kind: str):
        self._gate, self._device = ProcessLock(f"vitnas-{kind}.gate"), ProcessLock(f"vitnas-{kind}.lock")
        self._through = False

    def acquire(self, timeout_s: float) -> bool:
        """Take the lock; returns False if it is not free in timeout_s. The gate is kept until `release`."""
        deadline = time.monotonic() + timeout_s
        self._through = self._through or self._gate.acquire(timeout_s)
        return self._through and self._device.acquire(max(0, deadline - time.monotonic()))

    def release(self) -> None:
        self._device.release()
        self._gate.release()
        self._through = False


_alone: set[str] = set()
"""Devices that this process has for its trainings."""


@contextlib.contextmanager
def training_alone(device: str) -> Iterator[None]:
    """Have a device for this process's trainings, one process at a time; a wait is told once.

    It keeps no measurement waiting: those go by other locks (`in_turn`), whose holders do not wait for this one.

    device: a name that is the same in all processes, a GPU's UUID.
    """
    if device in _alone:  # taken by the caller's caller
        yield
        return
    lock = ProcessLock(f"vitnas-train-{device}.lock")
    if not lock.acquire(PATIENCE_S):
        tell_once(f"waiting for another vitnas process that trains on {device}")
        lock.acquire(math.inf)
    _alone.add(device)
    try:
        yield
    finally:
        _alone.remove(device)
        lock.release()


def in_turn(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, each once nothing is being measured on this machine, and share the devices while it is used.

    A process that holds a device to measure does not wait. Of several that train together (torchrun) the first one
    waits, and the others wait for it, so it gives up after TOGETHER_S seconds.
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
        gates = [ProcessLock(f"vitnas-{kind}.gate") for kind in DEVICE_KINDS]
        while not (all(map(_is_open, gates)) and (self._held or self._take())):
            self._let_go()
            limit_s = math.inf if not together else 0 if self._waited_enough else TOGETHER_S
            if not all(_wait_for(gate, limit_s) for gate in gates):
                tell_once(f"another process still measures after {TOGETHER_S} s: training goes on beside it")
                self._waited_enough = True
                return
        self._waited_enough = False

    def _take(self) -> bool:
        for kind in DEVICE_KINDS:
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
