"""Measuring: an exported network and the settings of a device become a latency with its spread.

One file per runtime registers how to load a network (`ort.py`, `eager.py`), `worker.py` is the process
that holds one network and times it, `protocol.py` decides when which process runs. Importing this
package imports no runtime.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nas.errors import UserError
from nas.measure.protocol import MeasureError, Measurement, Measurer, compare
from nas.process import default_threads, usable_cpus

__all__ = [
    "RUNTIMES",
    "MeasureError",
    "Measurement",
    "Measurer",
    "Runtime",
    "Settings",
    "check_settings",
    "compare",
    "default_threads",
    "device_lock",
    "register",
]


@dataclass(frozen=True)
class Settings:
    """What a latency is a property of, besides the network and the machine."""

    runtime: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 1


@dataclass(frozen=True)
class Runtime:
    """Something that runs networks. Its name is also its package, on the index and for import.

    devices: where it can run. artifact: the file it loads, "onnx" (one static float32 input, the batch
    included) or "arch" (arch.json). load(path, settings): a function that does one inference, done when
    it returns, on a fixed random float32 input.
    """

    name: str
    devices: tuple[str, ...]
    artifact: str
    load: Callable[[Path, Settings], Callable[[], None]]

    def version(self) -> str:
        return importlib.metadata.version(self.name)


RUNTIMES: dict[str, Runtime] = {}


def register(name: str, devices: tuple[str, ...], artifact: str) -> Callable:
    """Decorates a `load` function as the runtime `name` (the fields of `Runtime`)."""

    def add(load: Callable[[Path, Settings], Callable[[], None]]) -> Callable:
        RUNTIMES[name] = Runtime(name, devices, artifact, load)
        return load

    return add


def check_settings(settings: Settings) -> None:
    """Raises UserError where these settings cannot be measured on this machine."""
    _known("runtime", settings.runtime, list(RUNTIMES))
    runtime = RUNTIMES[settings.runtime]
    _known("device", settings.device, sorted({d for r in RUNTIMES.values() for d in r.devices}))
    if settings.device not in runtime.devices:
        able = [r.name for r in RUNTIMES.values() if settings.device in r.devices]
        raise UserError(f"runtime {settings.runtime} does not run on {settings.device}: use {' or '.join(able)}")
    usable = len(usable_cpus())
    if not 1 <= settings.threads <= usable:
        raise UserError(f"threads is {settings.threads}: give 1 to {usable}, the CPUs this process may use")
    if settings.batch_size < 1:
        raise UserError(f"batch size is {settings.batch_size}: give 1 or more")
    if importlib.util.find_spec(runtime.name) is None:
        raise UserError(f"{runtime.name} is not installed: pip install {runtime.name}")
    if settings.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device cuda: PyTorch finds no usable GPU here, use --device cpu")


def _known(what: str, name: str, choices: list[str]) -> None:
    if name not in choices:
        near = difflib.get_close_matches(name, choices, cutoff=0.4)
        meant = f"did you mean {' or '.join(near)}" if near else f"choose from {', '.join(choices)}"
        raise UserError(f"unknown {what} {name!r}: {meant}")


@contextlib.contextmanager
def device_lock(device: str) -> Iterator[None]:
    """Held by whoever measures on `device`: one process of this user at a time. Who has to wait is told, once."""
    from filelock import FileLock, Timeout

    lock = FileLock(Path(tempfile.gettempdir()) / f"vitnas-{os.getuid()}-{device}.lock")
    try:
        lock.acquire(timeout=-1 if device in _told else PATIENCE_S)
    except Timeout:
        _told.add(device)
        print(f"waiting for another vitnas process that measures on this {device}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


PATIENCE_S = 2
_told: set[str] = set()


from nas.measure import eager, ort  # noqa: E402, F401 (each registers itself above)
