"""The machine a latency belongs to: what is compared before workers join, and what is written down."""

import importlib.metadata
import os
import platform
from pathlib import Path

from nas.measure import RUNTIMES, Settings
from nas.process import physical_cores, usable_cpus

PACKAGES = ("torch", "onnx", "onnxruntime", "numpy", "timm", "optuna")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def fingerprint(settings: Settings) -> dict:
    """What must be equal for two latencies to be comparable; a worker must match it to join."""
    found = {
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
    if settings.device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def describe(settings: Settings) -> dict:
    """The fingerprint and what else may explain a latency later; what cannot be read is None."""
    import psutil

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return fingerprint(settings) | {
        "pinned": hasattr(os, "sched_setaffinity"),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "governor": GOVERNOR.read_text().strip() if GOVERNOR.exists() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "packages": versions,
    }


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
