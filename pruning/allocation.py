"""Which units go, and where new ones pay: a budgeted choice over all knobs of a network.

A step takes a knob to the next multiple; it loses the importance of the units that go and saves their cost. Steps are
taken in order of importance lost per cost saved. Units of one knob are taken in order of importance, so its steps lose
more and more and save about as much each: for such a concave knapsack the greedy order is within one step of optimal.
Reallocation carries the same order past the present sizes: the importance of units a knob has not yet is extrapolated
from its weakest ones, and steps up are paid for by the cheapest steps down.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pruning.units import Anatomy, Kind, Knob, Scores, Settings
from search_spaces.widths import Axis, Cat, Width, widths_of

MARGIN = 1.5
"""A step up must promise this many times the importance per cost of the steps down that pay for it: its units start
from nothing and the promise is an extrapolation."""
LARGEST = 2
"""Times its size that a knob may grow."""
GROWING: tuple[Kind, ...] = ("ffn", "qk", "v")
"""Kinds that reallocation widens. Not stage widths: their units look important because everything hangs on them, but
new ones start unread. Allowed to grow they doubled at the cost of every FFN, and accuracy came back more slowly.
"""
Metric = Literal["macs", "params"]


class BudgetError(ValueError):
    """A budget below what the minimum widths reach; `reachable` is the least cost."""

    def __init__(self, reachable: float) -> None:
        super().__init__(f"the smallest reachable cost is {reachable:g}")
        self.reachable = reachable


class Costs:
    """What a network costs at given sizes, and what changing one knob changes.

    Args:
        metric: multiply-accumulates of an image, or parameters.
        rates: measured milliseconds of a multiply-accumulate, by the name of each knob; None: the metric is the cost.
        base: with rates, the network's measured latency in milliseconds.
        fixed: with rates, milliseconds that a residual branch takes at any width, by its knob's name.
    """

    def __init__(
        self,
        parts: Anatomy,
        metric: Metric,
        rates: Mapping[str, float] | None = None,
        base: float | None = None,
        fixed: Mapping[str, float] | None = None,
    ) -> None:
        table = parts.table
        terms = [(e.name, e.axes, e.positions if metric == "macs" else int(e.trainable)) for e in table.entries]
        if metric == "macs":
            terms += [(f"{p.name}.", (p.axis,), p.times) for p in table.products]
        self._terms = [(name, axes, times) for name, axes, times in terms if times]
        self._by_width: dict[str, set[int]] = defaultdict(set)
        for i, (_, axes, _) in enumerate(self._terms):
            for name in {width.name for axis in axes for width in widths_of(axis)}:
                self._by_width[name].add(i)
        self._by_branch = {
            knob.width: {i for i, (name, _, _) in enumerate(self._terms) if name.startswith(f"{knob.width}.")}
            for knob in parts.knobs
            if knob.kind == "blocks"
        }
        self._head_of: dict[str, tuple[str, int]] = {}
        for gate in parts.gates.values():
            if gate.heads is not None and gate.heads[1] is not None:
                heads, which = gate.heads[0].name, gate.heads[1]
                for name in (gate.width.name, f"{heads}.{which}.qk"):
                    self._head_of[name] = heads, which
                    self._by_width[heads] |= self._by_width[name]
        self._branch_of = {i: branch for branch, terms in self._by_branch.items() for i in terms}
        self._rates, self._fixed = rates, fixed or {}
        self.base = self._sum(range(len(self._terms)), {}, ()) if base is None else base

    def difference(self, knob: Knob, change: int, sizes: Mapping[str, int], gone: Collection[str]) -> float:
        """Cost added by `change` more units of a knob (negative: saved), the others at `sizes`."""
        rate = 1.0 if self._rates is None else self._rates[knob.name]
        if knob.kind == "blocks":
            counted = self._sum(self._by_branch[knob.width], sizes, {*gone} - {knob.width})
            return math.copysign(rate * counted + self._fixed.get(knob.name, 0.0), change)
        changed = (knob.width, *knob.follows)
        terms = set().union(*(self._by_width[name] for name in changed))
        after = dict(sizes)
        for name in changed:
            after[name] += change
        return rate * (self._sum(terms, after, gone) - self._sum(terms, sizes, gone))

    def _sum(self, terms: Collection[int], sizes: Mapping[str, int], gone: Collection[str]) -> int:
        total = 0
        for i in terms:
            if self._branch_of.get(i) not in gone:
                _, axes, times = self._terms[i]
                total += times * math.prod(self._length(axis, sizes) for axis in axes)
        return total

    def _length(self, axis: Axis, sizes: Mapping[str, int]) -> int:
        """Length of an axis at these sizes of its widths; those of a cascade's removed heads are gone."""
        if isinstance(axis, Width):
            heads, which = self._head_of.get(axis.name, ("", 0))
            return 0 if sizes.get(heads, which + 1) <= which else sizes.get(axis.name, axis.size)
        if isinstance(axis, Cat):
            return sum(self._length(part, sizes) for part in axis.parts)
        return self._length(axis.outer, sizes) * self._length(axis.inner, sizes)


