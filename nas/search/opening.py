"""How a search begins: in every family a network within the budget, then the published networks about it.

Published shapes are brought to the budget along a ladder: other resolutions first, then other widths and depths.
Latencies that are foretold (`nas.search.speed`) choose the rung, and each measurement makes the next rung surer. A
family without a network within the budget has its smallest shape measured before it is given up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri

from nas.measure.budget import Verdict
from nas.search.seen import Point, Seen, Tried
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS

if TYPE_CHECKING:
    from nas.search.request import SearchRequest
    from nas.search.rows import Trial

LIKELY = 0.75
"""Chance of meeting the budget from which on a rung is tried."""
TRIES = 4
"""Rungs of a family that may be over the budget before its smallest shape is tried."""
NEAR = (0.5, 1.3)
"""Times the budget that a published network likely takes which is measured; one of each family may be faster."""
PUBLISHED = 3
"""Of them in a family, the slowest."""
SHARE = 4
"""One trial in so many may go to them."""
HOPELESS = 1.5
"""Times the budget from which on a family's smallest shape shows that nothing of it fits."""


class Opening:
    """Chooses the first networks of a study; what it says next depends on the study alone.

    Args:
        score: what a network promises, percent: the higher, the better.
    """

    def __init__(self, request: SearchRequest, seen: Seen, score: Callable[[Point], float]) -> None:
        self._request, self._seen = request, seen
        self._score = score
        self._rungs: dict[str, list[Point]] = {}
        self._smallest: dict[str, Point] = {}

    def next(self) -> Point | None:
        """The network to try next; None where the search has begun."""
        known = self._seen.digests
        found = [each for family in self._request.families if (each := self._within(family, known)) is not None]
        if found:  # of families with equally many trials, the most promising
            return min(found, key=lambda each: (len(self._own(each.family)), -self._score(each)))
        return self._published(known)

    def shapes(self) -> Iterator[Point]:
        """All rungs, of all families."""
        for family in self._request.families:
            yield from self._ladder(family)

    def hopeless(self) -> bool:
        """Whether the smallest shape of every family has been measured, far over the budget or over a limit."""
        found = {each.point.digest: each for each in self._seen.tried if each.relative}
        small = [found.get(self._small(family).digest) for family in self._request.families if self._is_open(family)]
        return (
            not any(each.feasible for each in self._seen.tried)
            and all(each and each.relative for each in small)
            and all(each.over or self._over(each) > HOPELESS for each in small if each)
        )

    def _own(self, family: str) -> list[Tried]:
        return [each for each in self._seen.tried if each.point.family == family]

    def _over(self, tried: Tried) -> float:
        """Times the budget."""
        return (tried.relative or math.inf) / math.exp(self._seen.limit)

    def _is_open(self, family: str) -> bool:
        """Whether nothing of a family is known to be within the budget."""
        return not any(each.feasible for each in self._own(family))

    def _within(self, family: str, known: set[str]) -> Point | None:
        """A network of a family that may be its first within the budget; None where it has one, or can have none."""
        own = self._own(family)
        if not self._is_open(family) or any(not each.ended for each in own):
            return None
        rungs = [rung for rung in self._ladder(family) if rung.digest not in known]
        small = self._small(family)
        if small.digest in known:
            return None
        if rungs and len(own) < TRIES:
            coordinates = np.array([rung.coordinates for rung in rungs])
            mean, error = self._seen.speed.predict(coordinates)
            sure = mean + float(ndtri(LIKELY)) * error <= self._seen.limit
            sure &= self._seen.meets(coordinates) >= math.log(LIKELY)
            likely = [rung for rung, fits in zip(rungs, sure, strict=True) if fits]
            if likely:
                return max(likely, key=self._score)
        return small

    def _published(self, known: set[str]) -> Point | None:
        """A published network that may be within the budget; last, one just above it."""
        tried = [each for each in self._seen.tried if each.point.name]
        over = any(each.relative and not each.feasible for each in tried)
        most = max(1, self._request.trials // SHARE)
        near: list[tuple[float, Point]] = []
        above: list[tuple[float, Point]] = []
        for family in self._request.families:
            number = sum(each.point.family == family for each in tried)
            rows = [rung for rung in self._ladder(family) if rung.name and rung.digest not in known]
            if not rows or (over and (number >= PUBLISHED or len(tried) >= most)):
                continue
            coordinates = np.array([row.coordinates for row in rows])
            mean, _ = self._seen.speed.predict(coordinates)
            times = [float(each) for each in np.exp(mean - self._seen.limit)]
            may = self._seen.meets(coordinates) >= math.log(1 - LIKELY)
            least = NEAR[0] if number else 0.0
            if number < PUBLISHED:
                near += [
                    (t, row) for t, row, able in zip(times, rows, may, strict=True) if able and least <= t <= NEAR[1]
                ]
            above += [(t, row) for t, row in zip(times, rows, strict=True) if t > 1]
        if near and len(tried) < most:
            return max(near, key=lambda each: each[0])[1]
        if above and not over:
            return min(above, key=lambda each: each[0])[1]
        return None

    def _ladder(self, family: str) -> list[Point]:
        if family not in self._rungs:
            found = {rung.digest: rung for rung in reversed([*rungs_of(self._request, family)])}
            self._rungs[family] = [*found.values()]  # the first of equals: a published one keeps its name
        return self._rungs[family]

    def _small(self, family: str) -> Point:
        if family not in self._smallest:
            self._smallest[family] = smallest_of(self._request, family)
        return self._smallest[family]


def rungs_of(request: SearchRequest, family: str) -> Iterator[Point]:
    """A family's published networks, each followed by its ladder."""
    space = FAMILIES[family].space
    for name, variant in FAMILIES[family].variants.items():
        levels = space.encode(variant.values)
        yield Point.at(request, family, levels, name)
        if not variant.reduced:
            for rung in ladder(levels, space.options, request.resolution is None):
                yield Point.at(request, family, rung)


def ladder(
    levels: Mapping[str, int], options: Mapping[str, Sequence[object]], resolutions: bool
) -> Iterator[dict[str, int]]:
    """A shape's rungs: down by resolution, then by widths and depths in turn; up likewise.

    resolutions: whether they are searched.
    """
    steps = [["resolution"]] * (LEVELS if resolutions else 0)
    groups = [[name for name in options if name.startswith(axis)] for axis in ("width", "depth")]
    steps += [*itertools.chain.from_iterable([groups] * LEVELS)]
    for sign in (-1, 1):
        now = dict(levels)
        for names in steps:
            before = dict(now)
            for name in names:
                now[name] = min(LEVELS - 1, max(0, now[name] + sign))
            if now != before:
                yield dict(now)


def smallest_of(request: SearchRequest, family: str) -> Point:
    """A family's smallest shape with all tokens: that of the fewest multiply-accumulates."""
    space = FAMILIES[family].space
    forms = range(LEVELS if "form" in space.options else 1)
    least = {name: LEVELS - 1 if name.startswith("keep") else 0 for name in PARAMETERS}
    points = [Point.at(request, family, least | {"form": form}) for form in forms]
    return min(points, key=lambda point: point.coordinates[0])


def ruled_out(request: SearchRequest, rows: Sequence[Trial]) -> tuple[str, ...]:
    """Families whose smallest shape was measured, over the budget or a limit."""
    over = {row.digest for row in rows if row.verdict == Verdict.OVER}
    return tuple(family for family in request.families if smallest_of(request, family).digest in over)
