"""The families by name: a dict and a decorator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.arch import Arch
    from search_spaces.space import Space


Rules = Sequence[tuple[str, "str | Callable[[re.Match[str]], str]"]]
"""(pattern, replacement) pairs that turn a tensor's name into ours, applied in order."""


def no_rules(arch: Arch) -> Rules:
    """For a family whose official repository names tensors as timm does."""
    return ()


@dataclass(frozen=True)
class Variant:
    """A published network.

    values: its place on the family's axes (`Space.options`). top1: published ImageNet-1k top-1 in percent
    (None: none was published). source: where it and the hyper-parameters are from. timm: the name of timm's
    equal model, if it has one.
    """

    values: Mapping[str, Any]
    top1: float | None
    source: str
    timm: str | None = None


@dataclass(frozen=True)
class Family:
    """What a family file provides.

    build: Arch -> module. variants: published networks by name. space: the search axes. rename: for
    timm's names. official: for those of the official repository, where they differ.
    """

    name: str
    build: Callable[[Arch], nn.Module]
    variants: Mapping[str, Variant]
    space: Space
    rename: Rules = ()
    official: Callable[[Arch], Rules] = no_rules


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Enter a family under its name."""
    FAMILIES[family.name] = family
    return family