@dataclass
class _State:
    """Settings so far, and what they cost."""

    costs: Costs
    sizes: dict[str, int]
    """Size of every width by name."""
    cost: float
    settings: dict[str, int] = field(default_factory=dict)
    """Size of each knob that was moved, by name."""
    gone: set[str] = field(default_factory=set)
    """Paths of removed residual branches."""

    def size_of(self, knob: Knob) -> int:
        return self.settings.get(knob.name, knob.size)

    def price(self, knob: Knob, size: int) -> float:
        """Cost added by taking a knob to `size`."""
        return self.costs.difference(knob, size - self.size_of(knob), self.sizes, self.gone)

    def move(self, knob: Knob, size: int) -> None:
        self.cost += self.price(knob, size)
        change = size - self.size_of(knob)
        if knob.kind == "blocks":
            (self.gone.discard if size else self.gone.add)(knob.width)
        else:
            for name in (knob.width, *knob.follows):
                self.sizes[name] += change
        self.settings[knob.name] = size

    def step_down(self, knob: Knob, multiple_of: int) -> None:
        """Take a knob to its next size down.

        Raises:
            ValueError: it is at its minimum.
        """
        smaller = smaller_size(knob, self.size_of(knob), multiple_of)
        if smaller is None:
            raise ValueError(f"{knob.name} is at its minimum")
        self.move(knob, smaller)


@dataclass(frozen=True)
class _Value:
    """What each size of a knob is worth."""

    ascending: np.ndarray
    """Importance of its units from the weakest up, summed over heads, (units,)."""
    step: int
    """Units that a step takes."""

    def lost(self, size: int, smaller: int) -> float:
        n = len(self.ascending)
        return float(self.ascending[max(0, n - size) : max(0, n - smaller)].sum())

    def promised(self, size: int, larger: int) -> float:
        """Extrapolated importance of units the knob has not: the mean of its weakest step, falling on as it fell."""
        n = len(self.ascending)
        last = self.ascending[: self.step].mean()
        before = self.ascending[self.step : 2 * self.step]
        fall = min(1.0, last / before.mean()) if before.size and before.mean() > 0 else 1.0
        steps = np.arange(size - n, larger - n) // self.step + 1
        return float((last * fall**steps).sum())


def smaller_size(knob: Knob, size: int, multiple_of: int) -> int | None:
    """Give the next size down; None at the minimum: one head, no branch, else `multiple_of` units."""
    if knob.kind in ("heads", "blocks"):
        least = 0 if knob.kind == "blocks" else 1
        return size - 1 if size > least else None
    lower = (size - 1) // multiple_of * multiple_of
    return lower if lower >= multiple_of else None


