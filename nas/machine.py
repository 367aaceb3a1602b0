"""This machine's memory and CPUs, as far as this process may use them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_cpus() -> list[int]:
    """The CPUs this process may use, one per physical core first, then their hyper-threads."""
    cores = _cores()
    return [core[0] for core in cores] + [cpu for core in cores for cpu in core[1:]]


def physical_cores() -> int:
    """Physical cores this process may use by its affinity."""
    return len(_cores())


def default_threads() -> int:
    """Physical cores this process may use by its affinity and by its cgroups' CPU quota, at least 1."""
    return max(1, math.floor(min(physical_cores(), _cpu_quota())))


def _cores() -> list[list[int]]:
    """The usable CPUs, grouped by physical core."""
    if not hasattr(os, "sched_getaffinity"):
        import psutil

        return [[cpu] for cpu in range(psutil.cpu_count(logical=False) or os.cpu_count() or 1)]
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def _cpu_quota(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float:
    """CPUs granted by the tightest quota among this process's cgroups; infinity where none is read."""
    return min(map(_folder_quota, cgroup_folders("cpu", root, own)), default=math.inf)


def cgroup_folders(controller: str, root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> Iterator[Path]:
    """Folders of the cgroups that hold this process and limit what `controller` names, each before its parent."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controllers
        group = mount / path.lstrip("/")
        yield from (folder for folder in [group, *group.parents] if folder.is_relative_to(mount))


def _folder_quota(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():  # cgroup 2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
        else:  # cgroup 1: -1 is none
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else math.inf
    except OSError:
        return math.inf
