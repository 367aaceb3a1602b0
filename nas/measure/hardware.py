"""The machine that a latency was measured on: what must be equal to compare two latencies, and what is recorded.

A remote device is described by its own machine, which may have only the standard library and a runtime.
"""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from nas.machine import memory_bytes, physical_cores, usable_cpus
from nas.measure import remote
from nas.measure.remote import is_remote
from nas.measure.runtime import RUNTIMES, Settings

PACKAGES = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy", "timm", "optuna")
GOVERNOR = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
SAMPLE_S = 0.3
BUSY_SHARE = 0.1  # of the usable CPUs: from here on the machine counts as busy,
CROWDED_CPUS = 0.1  # or where others use so much more than the CPUs that are left to them


class Hardware(TypedDict, total=False):
    """A measured machine, as hardware.json and results hold it. The keys up to `gpu` are its fingerprint."""

    cpu: str
    """The CPU's name."""
    architecture: str
    physical_cores: int
    usable_cpus: int
    """CPUs that this process may use."""
    threads: int
    device: str
    batch_size: int
    runtime: str
    runtime_version: str
    precision: str
    """Absent for fp32."""
    gpu: str
    """The GPU's name, on cuda alone."""
    pinned_to: list[int] | None
    """CPUs that timed processes are pinned to; None, as in the next ones, where it cannot be read."""
    memory_gb: float
    governor: str | None
    """Frequency governors of the CPUs that are used."""
    os: str
    python: str
    load_average: list[float]
    """Of the last 1, 5 and 15 minutes."""
    busy_share: float | None
    """Share of the usable CPUs' time that other processes use, 0 to 1."""
    packages: dict[str, str | None]
    """Versions of `PACKAGES`; None of one that is not installed."""
    host: str
    """The address of a remote device."""


def fingerprint(settings: Settings) -> Hardware:
    """What must be equal for two latencies to be comparable, and for a worker to join a study."""
    if is_remote(settings.device):
        there: Hardware = remote.machine_of(settings.device).ask("fingerprint", settings=remote.there(settings))
        return there
    found: Hardware = {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "physical_cores": physical_cores(),
        "usable_cpus": len(usable_cpus()),
        "threads": settings.threads,
        "device": settings.device,
        "batch_size": settings.batch_size,
        "runtime": settings.runtime,
        "runtime_version": RUNTIMES[settings.runtime].version(),
    }
    if settings.precision != "fp32":  # studies from before there were others have no entry
        found["precision"] = settings.precision
    if settings.device == "cuda":
        found["gpu"] = gpu_model()
    return found


def describe(settings: Settings) -> Hardware:
    """The fingerprint, and what else may explain a latency later, such as the load. Takes SAMPLE_S seconds."""
    if is_remote(settings.device):
        found: Hardware = remote.machine_of(settings.device).ask("describe", settings=remote.there(settings))
        return {**found, "host": settings.device}
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpus = usable_cpus()[: settings.threads]
    return {
        **fingerprint(settings),
        "pinned_to": cpus if hasattr(os, "sched_setaffinity") else None,
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "governor": governor(cpus),
        "os": platform.platform(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "busy_share": busy_share(),
        "packages": versions,
    }


def busy_line(described: Hardware) -> str | None:
    """One line where other processes were using the CPUs of a `describe`d machine; None where it was quiet."""
    share = described.get("busy_share")
    if share is None:
        return None
    usable, threads = described["usable_cpus"], described["threads"]
    crowded = share * usable + threads > usable + CROWDED_CPUS
    if share < BUSY_SHARE and not crowded:
        return None
    return f"the machine is busy: other processes use {share:.0%} of its {usable} CPUs; expect wider intervals"


def busy_share(stat: Path = Path("/proc/stat")) -> float | None:
    """The share of the usable CPUs' time that other processes and the hypervisor use, 0 to 1, sampled for SAMPLE_S
    seconds; None where the system does not report it."""
    if not stat.exists():
        return None
    cpus = usable_cpus()
    before, own = _ticks(stat, cpus), time.process_time()
    time.sleep(SAMPLE_S)
    after, own = _ticks(stat, cpus), time.process_time() - own
    total = after[1] - before[1]
    if not total:
        return None
    others = after[0] - before[0] - own * os.sysconf("SC_CLK_TCK")
    return round(min(1.0, max(0.0, others / total)), 3)


def _ticks(stat: Path, cpus: Iterable[int]) -> tuple[int, int]:
    """Busy and all clock ticks of these CPUs since the start: proc(5); guests are in `user` already."""
    names = {f"cpu{cpu}" for cpu in cpus}
    busy = total = 0
    for line in stat.read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
            busy += user + nice + system + irq + softirq + steal
            total += user + nice + system + irq + softirq + steal + idle + iowait
    return busy, total


def governor(cpus: Iterable[int], path: str = GOVERNOR) -> str | None:
    """The frequency governors of these CPUs, each named once; None where none is readable."""
    files = [Path(path.format(cpu)) for cpu in cpus]
    found = dict.fromkeys(file.read_text().strip() for file in files if file.exists())
    return ", ".join(found) or None


def gpu_model() -> str:
    """The name of the first GPU, from PyTorch or, where that is not installed, from the driver's nvidia-smi."""
    if importlib.util.find_spec("torch"):
        import torch

        return torch.cuda.get_device_name()
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name; where the kernel gives none (many ARM boards), its implementer and part codes."""
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" in fields:
        return fields["model name"]
    if "CPU part" in fields:
        return f"implementer {fields['CPU implementer']} part {fields['CPU part']}"
    return platform.processor() or platform.machine()