def larger_size(knob: Knob, size: int, multiple_of: int) -> int | None:
    """Give the next size up; None where the knob does not grow or has doubled."""
    higher = (size // multiple_of + 1) * multiple_of
    return higher if knob.grows and knob.kind in GROWING and higher <= LARGEST * knob.size else None


def movable(parts: Anatomy, kinds: Collection[Kind], multiple_of: int) -> list[Knob]:
    """List the knobs of these kinds that can change so that their width stays, or becomes, a multiple.

    A width that attention heads divide is several knobs; where one of them is below `multiple_of` and so cannot change,
    nor can the others.
    """
    parted = Counter(knob.width for knob in parts.knobs)
    stuck = {knob.width for knob in parts.knobs if parted[knob.width] > 1 and knob.size < multiple_of}
    return [knob for knob in parts.knobs if knob.kind in kinds and knob.width not in stuck]


def allocate(
    parts: Anatomy,
    scores: Scores,
    costs: Costs,
    target: float,
    kinds: Collection[Kind],
    multiple_of: int = 8,
    reallocate: bool = False,
) -> Settings:
    """Choose settings of the knobs of these kinds that cost at most `target` and lose the least importance.

    Every width that changes becomes a multiple of `multiple_of`, heads and branches apart.

    Raises:
        BudgetError: the minimum sizes cost more than `target`.
    """
    knobs = movable(parts, kinds, multiple_of)
    values = {
        knob.name: _Value(
            np.take_along_axis(knob.importance(scores), knob.ranking(scores), axis=1).sum(axis=0),
            1 if knob.kind in ("heads", "blocks") else multiple_of,
        )
        for knob in knobs
    }
    state = _State(costs, dict(parts.sizes), costs.base)
    down = _Descent(knobs, values, state, multiple_of)
    while state.cost > target:
        if not down.take():
            raise BudgetError(state.cost)
    if reallocate:
        _exchange(knobs, values, state, down, target, multiple_of)
    chunks = _chunks(knobs)
    down.taken.extend(_even_out(chunks, state, multiple_of))
    _refill(down.taken, chunks, state, target, multiple_of)
    return {knob.name: state.size_of(knob) for knob in knobs if state.size_of(knob) != knob.size}


class _Descent:
    """Steps down in order of importance lost per cost saved. Keys only rise as other knobs shrink, so that a stale key
    is a lower bound and is refreshed when it comes up."""

    def __init__(self, knobs: Collection[Knob], values: Mapping[str, _Value], state: _State, multiple_of: int) -> None:
        self._values, self._state, self._multiple_of = values, state, multiple_of
        self._heap: list[tuple[float, int, Knob]] = []
        self._barred: set[str] = set()
        self.taken: list[tuple[Knob, int]] = []
        for i, knob in enumerate(knobs):
            self._push(i, knob)

    def bar(self, knob: Knob) -> None:
        """Take no more steps of this knob: it grows."""
        self._barred.add(knob.name)

    def density(self) -> float | None:
        """Importance per cost of the next step; None when there is none."""
        while self._heap:
            key, i, knob = self._heap[0]
            if knob.name in self._barred:
                heapq.heappop(self._heap)
                continue
            fresh = self._key(knob)
            if fresh is None or fresh > key * (1 + 1e-9) + 1e-300:
                heapq.heappop(self._heap)
                if fresh is not None:
                    heapq.heappush(self._heap, (fresh, i, knob))
                continue
            return fresh
        return None

    def take(self) -> bool:
        """Take the next step; False when there is none."""
        if self.density() is None:
            return False
        _, i, knob = heapq.heappop(self._heap)
        before = self._state.size_of(knob)
        self._state.step_down(knob, self._multiple_of)
        self.taken.append((knob, before))
        self._push(i, knob)
        return True

    def _push(self, i: int, knob: Knob) -> None:
        key = self._key(knob)
        if key is not None:
            heapq.heappush(self._heap, (key, i, knob))

    def _key(self, knob: Knob) -> float | None:
        size = self._state.size_of(knob)
        smaller = smaller_size(knob, size, self._multiple_of)
        if smaller is None:
            return None
        saved = -self._state.price(knob, smaller)
        return self._values[knob.name].lost(size, smaller) / saved if saved > 0 else None


def _exchange(
    knobs: Collection[Knob],
    values: Mapping[str, _Value],
    state: _State,
    down: _Descent,
    target: float,
    multiple_of: int,
) -> None:
    """Grow the knob that promises most per cost, and pay with the cheapest steps down, while that gains."""
    while True:
        offers = []
        for knob in knobs:
            size = state.size_of(knob)
            larger = larger_size(knob, size, multiple_of) if size >= knob.size else None
            if larger is not None and (price := state.price(knob, larger)) > 0:
                offers.append((values[knob.name].promised(size, larger) / price, knob, larger))
        cheapest = down.density()
        if not offers or cheapest is None:
            return
        best, knob, larger = max(offers, key=lambda offer: offer[0])
        if best <= MARGIN * cheapest:
            return
        down.bar(knob)
        before = state.size_of(knob)
        state.move(knob, larger)
        while state.cost > target:
            if not down.take():
                state.move(knob, before)
                return


def _chunks(knobs: Collection[Knob]) -> dict[str, list[Knob]]:
    """Knobs by their width; several where attention heads divide it."""
    found: dict[str, list[Knob]] = defaultdict(list)
    for knob in knobs:
        found[knob.width].append(knob)
    return found


def _even_out(chunks: Mapping[str, list[Knob]], state: _State, multiple_of: int) -> list[tuple[Knob, int]]:
    """Take the chunks of every width that has changed down to multiples, as their sum must be one; returns the steps,
    each as its knob and the size before."""
    steps = []
    for knobs in chunks.values():
        if len(knobs) > 1 and any(state.size_of(knob) != knob.size for knob in knobs):
            for knob in knobs:
                before = state.size_of(knob)
                if before % multiple_of:
                    state.step_down(knob, multiple_of)
                    steps.append((knob, before))
    return steps


def _refill(
    taken: list[tuple[Knob, int]], chunks: Mapping[str, list[Knob]], state: _State, target: float, multiple_of: int
) -> None:
    """Undo the last steps where the budget has room for them and multiples stay: a large step may have left some."""
    for knob, before in reversed(taken):
        if state.size_of(knob) >= before or state.cost + state.price(knob, before) > target:
            continue
        others = (other for other in chunks[knob.width] if other is not knob)
        odd = knob.kind not in ("heads", "blocks") and before % multiple_of
        if not odd or all(state.size_of(other) == other.size for other in others):
            state.move(knob, before)
