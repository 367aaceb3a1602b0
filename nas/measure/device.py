"""Devices of this machine or of one behind ssh: what other packages use, without knowing which it is."""

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


def is_here(device: str) -> bool:
    """Whether a device is one of this machine."""
    return not is_remote(device)


def settings_for(
    runtime: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    batch_size: int = 1,
    precision: str = "fp32",
) -> Settings:
    """Checked settings, with the defaults of the device filled in.

    Args:
        runtime: None: onnxruntime on a CPU, torch on a GPU.
        device: cpu, cuda, or `ssh://[user@]host[:port][/cuda]`.
        threads: CPU threads; None: the physical cores that a process may use there.
        batch_size: images per inference.
        precision: fp32, tf32, bf16, fp16 or int8.

    Raises:
        UserError: settings that cannot be measured there.
    """
    given = default_threads(device) if threads is None else threads
    settings = unchecked_settings(runtime, device, given, batch_size, precision)
    check_settings(settings)
    return settings


def unchecked_settings(
    runtime: str | None, device: str, threads: int | None, batch_size: int, precision: str
) -> Settings:
    """As `settings_for`, without the device, which may be out of reach; 0 threads: its default."""
    kind = runtime or ("torch" if device_kind(device) == "cuda" else "onnxruntime")
    return Settings(kind, device, threads or 0, batch_size, precision)


def device_kind(device: str) -> str:
    """The kind of a device, wherever it is: "cpu" or "cuda"."""
    return remote.parse(device)[1] if is_remote(device) else device


def device_label(device: str) -> str:
    """The name of a device as part of a file name: "cpu", "user@host-cuda"."""
    return re.sub(r"[^\w.@-]+", "-", device.removeprefix(remote.SCHEME)).strip("-")


def open_measurer(
    settings: Settings, reference: Path, workdir: Path
) -> contextlib.AbstractContextManager[Measurer | RemoteMeasurer]:
    """A context manager that gives a `Measurer` on the device of the settings."""
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
    """Hold the lock for measuring on a device: one process at a time on its machine. A wait is logged once."""
    distant = is_remote(device)
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
