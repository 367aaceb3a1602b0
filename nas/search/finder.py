"""The sampler of a search: it proposes the network that promises the largest gain within the one budget.

It compares thousands of networks (random ones, mutations and crossovers of the best) by constrained expected
improvement (Gardner et al., Bayesian Optimization with Inequality Constraints, ICML 2014): how much better than the
best so far a network is expected to be, times how likely it is to meet the budget, by what the study has measured
(`nas.search.speed`). What it has compared once stays in the choice. Now and then it tries a family that has had few
trials. No network is proposed twice, by whatever worker: a choice is ranked while others decide, and of those whom
nobody has tried by then the first is proposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy.special import log_ndtr

from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.prior import PriorTier
from nas.search.needs import CHANCE
from nas.search.sampling import log_improvement
from nas.search.seen import Point, Seen, Tried
from nas.search.speed import Speed
from nas.search.variations import crossed, varied
from search_spaces import ArchError
from search_spaces.space import random_params

if TYPE_CHECKING:
    from nas.quality.tier import TrainedTier
    from nas.search.request import SearchRequest

FIRST, DRAWN = 300, 30
"""Random networks of the first choice, and of every further one."""
GENERATIONS, CHILDREN = 2, 40
"""Of each choice: generations of mutations and crossovers, and how many of them in each."""
PARENTS = 8
"""The best networks so far, and as many of the most promising ones, that these are made of."""
CROSSED = 0.3
"""Share of crossovers."""
KEPT = 2000
"""Networks that stay in the choice, the most promising ones."""
FEW = 6
"""One proposal in so many goes to a family that has had few trials."""
JUDGED = 200
"""Networks of a choice that a tier that trains judges, the most likely to meet the budget."""
SCORE_ERROR = 0.5
"""Points by which the size prior's scores are taken to be uncertain, so that a choice without better ones goes on."""
LIKELY = 0.5
"""Of meeting the budget."""
MARGIN = 0.1
"""Points that some network must promise more than the best for the search to go on."""


class Judge(Protocol):
    """What says how good networks are."""

    def judge(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        """Expected scores in percent, and their standard deviations."""

    def best(self, tried: Sequence[Tried]) -> float:
        """The best score of these that is within the budget, percent; 0 where there is none."""


class BySize:
    """By the size prior, whose score is known without a trial."""

    def __init__(self, tier: PriorTier) -> None:
        self._tier = tier
        self._scores: dict[str, float] = {}

    def score(self, point: Point) -> float:
        if point.digest not in self._scores:
            self._scores[point.digest] = self._tier.estimate(Candidate(point.arch), counts_of(point.arch)).score
        return self._scores[point.digest]

    def judge(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.score(point) for point in points]), np.full(len(points), SCORE_ERROR)

    def best(self, tried: Sequence[Tried]) -> float:
        return max((self.score(each.point) for each in tried if each.feasible), default=0.0)


