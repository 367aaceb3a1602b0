"""The families by name, and what each of them states about itself.

A family is one file: its Arch, its module, and one call of `register`. What the rest of the program has to know about
it (how its weights are named, cut, transferred and shared, what its published figures mean) is a field of `Family`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from search_spaces.arch import Arch

if TYPE_CHECKING:
    import numpy as np

    from search_spaces.counting import Tally
    from search_spaces.network import Network
    from search_spaces.space import Space


A = TypeVar("A", bound=Arch)
Rules = Sequence[tuple[str, "str | Callable[[re.Match[str]], str]"]]
"""(pattern, replacement) pairs that turn a tensor's name into ours, applied in order."""


def no_rules(arch: Arch) -> Rules:
    """For a family whose official repository names tensors as timm does."""
    return ()


@dataclass(frozen=True)
class Variant:
    """A published network."""

    values: Mapping[str, Any]
    """Its place on the family's axes (`Space.options`)."""
    top1: float | None
    """Published ImageNet-1k top-1 in percent; None: none was published."""
    source: str
    """Where its top-1 and hyper-parameters are from."""
    timm: str | None = None
    """Name of timm's equal model, if it has one."""
    reduced: bool = False
    """Whether it is another published network with fewer tokens, and so no size of its own."""


@dataclass(frozen=True)
class TokenReduction(Generic[A]):
    """What dropping tokens costs, by the family's published networks."""

    whole: Callable[[A], A]
    """Arch -> the same network keeping all tokens."""
    published: Callable[[A], Sequence[str]]
    """Arch -> published variants of one size that drop tokens its way, the one that keeps all of them first."""


@dataclass(frozen=True)
class Family(Generic[A]):
    """What a family file provides."""

    name: str
    """As in `Arch.family`."""
    build: Callable[[A], Network]
    """Arch -> network, (B, 3, R, R) -> (B, classes)."""
    variants: Mapping[str, Variant]
    """Published networks by name."""
    space: Space
    """The search axes."""
    count: Callable[[A], Sequence[Tally]] | None = None
    """Arch -> parameters and MACs of each stage, from its document: the stem's are the first's, the classifier's the
    last's. None: they are counted in the built network, which takes a hundred times as long."""
    earlier: Space | None = None
    """Those of studies that were begun before they changed."""
    rename: Rules = ()
    """From timm's names of tensors to ours."""
    official: Callable[[A], Rules] = no_rules
    """Arch -> the same for the official repository's names, where they differ from timm's."""
    as_published: Callable[[A], A] = lambda arch: arch
    """Arch -> the Arch of the same weights in the form that is published."""
    reduction: TokenReduction[A] | None = None
    """For a family that published networks with dropped tokens."""
    tokens: Sequence[str] = ()
    """Last parts of the names of learned tokens and positions, whose new units begin at random."""
    ordered: Sequence[str] = ()
    """Last parts of the names of widths that keep their first units, whatever their importance."""
    inner_sources: Callable[[A, int, int], np.ndarray] | None = None
    """(Arch, stage, block) -> for each inner channel of a block's attention, which channel of the stage a residual adds
    to it, or -1; shape (heads * value_dim,)."""
    hold_all: Callable[[Any, Sequence[Any]], None] | None = None
    """(JSON document, JSON documents of Archs) -> None: the first holds their largest widths, blocks and branches; fit
    what the family ties to them, in place, so that it can hold the weights of all. Raises ArchError if nothing can."""


FAMILIES: dict[str, Family[Any]] = {}
_TODAY: dict[str, Family[Any]] = {}
"""As they were registered, those whose axes have changed."""


def register(family: Family[A]) -> Family[A]:
    """Enter a family under its name."""
    FAMILIES[family.name] = family
    if family.earlier is not None:
        _TODAY[family.name] = family
    return family


def use_spaces(earlier: bool) -> None:
    """Search every family, in this process, along the axes of today or along the earlier ones."""
    for name, family in _TODAY.items():
        FAMILIES[name] = replace(family, space=family.earlier) if earlier and family.earlier else family


def spaces_of(names: Sequence[str], digest: str) -> dict[str, Space]:
    """The axes of some families, `space.fingerprint` of which is `digest`: the earlier ones, else those in use."""
    from search_spaces.space import fingerprint

    earlier = {name: FAMILIES[name].earlier or FAMILIES[name].space for name in names}
    return earlier if fingerprint(earlier) == digest else {name: FAMILIES[name].space for name in names}


def with_earlier_space() -> list[str]:
    """The families that are searched along earlier axes."""
    return [name for name, family in _TODAY.items() if FAMILIES[name].space is not family.space]
