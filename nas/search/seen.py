"""What a study has tried so far, as the choice of its next network sees it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.search.needs import Need, Needs, smallest
from nas.search.precision import Faster
from nas.search.speed import Speed, coordinates
from nas.study.ledger import ledger_of
from search_spaces import Arch
from search_spaces.registry import FAMILIES

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.search.request import SearchRequest

RECENT = 5
"""Trials whose median latency of the reference network is the machine's speed now."""
MOST = 1000
"""The latest measurements, which foretell latencies: the time that takes grows with the cube of their number."""


@dataclass(frozen=True)
class Point:
    """A place in the search space, and the network there."""

    family: str
    levels: Mapping[str, int]
    """Parameters by name, each 0 to LEVELS - 1."""
    arch: Arch
    digest: str
    coordinates: np.ndarray
    """As `nas.search.speed.coordinates` has them."""
    name: str = ""
    """Of a published variant."""

    @classmethod
    def at(cls, request: SearchRequest, family: str, levels: Mapping[str, int], name: str = "") -> Point:
        arch = FAMILIES[family].space.decode(levels, request.num_classes, request.resolution)
        return cls(family, dict(levels), arch, arch.digest(), coordinates(arch), name)

    @property
    def params(self) -> dict[str, int | str]:
        """As a trial has them."""
        return {"family": self.family, **self.levels}


@dataclass(frozen=True)
class Tried:
    """A trial: it waits, runs or has ended."""

    point: Point
    key: str = ""
    """Of its candidate, as the next ones set once it is measured."""
    relative: float | None = None
    """Latency, in the fastest precision, over that of the reference network in the same rounds."""
    feasible: bool = False
    over: bool = False
    """Whether it does not meet a limit beside the latency."""
    score: float = -math.inf
    ended: bool = False


class Seen:
    """Reads a study again and again; a trial that has ended is looked at once, and its network decoded once."""

    def __init__(
        self,
        request: SearchRequest,
        reference: Arch,
        reference_ms: float,
        before: Sequence[tuple[Arch, float]] = (),
    ) -> None:
        """reference_ms: latency of the reference network, until trials tell it. before: networks that were measured
        before the study, and their latencies over the reference network's."""
        self._request, self._first_ms = request, reference_ms
        self._reference = coordinates(reference)
        self._points: dict[int, Point | None] = {}
        self._looked = 0
        """Ended trials that were looked at."""
        self._ended: list[tuple[FrozenTrial, Point]] = []
        """Those of them that had a network,"""
        self._told: list[Tried] = []
        """and what was told of it."""
        self._lately: deque[float] = deque(maxlen=RECENT)
        self._faster = Faster(request.precisions)
        self._learnt = 0
        self.tried: list[Tried] = []
        self.digests: set[str] = set()
        """Of their networks."""
        self.number = 0
        """Of the study's next trial."""
        self.limit = 0.0
        """Log of the budget over the reference network's latency now."""
        self._before = [(coordinates(arch), relative) for arch, relative in before]
        self.speed = Speed((self._reference, 1.0), self._before)
        """Of latencies over the reference network's, by what had ended when `learn` was called last; so is `meets`."""
        self._needs = Needs(request.limits, smallest(request.precisions))

    def read(self, study: optuna.Study, look: bool = True) -> None:
        """Take in what has been tried by now: milliseconds, but for what `learn` does.

        Args:
            look: as `nas.study.ledger.ledger_of` has it.
        """
        now = ledger_of(study, look)
        new = now.ended[self._looked :]
        self._looked = len(now.ended)
        self._ended += [(trial, point) for trial in new if (point := self._point(trial)) is not None]
        details = [trial.user_attrs.get("detail", {}) for trial in new]
        self._lately.extend(each["reference_ms"] for each in details if each.get("reference_ms"))
        if len(self._request.precisions) > 1 and new:  # may change what is likely of those before
            self._faster, self._told = Faster.of_trials(self._request.precisions, now), []
        self._told += [_tried(trial, point, self._faster) for trial, point in self._ended[len(self._told) :]]
        begun = [point for trial in now.open if (point := self._point(trial)) is not None]
        self.tried = [*self._told, *map(Tried, begun)]
        self.digests = {each.point.digest for each in self.tried}
        self.number = len(now.ended) + len(now.open)
        now_ms = statistics.median(self._lately) if self._lately else self._first_ms
        self.limit = math.log(self._request.budget_ms / now_ms)

    def learn(self) -> None:
        """Fit to what was read what latencies and needs are foretold by: up to 0.1 s."""
        if self._learnt == len(self._ended):
            return
        self._learnt = len(self._ended)
        own = [(each.point.coordinates, each.relative) for each in self._told if each.relative]
        self.speed = Speed((self._reference, self._faster.ratio()), [*self._before, *own][-MOST:])
        details = [(point, trial.user_attrs.get("detail", {})) for trial, point in self._ended]
        needs = [
            Need(_params_m(point.coordinates), detail.get("memory_mb"), detail.get("file_mb"))
            for point, detail in details
        ]
        self._needs = Needs(self._request.limits, smallest(self._request.precisions), needs)

    @property
    def state(self) -> tuple[int, ...]:
        """The same as long as nothing else was read or learnt: trials only begin and end."""
        return self.number, self._looked, len(self.tried), self._learnt

    def meets(self, rows: np.ndarray) -> np.ndarray:
        """Logarithms of the chances to meet the limits of memory and size, (n,). rows: (n, 16 + families)."""
        return self._needs.chances(_params_m(rows.T))

    def _point(self, trial: FrozenTrial) -> Point | None:
        """None of a trial without parameters, or whose worker is about to suggest them."""
        if self._points.get(trial.number) is None:
            family, params = params_of(trial)
            known = family in self._request.families and params.keys() >= FAMILIES[family].space.options.keys()
            name = trial.user_attrs.get("name", "")
            self._points[trial.number] = Point.at(self._request, family, params, name) if known else None
        return self._points[trial.number]


def _params_m(coordinates: np.ndarray) -> Any:
    """Millions of parameters of networks by their coordinates, (16 + families, ...)."""
    return np.exp(coordinates[3]) / 1e6


def params_of(trial: FrozenTrial) -> tuple[str, dict[str, int]]:
    """The family and its parameters that a trial has or was given; "" where there is none."""
    found = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return found.pop("family", ""), found


def _tried(trial: FrozenTrial, point: Point, faster: Faster) -> Tried:
    """What an ended trial tells."""
    detail = trial.user_attrs.get("detail")
    if not detail or not trial.values:
        return Tried(point, ended=True)
    reference, measured = detail.get("reference_ms"), detail.get("by_precision")
    latency_ms = faster.fastest_ms(point.family, measured) if measured else detail["latency_ms"]
    return Tried(
        point,
        detail.get("key", detail["digest"]),
        latency_ms / reference if reference else None,
        bool(trial.user_attrs["feasible"]),
        bool(detail.get("over")),
        trial.values[0],
        ended=True,
    )
