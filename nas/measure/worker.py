"""The measuring process: holds one network and times it when asked (`python -m nas.measure.worker`).

Methods, in the order they are called: start (imports), load, warm_up, time_slice once a round, then usage.
"""

import base64
import importlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.usage import Energy, Unread, counters, gpu_power, gpu_run_mj, peak_memory
from nas.process import serve
from nas.text import first_line

WARM_UP_MS = 50
UNTIMED_MS = 40  # after SIGCONT: caches, clock and thread pool come back; 3 runs of 5 ms are 5% too slow after it
MIN_UNTIMED, MAX_UNTIMED = 3, 10
SLICE_MS = 20
MIN_RUNS, MAX_RUNS = 3, 30
SLOW_MS = 500  # from here on one timed run a slice, after one untimed, is enough


RELU = base64.b64decode(
    "CAcSADo7CgwKAXgSAXkiBFJlbHUSAWdaEwoBeBIOCgwIARIICgIIAQoCCAFiEwoBeRIOCgwIARIICgIIAQoCCAFCBAoAEA0="
)
"""An ONNX file: the greater of a number (1, 1) and 0."""


def run_nothing(settings: Settings) -> None:
    """Have the runtime load what it loads for any network, so that none of it counts as a network's memory.

    Raises:
        Unread: it cannot run the file here.
    """
    runtime = RUNTIMES[settings.runtime]
    if runtime.artifact == "module":  # which builds networks here: its code is no part of them
        import torch

        importlib.import_module("search_spaces")
        torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(8, 3, 3, 3))
        return
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(RELU)
        file.flush()
        try:
            runtime.load(Path(file.name), replace(settings, batch_size=1, precision="fp32"))()
        except Exception as error:  # the network itself may run
            raise Unread(f"memory is not told: {settings.runtime} alone fails ({first_line(error)})") from None


class TimedModel:
    """One network on one runtime; the methods the parent calls. Times are in milliseconds."""

    settings: Settings
    infer: Callable[[], None]
    untimed: int
    timed: int
    empty_bytes: int | None = None
    """Peak memory of this process before it loaded the network, after its runtime has run one of a single number."""
    energy: Energy | None = None
    """On a CPU whose energy can be read."""

    def __init__(self) -> None:
        self.unread: list[str] = []

    def start(self, settings: dict[str, Any]) -> None:
        """Imports the runtime: the slow part of a fresh process, done before there is a file."""
        self.settings = Settings(**settings)
        importlib.import_module(RUNTIMES[self.settings.runtime].package)
        if self.settings.device != "cpu":
            self.unread.append("memory is not told on a GPU")
            return
        try:
            peak_memory()  # where it cannot be read, nothing is run for it
            run_nothing(self.settings)
            self.empty_bytes = peak_memory()
        except Unread as why:
            self.unread.append(str(why))
        try:
            self.energy = Energy(counters())
        except Unread as why:
            self.unread.append(str(why))

    def load(self, path: str) -> None:
        self.infer = RUNTIMES[self.settings.runtime].load(Path(path), self.settings)

    def warm_up(self) -> None:
        """Runs until caches, arenas and clocks have settled, then fixes the length of a slice.

        The number of runs does not change from slice to slice: stopping by the clock would give quiet
        moments more samples than busy ones.
        """
        self.run_ms()
        runs = [self.run_ms()]
        end = time.perf_counter() + WARM_UP_MS / 1000
        while runs[0] < SLOW_MS and (len(runs) < MIN_RUNS or time.perf_counter() < end):
            runs.append(self.run_ms())
        slow = min(runs) > SLOW_MS
        untimed = math.ceil(UNTIMED_MS / min(runs))
        self.untimed = 1 if slow else min(MAX_UNTIMED, max(MIN_UNTIMED, untimed))
        self.timed = 1 if slow else min(MAX_RUNS, max(MIN_RUNS, math.ceil(SLICE_MS / min(runs))))

    def time_slice(self) -> dict[str, list[float]]:
        if self.energy:
            self.energy.begin()
        for _ in range(self.untimed):
            self.infer()
        samples_ms = [self.run_ms() for _ in range(self.timed)]
        if self.energy:
            self.energy.end(self.untimed + self.timed)
        return {"samples_ms": samples_ms}

    def usage(self) -> dict[str, Any]:
        """Fields of `Measurement`. On a GPU it runs the network for some seconds more."""
        memory = None if self.empty_bytes is None else peak_memory() - self.empty_bytes
        run_mj = self.energy.run_mj if self.energy else None
        if self.settings.device == "cuda":
            try:
                run_mj = gpu_run_mj(self.infer, gpu_power())
            except Unread as why:
                self.unread.append(str(why))
        return {
            "memory_mb": None if memory is None else memory / 1e6,
            "energy_mj": None if run_mj is None else run_mj / self.settings.batch_size,
            "unread": self.unread,
        }

    def run_ms(self) -> float:
        started = time.perf_counter_ns()
        self.infer()
        return round((time.perf_counter_ns() - started) / 1e6, 5)


def main() -> None:
    model = TimedModel()
    serve(
        {
            "start": model.start,
            "load": model.load,
            "warm_up": model.warm_up,
            "time_slice": model.time_slice,
            "usage": model.usage,
        }
    )


if __name__ == "__main__":
    main()
