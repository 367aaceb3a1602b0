"""Networks compared on the same images: whether a difference of accuracy is one, or chance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nas.intervals import LEVEL, agreement, of_difference, of_share


@dataclass(frozen=True)
class Pair:
    """Two networks' answers to the same images."""

    first: str
    second: str
    both: int
    """Images that both get right."""
    only_first: int
    only_second: int
    neither: int
    difference: float
    """Top-1 of the second less that of the first, in points."""
    difference_ci: tuple[float, float]
    """Its 95% interval (Newcombe 1998, method 10, for paired answers)."""
    p: float
    """Of McNemar's exact test, two-sided: how often chance alone makes so unequal a split of the images that one of the
    two gets right and the other does not."""
    p_adjusted: float
    """The same after Holm's correction for the number of pairs."""
    tie: bool
    """Whether these images do not tell the two apart: `p_adjusted` is above 5%."""

    def turned(self) -> Pair:
        """The same with the two in the other order."""
        low, high = self.difference_ci
        return replace(
            self,
            first=self.second,
            second=self.first,
            only_first=self.only_second,
            only_second=self.only_first,
            difference=-self.difference,
            difference_ci=(-high, -low),
        )


def compare(right: Mapping[str, np.ndarray]) -> list[Pair]:
    """Each pair of networks, in their order.

    Args:
        right: by network, (N,) bool, which of the same images it gets right.
    """
    couples = list(itertools.combinations(right, 2))
    adjusted = holm([mcnemar(right[one], right[other]) for one, other in couples])
    return [_pair(one, other, right[one], right[other], p) for (one, other), p in zip(couples, adjusted, strict=True)]


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The exact test's two-sided p (McNemar 1947; exact by the binomial distribution): of images that only one of two
    networks gets right, either is as likely to be the one."""
    from scipy.stats import binomtest

    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    return float(binomtest(one, one + other, 0.5).pvalue) if one + other else 1.0


def holm(values: list[float]) -> list[float]:
    """Several tests' p, corrected for their number (Holm 1979), in their order."""
    found, highest = [0.0] * len(values), 0.0
    for place, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - place) * values[i]))
        found[i] = highest
    return found


def _pair(one: str, other: str, first: np.ndarray, second: np.ndarray, adjusted: float) -> Pair:
    images = len(first)
    shares = [100 * float(each.mean()) for each in (second, first)]
    intervals = [of_share(share, images) for share in shares]
    found = of_difference(
        shares[0], intervals[0], shares[1], intervals[1], agreement([second.tolist()], [first.tolist()])
    )
    return Pair(
        one,
        other,
        both=int((first & second).sum()),
        only_first=int((first & ~second).sum()),
        only_second=int((second & ~first).sum()),
        neither=int((~first & ~second).sum()),
        difference=shares[0] - shares[1],
        difference_ci=(found.low, found.high),
        p=mcnemar(first, second),
        p_adjusted=adjusted,
        tie=adjusted > 1 - LEVEL,
    )
