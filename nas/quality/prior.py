"""The size prior: a family's published top-1 against log2 MACs, with an error that grows away from what was published.

It is no accuracy. A line is fitted per family, because families were trained by different recipes. Where a family
published networks with dropped tokens, the line is that of its networks that keep all tokens, and what dropping them
costs is read off the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from nas.intervals import joined, of_error
from nas.networks.counts import Counts
from nas.quality.candidate import Candidate
from nas.quality.tier import Estimate
from search_spaces import Arch, get_arch, table
from search_spaces.api import find_variant
from search_spaces.arch import StageSummary
from search_spaces.registry import FAMILIES

SAMPLES = 12
SHAPE_SD = 1.87
"""Points of top-1 that size leaves unexplained: residual spread of 129 published ViTs and hybrids in timm (up to 6
GMACs, ImageNet-1k only) around a fit on log MACs and log parameters."""
SHAPE_FREEDOM = 126


class PriorTier:
    """The default tier of a search without data. An estimate costs one build on the meta device at most."""

    name = "prior"
    label = "score (prior: ImageNet top-1 predicted from size, with that family's published recipe)"
    note = (
        "The prior knows only size: it favours the largest network that fits the budget. To find what suits your "
        "images, search with --data."
    )
    trained = False
    failed: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._shapes: dict[str, Neighbourhood] = {}
        self._token_cost: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}

    def candidate_of(self, arch: Arch) -> Candidate:
        """A network that the search made up."""
        return Candidate(arch)

    def predict(self, candidate: Candidate, counts: Counts) -> Estimate:
        """As `estimate`."""
        return self.estimate(candidate, counts)

    def estimate(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Predicted ImageNet-1k top-1 of an Arch.

        Its interval is the prediction interval of the family's line (Student's t: few networks are published) and, in
        quadrature, `SHAPE_SD` per unit of distance from the nearest published shape. Its score is below the value by
        the leave-one-out error and the same.
        """
        arch = candidate.arch
        line, macs = self.line(arch.family), counts.macs
        reduction, cost = FAMILIES[arch.family].reduction, 0.0
        if reduction is not None and (whole := reduction.whole(arch)) != arch:
            left, macs = macs, table(whole).macs()
            cost = self._reduction_cost(tuple(reduction.published(arch)), left / macs)
        value = line.at(macs) - cost
        unlike = SHAPE_SD * self._neighbourhood(arch.family).distance(arch)
        by_size = of_error(value, line.doubt(macs), line.freedom)
        interval = joined(value, by_size, of_error(value, unlike, SHAPE_FREEDOM))
        return Estimate.within(value, math.hypot(line.error, unlike), interval)

    def line(self, family: str) -> Line:
        """Published top-1 against MACs of a family."""
        if family not in self._lines:
            points = [(table(get_arch(name)).macs(), published_top1(name)) for name in sizes(family)]
            self._lines[family] = Line(points)
        return self._lines[family]

    def _neighbourhood(self, family: str) -> Neighbourhood:
        if family not in self._shapes:
            published = {name: get_arch(name) for name in FAMILIES[family].variants}
            self._shapes[family] = Neighbourhood(published.values(), [published[name] for name in sizes(family)])
        return self._shapes[family]

    def _reduction_cost(self, published: tuple[str, ...], ratio: float) -> float:
        """Points lost when `ratio` of the MACs is left, interpolated in published networks, the whole one first."""
        if published not in self._token_cost:
            rows = [(table(get_arch(name)).macs(), published_top1(name)) for name in published]
            whole, best = rows[0]
            points = sorted((macs / whole, best - top1) for macs, top1 in rows)
            ratios, costs = np.array(points).T
            self._token_cost[published] = ratios, costs
        ratios, costs = self._token_cost[published]
        if ratio < ratios[0]:
            slope = (costs[1] - costs[0]) / (ratios[1] - ratios[0])
            return float(costs[0] + slope * (ratio - ratios[0]))
        return float(np.interp(ratio, ratios, costs))


