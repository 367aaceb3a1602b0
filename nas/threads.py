"""How many threads a training takes: as many as there are CPUs that nobody else uses now.

One thread too many waits for its CPU at each step, and all others with it: beside one busy process two threads on two
CPUs train 12 to 20 times slower than one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.machine import default_threads, usable_cpus
from nas.units import counted

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

SAMPLE_S = 0.3
AGAIN_S = 20.0
"""Between two looks at the other processes' load, each of which takes SAMPLE_S."""
UNNOTICED = 0.3
"""CPUs that others may use without a thread being given up for them."""

_current: _Threads | None = None


class _Threads:
    """Torch's threads in this process while it trains on the CPU. now: how many; None before the first batch."""

    def __init__(self, fixed: int | None, device: str | None, say: Callable[[str], None]) -> None:
        self._fixed, self._device, self._say = fixed, device, say
        self.now: int | None = None
        self._looked = 0.0

    def adapt(self) -> None:
        import torch

        if self.now is None:
            self._before = torch.get_num_threads()
            if self._fixed is None and (self._device == "cuda" or (self._device is None and torch.cuda.is_available())):
                self._fixed = self._before
            self._most = min(default_threads(), self._before)
        elif self._fixed or self._most == 1 or time.monotonic() - self._looked < AGAIN_S:
            return
        chosen, why = (self._fixed, None) if self._fixed else self._free()
        self._looked = time.monotonic()
        if chosen != self.now:
            torch.set_num_threads(chosen)
            self.now = chosen
            if why is not None:
                self._say(f"trains on {counted(chosen, 'thread')}: {why}; --train-threads N sets it")

    def restore(self) -> None:
        import torch

        if self.now is not None:
            torch.set_num_threads(self._before)

    def _free(self) -> tuple[int, str]:
        """How many threads find a CPU each, and why it is not more."""
        if self._most == 1:
            return 1, "one is the most here (cores, CPU quota, OMP_NUM_THREADS)"
        cpus = len(usable_cpus())
        busy = min(cpus, max(0, math.ceil(busy_cpus() - UNNOTICED)))
        if cpus - busy >= self._most:
            return self._most, f"{cpus - busy} of {cpus} CPUs are free"
        return max(1, cpus - busy), f"other processes keep {busy} of {cpus} CPUs busy"


def adapt() -> None:
    """Called before each batch: within `training_threads`, set torch's threads by what is free now."""
    if _current is not None:
        _current.adapt()


@contextmanager
def training_threads(fixed: int | None, say: Callable[[str], None], device: str | None = None) -> Iterator[None]:
    """Within this, what trains, scores or judges on the CPU takes the threads that find a free one, and says so where
    their number changes; torch's own number comes back at the end.

    Args:
        fixed: take so many, whatever else runs.
        device: cpu or cuda, where threads stay as they are unless fixed (as they do in torchrun's processes). None:
            cuda where there is one.

    Raises:
        UserError: more threads than this process may use CPUs, or none.
    """
    global _current
    cpus = len(usable_cpus())
    if fixed is not None and not 1 <= fixed <= cpus:
        raise UserError(f"--train-threads is {fixed}: give 1 to {cpus}, the CPUs that this process may use")
    if fixed is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        yield
        return
    _current = _Threads(fixed, device, say)
    try:
        yield
    finally:
        _current.restore()
        _current = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within this, NumPy and SciPy compute on one thread: beside others that are busy, more of them wait for each other
    and take several times the CPU time."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def busy_cpus() -> float:
    """How many of the usable CPUs' time others take now, the hypervisor included; takes SAMPLE_S."""
    before = _seconds(), time.process_time()
    time.sleep(SAMPLE_S)
    after = _seconds(), time.process_time()
    total = after[0][1] - before[0][1]
    others = after[0][0] - before[0][0] - (after[1] - before[1])  # this process's threads still spin for a while
    return max(0.0, others) / total * len(usable_cpus()) if total > 0 else 0.0


def _seconds() -> tuple[float, float]:
    """Busy seconds and all seconds of the usable CPUs since the start."""
    import psutil

    each = psutil.cpu_times(percpu=True)
    busy = total = 0.0
    for times in (each[cpu] for cpu in usable_cpus() if cpu < len(each)):
        known = times._asdict()
        idle = known["idle"] + known.get("iowait", 0.0)
        whole = sum(value for name, value in known.items() if not name.startswith("guest"))  # those are in user already
        busy, total = busy + whole - idle, total + whole
    return busy, total
