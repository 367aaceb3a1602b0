"""Leases: which process works at a trial, and whether it still does.

A process extends its lease while it works. Workers on its machine look for the process itself, whatever the time.
Workers on other machines see whether the lease changes, by a clock of their own, so that machines' clocks need not
agree.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from nas.errors import UserError
from nas.study.patient import PATIENCE_S
from nas.version import version

BEAT_S = 30.0  # between two extensions of a lease
LEASE_S = PATIENCE_S + 4 * BEAT_S  # no lease expires while its worker waits for a lost database
LOOK_S = 2.0  # between two looks at others' leases
CLOCKS_S = 3600.0  # by which two machines' clocks may differ

_watched: dict[Hashable, tuple[float, float]] = {}
"""By process and what it works at: when its lease expires by its own clock, and when this one first saw that."""


@dataclass(frozen=True)
class Lease:
    """Names the process that works at something."""

    host: str
    """Its machine since it was booted, or its container: where `pid` means something."""
    pid: int
    started: float
    """In seconds after the machine's boot: clocks are stepped."""
    expires: float
    """Unix time by the machine's clock."""
    seconds: float = LEASE_S
    """Within which it is extended."""
    version: str = ""
    """Of vitnas; empty in leases of an older one."""

    @classmethod
    def mine(cls, seconds: float = LEASE_S) -> Self:
        """This process's, from now on."""
        started = _started(os.getpid())
        assert started is not None
        return cls(host(), os.getpid(), started, time.time() + seconds, seconds, version())

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def elsewhere(self) -> bool:
        """Whether its process is on another machine."""
        return self.host != host()

    def is_mine(self) -> bool:
        """Whether its process is this one."""
        return not self.elsewhere and self.pid == os.getpid() and not self._is_gone()

    def is_fresh(self) -> bool:
        """Whether its process lives, as far as can be told at once: on another machine by that one's clock."""
        return time.time() < self.expires if self.elsewhere else not self._is_gone()

    def has_expired(self, at: Hashable) -> bool:
        """Whether its process is dead: seen to be on this machine, or unheard of for too long on another.

        Args:
            at: what it works at, such as a trial's number.
        """
        if not self.elsewhere:
            return self._is_gone()
        return time.time() > self.expires + CLOCKS_S or self.left_s(at) < 0

    def _is_gone(self) -> bool:
        """Whether its process of this machine has ended; another may have its id by now."""
        started = _started(self.pid)
        return started is None or abs(started - self.started) > 1

    def left_s(self, at: Hashable) -> float:
        """Seconds until it expires unless it is extended, for a process on another machine."""
        now, of = time.monotonic(), (self.host, self.pid, self.started, at)
        expires, since = _watched.get(of, (None, now))
        if expires != self.expires:
            _watched[of] = self.expires, (since := now)
        return since + self.seconds - now


@contextmanager
def beating(extend: Callable[[], bool], every_s: float = BEAT_S) -> Iterator[None]:
    """Call what extends a lease every so many seconds, in a thread, while the block runs, whatever it does.

    extend: returns False where there is nothing to extend any more.
    """
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from sqlalchemy.exc import SQLAlchemyError

    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            try:
                if not extend():
                    return
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


def host() -> str:
    """Where a process id means something: this machine since it was booted, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """When process `pid` was started, in seconds after boot; None if dead."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time() - psutil.boot_time())
    except psutil.NoSuchProcess:
        return None
