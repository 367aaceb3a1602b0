"""Measuring: an exported network and the settings of a device become a latency with its spread.

`runtime.py` is the registry of runtimes, with one file each; `worker.py` is the process that holds one network and
times it, `protocol.py` decides when which process runs. Importing this package imports no runtime.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nas.measure.protocol import MeasureError, Measurement, Measurer, compare
from nas.measure.runtime import RUNTIMES, Runtime, Settings, check_settings
from nas.process import default_threads

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
]


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
