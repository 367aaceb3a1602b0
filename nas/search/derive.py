"""Networks that can be cut from a pretrained parent: by the importance of its units, or by varying its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nas.quality.parents import covers
from pruning.allocation import BudgetError, Costs, allocate
from pruning.units import KNOB_KINDS, Anatomy, Kind, anatomy, cut
from search_spaces import Arch, ArchError
from search_spaces.api import find_variant
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS

if TYPE_CHECKING:
    from nas.quality.trainer import Parent

SHARES = tuple(round(0.94**step, 3) for step in range(1, 24))
"""Of a parent's multiply-accumulates that a cut may leave: 94% down to 24%."""
CUTS: tuple[tuple[Kind, ...], ...] = (
    tuple(KNOB_KINDS),
    tuple(kind for kind in KNOB_KINDS if kind != "blocks"),
    tuple(kind for kind in KNOB_KINDS if kind != "embed"),
)
"""What a cut may take: anything, anything but whole branches, anything but stage widths."""
CHANGES = 4
"""Most parameters that a variation changes."""


class Cutter:
    """Cuts one parent by the importance of its units; each cut is made once."""

    def __init__(self, parent: Parent) -> None:
        self.parent = parent
        self._made: dict[float, list[Arch]] = {}

    def cuts(self, least: float, most: float) -> list[Arch]:
        """What is left of the parent at the `SHARES` from `least` to `most`, by what a cut may take; as far as so much
        can be taken, and what is left can be built."""
        shares = [share for share in SHARES if least <= share <= most]
        return [arch for share in shares for arch in self._at(share)]

    def _at(self, share: float) -> list[Arch]:
        if share not in self._made:
            found, (parts, costs), scores = [], self._anatomy, self.parent.scores
            for kinds in CUTS:
                try:
                    found.append(cut(parts, scores, allocate(parts, scores, costs, share * costs.base, kinds)).arch)
                except (BudgetError, ArchError):
                    continue
            self._made[share] = found
        return self._made[share]

    @cached_property
    def _anatomy(self) -> tuple[Anatomy, Costs]:
        parts = anatomy(self.parent.arch)
        return parts, Costs(parts, "macs")


def levels_of(name: str) -> dict[str, int]:
    """A published network's parameters, each 0 to LEVELS - 1."""
    family, variant = find_variant(name)
    return FAMILIES[family].space.encode(variant.values)


def within(
    parent: Arch, bases: Sequence[Mapping[str, int]], rng: np.random.Generator
) -> tuple[Arch, dict[str, int]] | None:
    """A network within its parent, and its parameters; None where this draw gives none.

    A few parameters of one of the bases go down, or up as far as the first base's, which is the parent's own. What the
    family calls its form stays as it is: weights of one form are no use in another.
    """
    space, ceiling = FAMILIES[parent.family].space, bases[0]
    names = [name for name in space.options if name not in ("form", "resolution")]
    levels = dict(bases[int(rng.integers(len(bases)))])
    for name in rng.choice(names, size=1 + int(rng.integers(min(CHANGES, len(names)))), replace=False):
        step = int(rng.choice((-2, -1, -1, 1)))
        levels[str(name)] = int(np.clip(levels[str(name)] + step, 0, LEVELS - 1))
    try:
        made = space.decode(levels, parent.num_classes, parent.resolution)
    except ArchError:
        return None
    if made == parent or not covers(parent, made) or levels == ceiling:
        return None
    return made, levels


def reduced(parent: Arch, own: Mapping[str, int], rng: np.random.Generator) -> tuple[Arch, dict[str, int]] | None:
    """The parent with fewer tokens and all its weights, and its parameters; None where this draw is the parent itself.

    own: the parent's parameters. The family is one whose form says what becomes of tokens (`Family.reduction`).
    """
    space = FAMILIES[parent.family].space
    keeps = [name for name in space.options if name.startswith("keep")]
    levels = dict(own) | {"form": int(rng.integers(LEVELS))}
    alike = rng.random() < 0.5
    rate = int(rng.integers(LEVELS))
    levels |= {name: rate if alike else int(rng.integers(LEVELS)) for name in keeps}
    made = space.decode(levels, parent.num_classes, parent.resolution)
    return None if made == parent else (made, levels)
