"""What happened in one process of a search: times, notes, samples."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from nas.quality.tier import Tier


PHASES = (
    "start",
    "waiting for the device",
    "sampler",
    "build and export",
    "session",
    "timed runs",
    "training",
    "estimate",
    "storage",
    "other",
)


@dataclass
class SearchLog:
    """What happened in this process, for the breakdown and the exit.

    hardware: as described at the start. calibration: images for int8, where there are any. failures: a line for what
    ended it before its time.
    """

    started: str
    wall_s: float = 0.0
    trial_s: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    tier: Tier | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    calibration: np.ndarray | None = None


class Clock:
    """Adds the time since the last lap to a phase."""

    def __init__(self, phases: dict[str, float]) -> None:
        self._phases, self._last = phases, time.perf_counter()

    def lap(self, phase: str, less: float = 0.0) -> None:
        now = time.perf_counter()
        self._phases[phase] += now - self._last - less
        self._last = now

    def add(self, phase: str, seconds: float) -> None:
        self._phases[phase] += seconds


def keep_samples(folder: Path, record: dict[str, Any]) -> None:
    """Append one line to samples.jsonl; a last line torn by a kill or a full disk is left to itself."""
    path = folder / "samples.jsonl"
    with path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        line = json.dumps({"host": socket.gethostname(), **record})
        file.write((("\n" if torn else "") + line + "\n").encode())


@dataclass(frozen=True)
class PhaseTime:
    """A phase of the trials, and its part of their wall time."""

    phase: str
    seconds: float
    share: float


def breakdown(log: SearchLog) -> tuple[PhaseTime, ...]:
    """Where the wall time of the search (without the closing run) went."""
    total = log.wall_s if log.trial_s else 0.0
    phases = dict(log.phases)
    phases["other"] += total - sum(phases.values())
    return tuple(PhaseTime(name, seconds, seconds / total if total else 0.0) for name, seconds in phases.items())
