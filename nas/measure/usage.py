"""What a network needs beside time, as its own process reads it: memory and energy.

Nothing is read while an inference is timed. Only the standard library is imported, as on a remote device.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
POWERCAP = Path("/sys/class/powercap")
GPU_S, GPU_STEADY = 2.0, 0.5  # a GPU's power is a mean of up to a second: it is read in the second half of this time
GPU_POWER = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "100")


class Unread(Exception):
    """Why something cannot be read here, in one line."""


def peak_memory(status: Path = STATUS) -> int:
    """The most bytes that have been resident in this process at once: proc(5).

    Raises:
        Unread: the system does not say.
    """
    try:
        found = next(line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(found[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        raise Unread(f"memory is not told: {status} does not say it on this system") from None


@dataclass(frozen=True)
class Counter:
    """Energy that a CPU package has used since some time, in µJ; after `most` it begins at 0 again."""

    path: Path
    most: int

    def read(self) -> int:
        return int(self.path.read_text())

    def used(self, before: int, after: int) -> int:
        """µJ between two readings that are less than one round of the counter apart (about a minute)."""
        return after - before + (self.most + 1) * (after < before)


def counters(root: Path = POWERCAP) -> tuple[Counter, ...]:
    """Those of all CPU packages: Linux's powercap, RAPL of Intel and AMD.

    Raises:
        Unread: there is none, or only root may read them.
    """
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            if not (zone / "name").read_text().startswith("package"):  # parts of one, or the whole machine
                continue
            counter = Counter(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
            counter.read()
        except PermissionError:
            raise Unread(
                f"energy is not told: {zone}/energy_uj is for root alone (`sudo chmod a+r {root}/*/energy_uj`)"
            ) from None
        except (OSError, ValueError):
            continue
        found.append(counter)
    if not found:
        raise Unread(f"energy is not told: {root} has no RAPL counters of a CPU package")
    return tuple(found)


class Energy:
    """Adds up what CPU packages use while this process runs a network."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._used, self._runs = 0, 0

    def begin(self) -> None:
        self._before = [counter.read() for counter in self._counters]

    def end(self, runs: int) -> None:
        """runs: inferences since `begin`."""
        for counter, before in zip(self._counters, self._before, strict=True):
            self._used += counter.used(before, counter.read())
        self._runs += runs

    @property
    def run_mj(self) -> float | None:
        """Of one inference, idle power included; None before there was one."""
        return self._used / 1000 / self._runs if self._runs else None


def gpu_power() -> tuple[str, ...]:
    """The command that tells the power of the GPU that this process uses, again and again."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    return (*GPU_POWER, f"--id={first or 0}")


def gpu_run_mj(infer: Callable[[], object], command: Sequence[str], seconds: float = GPU_S) -> float:
    """Energy of an inference on the first GPU, in mJ: the GPU's mean power while it runs for `seconds`, idle power
    included.

    Raises:
        Unread: nvidia-smi is not here, or does not know the power.
    """
    try:
        meter = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        raise Unread(f"energy is not told: {command[0]} cannot be run here") from None
    runs, started = 0, time.monotonic()
    try:
        while (now := time.monotonic()) < started + seconds or not runs:
            infer()
            runs += 1
    finally:
        meter.kill()
    lines = meter.communicate()[0].split()
    try:
        watts = [float(line) for line in lines[int(len(lines) * GPU_STEADY) :]]
        return 1000 * sum(watts) / len(watts) * (now - started) / runs
    except (ValueError, ZeroDivisionError):
        raise Unread(f"energy is not told: {command[0]} does not know this GPU's power") from None
