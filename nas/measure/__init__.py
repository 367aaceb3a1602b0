"""Measuring: an exported network and the settings of a device become a latency with its spread.

`runtime.py` is the registry of runtimes, with one file each; `worker.py` is the process that holds one network and
times it, `protocol.py` decides when which process runs, `locks.py` who may measure. `remote.py` and `agent.py` have all
that done on another machine, where the device is one of its: what is imported from here takes either. Importing this
package imports no runtime.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from nas import process
from nas.measure import protocol, remote, runtime
from nas.measure.locks import device_lock, in_turn
from nas.measure.protocol import MAX_ROUNDS, Interrupted, MeasureError, Measurement, Measurer
from nas.measure.remote import LinkLost, RemoteMeasurer, is_remote
from nas.measure.runtime import RUNTIMES, Runtime, Settings

__all__ = [
    "RUNTIMES",
    "Interrupted",
    "LinkLost",
    "MeasureError",
    "Measurement",
    "Measurer",
    "RemoteMeasurer",
    "Runtime",
    "Settings",
    "check_settings",
    "compare",
    "default_threads",
    "device_kind",
    "device_label",
    "device_lock",
    "in_turn",
    "is_remote",
    "open_measurer",
]


def check_settings(settings: Settings) -> None:
    """Raises UserError where these settings cannot be measured on their device's machine."""
    if is_remote(settings.device):
        remote.machine_of(settings.device).ask("check_settings", settings=remote.there(settings))
    else:
        runtime.check_settings(settings)


def default_threads(device: str = "cpu") -> int:
    """Physical cores that a process may use on the device's machine."""
    if is_remote(device):
        return remote.machine_of(device).ask("default_threads")
    return process.default_threads()


def device_kind(device: str) -> str:
    """What the device is to a runtime: "cpu" or "cuda", as it is named, or behind `ssh://`."""
    return remote.parse(device)[1] if is_remote(device) else device


def device_label(device: str) -> str:
    """The device in the name of a file: "cpu", "user@host-cuda"."""
    return re.sub(r"[^\w.@-]+", "-", device.removeprefix(remote.SCHEME)).strip("-")


def open_measurer(settings: Settings, reference: Path, workdir: Path) -> Measurer | RemoteMeasurer:
    """A `Measurer` on the device of the settings; to be entered."""
    kind = RemoteMeasurer if is_remote(settings.device) else Measurer
    return kind(settings, reference, workdir)


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
