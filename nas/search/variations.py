"""Networks made of others in the search space: mutations and crossovers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS

CHANGES = 4
"""Most parameters that a variation changes."""


def varied(family: str, levels: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
    """A few of the family's parameters changed, mostly by one level."""
    active = list(FAMILIES[family].space.options)
    count = 1 + int(rng.integers(min(CHANGES, len(active))))
    changed = dict(levels)
    for name in rng.choice(active, size=count, replace=False):
        step = int(rng.choice((-2, -1, -1, 1, 1, 2)))
        changed[str(name)] = int(np.clip(changed[str(name)] + step, 0, LEVELS - 1))
    return changed


def crossed(one: Mapping[str, int], other: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
    """Each parameter of one parent or of the other."""
    return {name: int(one[name] if rng.random() < 0.5 else other[name]) for name in PARAMETERS}