class Line:
    """Least squares of top-1 on log2 MACs.

    error: root mean square of the leave-one-out residuals. freedom: degrees of freedom of the fit's residuals.
    """

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self.x = np.log2([macs for macs, _ in points])
        self.y = np.array([top1 for _, top1 in points])
        self.slope, self.offset = np.polyfit(self.x, self.y, 1)
        self.residuals = np.array([self._without(i) for i in range(len(points))])
        self.error = float(np.sqrt(np.mean(self.residuals**2)))
        self.freedom = len(points) - 2
        around = self.y - self.slope * self.x - self.offset
        self.spread = float(np.sqrt((around**2).sum() / self.freedom))

    def at(self, macs: int) -> float:
        return float(self.slope * math.log2(macs) + self.offset)

    def doubt(self, macs: int) -> float:
        """Standard error of a new network's top-1 by the line; it grows away from the published sizes."""
        away = (math.log2(macs) - self.x.mean()) ** 2 / ((self.x - self.x.mean()) ** 2).sum()
        return self.spread * math.sqrt(1 + 1 / len(self.x) + float(away))

    def _without(self, left_out: int) -> float:
        rest = np.arange(len(self.x)) != left_out
        slope, offset = np.polyfit(self.x[rest], self.y[rest], 1)
        return float(self.y[left_out] - slope * self.x[left_out] - offset)


class Neighbourhood:
    """Distance from the nearest published shape, in units of the median distance between neighbouring sizes."""

    def __init__(self, published: Iterable[Arch], ladder: Sequence[Arch]) -> None:
        self.published = [features(arch) for arch in published]
        rungs = [features(arch) for arch in ladder]
        nearest = [min(_apart(one, other) for other in rungs if other is not one) for one in rungs]
        self.unit = float(np.median(nearest))

    def distance(self, arch: Arch) -> float:
        own = features(arch)
        return min(_apart(own, other) for other in self.published) / self.unit


def published_top1(name: str) -> float:
    """A published network's top-1 on ImageNet-1k, in percent.

    Raises:
        ValueError: none is published.
    """
    top1 = find_variant(name)[1].top1
    if top1 is None:
        raise ValueError(f"{name} has no published top-1, which the prior is fitted to")
    return top1


def sizes(family: str) -> list[str]:
    """The published variants that differ in size, and not by dropped tokens alone."""
    return [name for name, variant in FAMILIES[family].variants.items() if not variant.reduced]


def features(arch: Arch) -> np.ndarray:
    """A network's shape: one row a stage, every column in doublings, but for shares in 0..1. Shape (stages, 7)."""
    resolution = 2 * math.log2(arch.resolution)
    return np.array([[*_row(stage), resolution] for stage in arch.summary()])


def _row(stage: StageSummary) -> list[float]:
    return [
        math.log2(stage.embed_dim),
        math.log2(1 + stage.depth),
        math.log2(1 + stage.heads * stage.key_dim),
        stage.attention_share,
        math.log2(0.5 + stage.ffn_ratio),
        2 * (1 - stage.keep_rate),
    ]


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square over stages of the distance between their rows; unequal stage counts compare by depth."""
    if len(a) != len(b):
        a, b = _by_depth(a), _by_depth(b)
    return float(np.sqrt(((a - b) ** 2).sum(axis=1).mean()))


def _by_depth(rows: np.ndarray) -> np.ndarray:
    """Rows sampled at equal steps of relative depth; the depth column becomes the whole depth."""
    depths = np.exp2(rows[:, 1]) - 1
    ends = np.cumsum(depths) / depths.sum()
    picked = rows[np.searchsorted(ends, (np.arange(SAMPLES) + 0.5) / SAMPLES)].copy()
    picked[:, 1] = math.log2(1 + depths.sum())
    return picked


def references() -> Mapping[str, float]:
    """Each family's leave-one-out error in points, for results pages and reports."""
    prior = PriorTier()
    return {family: prior.line(family).error for family in FAMILIES}
