"""What happened in one process of a search: times, notes, samples."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nas.measure.hardware import Hardware

if TYPE_CHECKING:
    import numpy as np

    from nas.quality.tier import Tier


PHASES = (
    "start",
    "waiting for the device",
    "waiting for trainings",
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
    """What happened in one process of a search."""

    started: str
    """When, in ISO 8601 with its time zone."""
    wall_s: float = 0.0
    """Seconds from opening the tier to the end of the last trial."""
    trial_s: list[float] = field(default_factory=list)
    """Seconds of each trial."""
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Seconds of each of `PHASES`."""
    interrupted: bool = False
    """Whether Ctrl-C or a failure ended it early."""
    exhausted: bool = False
    """Whether nothing was left to try."""
    notes: list[str] = field(default_factory=list)
    """Lines that a reader of the result should know."""
    failures: list[str] = field(default_factory=list)
    """A line for each failure that ended it early."""
    tier: Tier | None = None
    """The tier that estimated quality; None until it is open."""
    hardware: Hardware = field(default_factory=Hardware)
    """The measured machine at the start."""
    calibration: np.ndarray | None = None
    """Images for int8, where the search has images; float32, (images, 3, height, width)."""


class Clock:
    """Adds the time since the last lap to a phase."""

    def __init__(self, phases: dict[str, float]) -> None:
        self._phases, self._last = phases, time.perf_counter()

    def lap(self, phase: str, less: float = 0.0) -> None:
        """Add the time since the last lap, less some seconds that another phase has."""
        now = time.perf_counter()
        self._phases[phase] += now - self._last - less
        self._last = now

    def add(self, phase: str, seconds: float) -> None:
        self._phases[phase] += seconds


def keep_samples(folder: Path, record: Mapping[str, object]) -> None:
    """Append one line to samples.jsonl. A last line that a kill or a full disk has cut off stays a line of its own."""
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
