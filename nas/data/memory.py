"""How much memory this process may still take."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil

from nas.machine import CGROUPS, OWN_CGROUPS, cgroup_folders

LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),  # cgroup 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # cgroup 1
)


def free_memory() -> int:
    """Bytes: the least of what the machine has available, this process's cgroups and its own limit leave."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = sys.maxsize if soft == resource.RLIM_INFINITY else max(0, soft - psutil.Process().memory_info().vms)
    return min(int(psutil.virtual_memory().available), own, cgroup_memory())


def cgroup_memory(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Bytes that the tightest of this process's cgroups leaves, the page cache counted as free."""
    return min(map(_left, cgroup_folders("memory", root, own)), default=sys.maxsize)


def _left(folder: Path) -> int:
    for limit, usage, cache in LIMITS:
        try:
            most = (folder / limit).read_text().strip()
            if most == "max":
                return sys.maxsize
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(0, int(most) - int((folder / usage).read_text()) + int(counts.get(cache, 0)))
        except OSError:
            pass
    return sys.maxsize
