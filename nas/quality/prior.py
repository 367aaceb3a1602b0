"""The size prior: ImageNet-1k top-1 from a network's size, with an error that grows away from what was published.

It is no accuracy. `size_fit` predicts from published networks of all families. What dropping tokens costs is read off
the networks that were published with and without. Shapes that are unlike their family's published ones are more
doubtful: a doubling away from them, as much as another family is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nas.networks.counts import Counts, counts_of
from nas.quality.candidate import Candidate
from nas.quality.published import Published, published
from nas.quality.scale import interval_of, odds_of, percent_of
from nas.quality.size_fit import OFFSETS, SizeFit
from nas.quality.tier import Estimate
from search_spaces import Arch, count, get_arch
from search_spaces.api import find_variant
from search_spaces.arch import StageSummary
from search_spaces.registry import FAMILIES

SAMPLES = 12
QK, SHARE = 2, 3
"""Columns of `features`."""
CLASSES = 1000
"""Of ImageNet-1k: what a network is predicted for, whatever its own number."""


@dataclass(frozen=True)
class Sized:
    """The size of a network as it would be published, with 1000 classes and all tokens kept."""

    params: int
    macs: int
    resolution: int
    distilled: bool


class PriorTier:
    """The default tier of a search without data. An estimate builds nothing.

    recipes: whether what families' published recipes are worth counts, which is so where they will be trained by those;
    networks that are all trained by one recipe differ by size alone.
    """

    name = "prior"
    label = "score (prior: ImageNet top-1 predicted from size, with that family's published recipe)"
    note = (
        "The prior knows size, and what a family's published design and recipe are worth (LeViT's: 1000 epochs, "
        "distilled). It favours the largest network that fits the budget. To find what suits your images, search "
        "with --data."
    )
    trained = False
    failed: Mapping[str, str] = {}

    def __init__(self, recipes: bool = True) -> None:
        self.recipes = recipes
        self._fit = fitted()
        self._shapes: dict[str, Neighbourhood] = {}

    def candidate_of(self, arch: Arch) -> Candidate:
        """A network that the search made up."""
        return Candidate(arch)

    def predict(self, candidate: Candidate, counts: Counts) -> Estimate:
        """As `estimate`."""
        return self.estimate(candidate, counts)

    def estimate(self, candidate: Candidate, counts: Counts) -> Estimate:
        """Predicted ImageNet-1k top-1 of an Arch.

        Its error is that of `SizeFit` and, in quadrature, the spread of families for each doubling of distance from
        the nearest published shape. Its interval is the 95% prediction interval, its score one error below the value.
        """
        arch = candidate.arch
        reduction = FAMILIES[arch.family].reduction
        whole, left = arch, 1.0
        if reduction is not None and (whole := reduction.whole(arch)) != arch:
            left = counts.macs / count(whole).macs
        found = self._fit.predict(sized(whole, self.recipes), arch.family if self.recipes else None)
        mean = found.mean
        if reduction is not None and left < 1:
            mean = odds_of(percent_of(mean) * (1 - _share_lost(tuple(reduction.published(arch)), left)))
        error = math.hypot(found.error, OFFSETS * self._neighbourhood(arch.family).distance(arch))
        return Estimate(percent_of(mean), interval_of(mean, error), percent_of(mean - error))

    def _neighbourhood(self, family: str) -> Neighbourhood:
        if family not in self._shapes:
            self._shapes[family] = Neighbourhood(map(get_arch, FAMILIES[family].variants))
        return self._shapes[family]


@functools.cache
def fitted() -> SizeFit:
    """The fit that predicts."""
    return SizeFit(fitted_to())


def fitted_to() -> list[Published]:
    """The networks of the table that are for it and keep all tokens."""
    return [row for row in published() if row.fit and not _reduced(row.name)]


def sized(arch: Arch, distilled: bool = True) -> Sized:
    """The size of an Arch with 1000 classes. distilled: whether one that has a head for it counts as distilled."""
    counts = counts_of(arch if arch.num_classes == CLASSES else arch.model_copy(update={"num_classes": CLASSES}))
    return Sized(counts.params, counts.macs, arch.resolution, distilled and getattr(arch, "distilled", False))


@functools.cache
def _lost(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of MACs left, ascending, and of top-1 lost, of published networks, the whole one first."""
    rows = [(count(get_arch(name)).macs, published_top1(name)) for name in names]
    whole, best = rows[0]
    ratios, lost = np.array(sorted((macs / whole, 1 - top1 / best) for macs, top1 in rows)).T
    return ratios, lost


def _share_lost(names: tuple[str, ...], left: float) -> float:
    """Share of top-1 lost when a share `left` of the MACs is left, interpolated in published networks."""
    ratios, lost = _lost(names)
    if left < ratios[0]:
        slope = (lost[1] - lost[0]) / (ratios[1] - ratios[0])
        return float(lost[0] + slope * (left - ratios[0]))
    return float(np.interp(left, ratios, lost))


class Neighbourhood:
    """Distance from the nearest of a family's published shapes, in doublings.

    Networks of one family are 0.3 to 0.9 apart, those of two families 1.2 at least (medians 0.6 and 1.2). It is the
    root mean square over stages of the distance between their rows of `features`. Stages with and without
    attention differ by that, and by no width of it. Unequal numbers of stages compare by relative depth.
    """

    def __init__(self, published: Iterable[Arch]) -> None:
        found = {shape.tobytes(): shape for shape in map(features, published)}.values()
        counts = {len(shape) for shape in found}
        self._alike = {count: np.array([shape for shape in found if len(shape) == count]) for count in counts}
        self._unlike = {
            count: np.array([_by_depth(shape) for shape in found if len(shape) != count]) for count in counts
        }
        self._all = np.array([_by_depth(shape) for shape in found])

    def distance(self, arch: Arch) -> float:
        own = features(arch)
        alike, unlike = self._alike.get(len(own)), self._unlike.get(len(own), self._all)
        nearest = math.inf if alike is None else _nearest(own, alike)
        if len(unlike):
            nearest = min(nearest, _nearest(_by_depth(own), unlike))
        return nearest


def _nearest(own: np.ndarray, shapes: np.ndarray) -> float:
    steps = shapes - own
    steps[..., QK] *= np.minimum(shapes[..., SHARE], own[..., SHARE])
    return math.sqrt(float((steps * steps).sum((1, 2)).min()) / len(own))


def published_top1(name: str) -> float:
    """A published network's top-1 on ImageNet-1k, in percent.

    Raises:
        ValueError: none is published.
    """
    top1 = find_variant(name)[1].top1
    if top1 is None:
        raise ValueError(f"{name} has no published top-1, which the prior is fitted to")
    return top1


def _reduced(name: str) -> bool:
    """Whether one of ours is another published network with fewer tokens."""
    return any(name in family.variants and family.variants[name].reduced for family in FAMILIES.values())


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


def _by_depth(rows: np.ndarray) -> np.ndarray:
    """Rows sampled at equal steps of relative depth; the depth column becomes the whole depth."""
    depths = np.exp2(rows[:, 1]) - 1
    ends = np.cumsum(depths) / depths.sum()
    picked = rows[np.searchsorted(ends, (np.arange(SAMPLES) + 0.5) / SAMPLES)].copy()
    picked[:, 1] = math.log2(1 + depths.sum())
    return picked
