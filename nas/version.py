"""Which vitnas this is: its version, and a digest of its code."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

PACKAGES = ("nas", "search_spaces", "pruning")


@cache
def version() -> str:
    """Such as "0.1.0 (code 1a2b3c4d)"; equal where every module is."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    try:
        number = installed("vitnas")
    except PackageNotFoundError:
        number = "not installed"
    return f"{number} (code {found.hexdigest()[:8]})"