class ByTraining:
    """By the trainings so far; by size alone while these are too few."""

    def __init__(self, tier: TrainedTier, size: BySize) -> None:
        self._tier, self._size = tier, size
        self._features: dict[str, np.ndarray] = {}

    def judge(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        from nas.quality.surrogate import LEAST

        surrogate = self._tier.surrogate()
        if len(surrogate.trained) < LEAST:
            return self._size.judge(points)
        found = [surrogate.predict(self._described(point)) for point in points]
        return np.array([each.value for each in found]), np.array([each.error for each in found])

    def best(self, tried: Sequence[Tried]) -> float:
        from nas.quality.surrogate import LEAST

        surrogate = self._tier.surrogate()
        if len(surrogate.trained) < LEAST:
            return self._size.best(tried)
        fitting = {each.key for each in tried if each.feasible}
        found = (surrogate.predict(each.features, each.key).value for each in surrogate.trained if each.key in fitting)
        return max(found, default=0.0)

    def _described(self, point: Point) -> np.ndarray:
        from nas.quality.surrogate import describe

        if point.digest not in self._features:
            self._features[point.digest] = describe(point.arch, counts_of(point.arch))
        return self._features[point.digest]


@dataclass(frozen=True)
class Choice:
    """Networks that are compared; arrays have an entry for each."""

    points: Sequence[Point]
    fits: np.ndarray
    """Log of the chance to meet the budget, and the limits."""
    values: np.ndarray
    """Expected scores, percent, and their standard deviations."""
    errors: np.ndarray
    excluded: Sequence[Point]
    """Those that the budget has excluded, the likeliest to meet it first."""

    def promise(self, best: float) -> np.ndarray:
        """Log of the constrained expected improvement over a score."""
        found: np.ndarray = self.fits + log_improvement(self.values, self.errors, best)
        return found


class Finder:
    """See the module. With a seed, what one worker proposes depends on it and the study."""

    def __init__(self, request: SearchRequest, seen: Seen, judge: Judge) -> None:
        self._request, self._seen, self._judge = request, seen, judge
        self._pool: dict[str, Point] = {}
        self._at = lru_cache(KEPT)(lambda family, levels: Point.at(request, family, dict(levels)))
        """Of a family and its levels, one in eight of which comes again."""
        self._foretold: tuple[Speed, dict[str, tuple[float, float]]] = (seen.speed, {})
        self.choice: Choice | None = None
        """The last one."""
        self._ranked: list[Point] = []
        """Of the choice, the most promising first, then the excluded ones,"""
        self._of_few: list[Point] = []
        """and those of the family that has had few trials."""

    def add(self, points: Iterable[Point]) -> None:
        """Put networks into the choice."""
        for point in points:
            self._pool.setdefault(point.digest, point)

    def compare(self) -> None:
        """Renew the choice for the study's next trial; tenths of a second."""
        seed = self._request.seed
        rng = np.random.default_rng(None if seed is None else [seed, self._seen.number])
        self._draw(FIRST if self.choice is None else DRAWN, rng)
        for _ in range(GENERATIONS):
            self._breed(rng)
        self.choice, self._ranked, self._of_few = self._judged(), [], []
        if self.choice is None:
            return
        promise = self.choice.promise(self._judge.best(self._seen.tried))
        best_first = [self.choice.points[i] for i in np.argsort(-promise)]
        self._ranked = [*best_first, *self.choice.excluded]
        self._pool = {point.digest: point for point in best_first[:KEPT]}
        family = self._neglected(self.choice)
        if family is not None:
            best = self._judge.best([each for each in self._seen.tried if each.point.family == family])
            order = np.argsort(-self.choice.promise(best))
            self._of_few = [point for i in order if (point := self.choice.points[i]).family == family]

    def propose(self) -> Point | None:
        """The network of the choice that the study's next trial should try. Where all have been tried, the choice is
        renewed; None where those have been, too."""
        found = self._untried()
        if found is None:
            self.compare()
            found = self._untried()
        return found

    def nothing_better(self) -> bool:
        """Whether nothing of the last choice, fast or slow, promises more than the best; only the size prior is so sure
        of itself. Networks that an earlier choice has excluded are not among them."""
        if self.choice is None or not isinstance(self._judge, BySize) or not any(t.feasible for t in self._seen.tried):
            return False
        least = self._judge.best(self._seen.tried) + MARGIN
        return all(self._judge.score(point) <= least for point in (*self.choice.points, *self.choice.excluded))

    def _untried(self) -> Point | None:
        few = self._of_few if self._seen.number % FEW == FEW - 1 else []
        return next((point for point in (*few, *self._ranked) if point.digest not in self._seen.digests), None)

    def _judged(self) -> Choice | None:
        """Those of the pool that have not been tried and may meet the budget; of none that may, the likeliest. None
        where all have been tried."""
        known = self._seen.digests
        fresh = [point for digest, point in self._pool.items() if digest not in known]
        if not fresh:
            return None
        mean, error = self._latencies(fresh)
        fits = log_ndtr((self._seen.limit - mean) / error)
        fits += self._seen.meets(np.array([point.coordinates for point in fresh]))
        order, fitting = np.argsort(-fits), int(np.sum(fits >= math.log(CHANCE)))
        chosen = order[: max(1, min(fitting, JUDGED if isinstance(self._judge, ByTraining) else fitting))]
        points = [fresh[i] for i in chosen]
        excluded = [fresh[i] for i in order[fitting:]]
        return Choice(points, fits[chosen], *self._judge.judge(points), excluded)

    def _latencies(self, points: Sequence[Point]) -> np.ndarray:
        """Means and standard deviations as `Speed.predict` has them, (2, n); each is foretold once."""
        speed, known = self._foretold
        if speed is not self._seen.speed:
            self._foretold = speed, known = self._seen.speed, {}
        new = [point for point in points if point.digest not in known]
        if new:
            found = speed.predict(np.array([point.coordinates for point in new]))
            known.update(zip((point.digest for point in new), zip(*found, strict=True), strict=True))
        return np.array([known[point.digest] for point in points]).T

    def _neglected(self, choice: Choice) -> str | None:
        """Of the families that have had no more trials than the others in the median, the one that may hold most."""
        tries = dict.fromkeys(self._request.families, 0)
        for each in self._seen.tried:
            tries[each.point.family] += 1
        few = {family for family, count in tries.items() if count <= float(np.median([*tries.values()]))}
        upper = np.where(choice.fits >= math.log(LIKELY), choice.values + choice.errors, -np.inf)
        found = [(high, point.family) for high, point in zip(upper, choice.points, strict=True) if point.family in few]
        return max(found)[1] if found else None

    def _draw(self, number: int, rng: np.random.Generator) -> None:
        for _ in range(number):
            family = self._request.families[rng.integers(len(self._request.families))]
            self._add(family, random_params(rng))

    def _breed(self, rng: np.random.Generator) -> None:
        """Add children of the best networks within the budget (the fastest where none is) and of the most promising."""
        parents, choice = self._best(), self._judged()
        if choice is not None:
            promise = choice.promise(self._judge.best(self._seen.tried))
            parents += [choice.points[i] for i in np.argsort(-promise)[:PARENTS]]
        for i in range(CHILDREN if parents else 0):
            one = parents[i % len(parents)]
            others = [each for each in parents if each.family == one.family and each is not one]
            if others and rng.random() < CROSSED:
                self._add(one.family, crossed(one.levels, others[rng.integers(len(others))].levels, rng))
            else:
                self._add(one.family, varied(one.family, one.levels, rng))

    def _best(self) -> list[Point]:
        measured = [each for each in self._seen.tried if each.relative]
        fitting = [each for each in measured if each.feasible]

        def last(each: Tried) -> float:
            return -each.score if fitting else each.relative or math.inf

        return [each.point for each in sorted(fitting or measured, key=last)[:PARENTS]]

    def _add(self, family: str, levels: Mapping[str, int]) -> None:
        try:
            point = self._at(family, tuple(levels.items()))
        except ArchError:  # too large to be built
            return
        self._pool.setdefault(point.digest, point)
