"""Devices of this machine or of one behind ssh, through one door."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nas import machine
from nas.lock import PATIENCE_S, WAIT_S, DeviceLock, tell_once, told, turn
from nas.measure import protocol, remote, runtime
from nas.measure.protocol import Measurer
from nas.measure.remote import RemoteMeasurer, is_remote
from nas.measure.runtime import Settings
from nas.measure.samples import MAX_ROUNDS, MeasureError, Measurement


def check_settings(settings: Settings) -> None:
    """Raises UserError where these settings cannot be measured on their device's machine."""
    if is_remote(settings.device):
        remote.machine_of(settings.device).ask("check_settings", settings=remote.there(settings))
    else:
        runtime.check_settings(settings)


def default_threads(device: str = "cpu") -> int:
    """Physical cores that a process may use on the device's machine."""
    if is_remote(device):
        threads: int = remote.machine_of(device).ask("default_threads")
        return threads
    return machine.default_threads()


def device_kind(device: str) -> str:
    """What the device is to a runtime: "cpu" or "cuda", as it is named, or behind `ssh://`."""
    return remote.parse(device)[1] if is_remote(device) else device


def device_label(device: str) -> str:
    """The device in the name of a file: "cpu", "user@host-cuda"."""
    return re.sub(r"[^\w.@-]+", "-", device.removeprefix(remote.SCHEME)).strip("-")


def open_measurer(
    settings: Settings, reference: Path, workdir: Path
) -> contextlib.AbstractContextManager[Measurer | RemoteMeasurer]:
    """A `Measurer` on the device of the settings; to be entered."""
    if is_remote(settings.device):
        return RemoteMeasurer(settings, reference, workdir)
    return Measurer(settings, reference, workdir)


def compare(
    paths: Mapping[str, Path],
    settings: Settings | Mapping[str, Settings],
    rounds: int = MAX_ROUNDS,
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float | None = None,
    waiting: Callable[[str, float, float], None] = lambda *_: None,
) -> dict[str, Measurement | MeasureError]:
    """`protocol.compare` on the device's machine."""
    first = next(iter(settings.values()), None) if isinstance(settings, Mapping) else settings
    compared = remote.compare if first and is_remote(first.device) else protocol.compare
    return compared(paths, settings, rounds, progress, timeout_s, waiting)


@contextlib.contextmanager
def device_lock(device: str) -> Iterator[None]:
    """Held by whoever measures on `device`: one process of that machine at a time. Who has to wait is told, once."""
    distant = remote.is_remote(device)
    lock = remote.DistantLock(device) if distant else DeviceLock(device)
    waiting = f"waiting for another vitnas process that measures on {device}"
    turn.stand_back(1)
    try:
        if not lock.acquire(0 if waiting in told else PATIENCE_S):
            tell_once(waiting)
            while not lock.acquire(WAIT_S if distant else math.inf):
                pass
        yield
    finally:
        lock.release()
        turn.stand_back(-1)
