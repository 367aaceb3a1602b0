"""Another Arch's weights out of a trained one's, along the width table: units cut away, units grown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces import Arch, table
from search_spaces.widths import NEW_POSITIVE, NEW_ZERO, Axis, Select, Width, indices


@dataclass(frozen=True, eq=False)
class Origin:
    """What the units along a tensor's first axis were in the larger network."""

    name: str
    """The larger network's tensor."""
    rows: np.ndarray
    """(units,) int64: its units; below 0 for a new one."""
    factor: np.ndarray | None = None
    """(units,): what each was multiplied by; None: nothing."""


def slice_weights(
    parent: Arch,
    weights: Mapping[str, Tensor],
    child: Arch,
    select: Select | None = None,
    blocks: Mapping[str, str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The child's state dict, taken from the parent's.

    Args:
        parent, weights: an Arch and its state dict.
        child: an Arch of the same family.
        select: parent width name -> kept unit indices, and `widths.NEW` for new units; a width without an entry
            keeps its first units. New units write at random (keys at zero) and are read with weight zero, so the
            outputs are the parent's, except under a LayerNorm or GroupNorm, whose statistics change.
        blocks: child block prefix -> parent block prefix ("stages.1.blocks.2" -> "stages.1.blocks.4"); a block
            without an entry comes from the parent's block of the same name.
        generator: source of the new units' random weights.

    Returns:
        One tensor per name of the child. The classifier is left out where the number of classes differs.

    Raises:
        ValueError: another family, a part the parent has not, or a width that the selection does not fill.
    """
    if parent.family != child.family:
        raise ValueError(f"cannot cut a {child.family} network out of a {parent.family} one")
    larger = table(parent)
    for width in (select or {}).keys() - larger.widths().keys():
        raise ValueError(f"the larger network has no width {width}")
    sources = {entry.name: entry for entry in larger.entries}
    cut = {}
    for entry in table(child).entries:
        name = _in_parent(entry.name, blocks or {})
        if name not in sources:
            raise ValueError(f"the larger network has no {name}")
        ours, theirs = significant(entry.axes), significant(sources[name].axes)
        if len(ours) != len(theirs):
            raise ValueError(f"{name} has {len(theirs)} axes in the larger network and {len(ours)} in the smaller")
        if any(a.size != b.size for a, b in zip(ours, theirs, strict=True) if _is(a, "classes")):
            continue
        tensor = weights[name].reshape([axis.size for axis in theirs])
        for dim, (axis, source) in enumerate(zip(ours, theirs, strict=True)):
            if isinstance(axis, Width) and axis.rule == "resize":
                tensor = resize(tensor, dim, axis.size)
                continue
            chosen = indices(axis, source, select or {})
            tensor = tensor.index_select(dim, torch.from_numpy(np.maximum(chosen, 0)).long())
            if (chosen < 0).any():
                grow(tensor, entry.name, dim, chosen, weights[name].std().item(), generator)
        cut[entry.name] = tensor.reshape(entry.shape).clone()
    return cut


def origins_of(
    parent: Arch, child: Arch, select: Select | None = None, blocks: Mapping[str, str] | None = None
) -> dict[str, Origin]:
    """Where `slice_weights` takes the units of every tensor of the child from; as it is called."""
    sources = {entry.name: entry for entry in table(parent).entries}
    found = {}
    for entry in table(child).entries:
        name = _in_parent(entry.name, blocks or {})
        if entry.axes and not _is(entry.axes[0], "classes"):
            found[entry.name] = Origin(name, indices(entry.axes[0], sources[name].axes[0], select or {}))
        elif entry.axes and entry.axes[0].size == sources[name].axes[0].size:
            found[entry.name] = Origin(name, np.arange(entry.axes[0].size))
    return found


def _in_parent(name: str, blocks: Mapping[str, str]) -> str:
    """A tensor's name in the parent: the longest block prefix that fits is replaced."""
    for ours, theirs in sorted(blocks.items(), key=lambda pair: -len(pair[0])):
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def grow(
    tensor: Tensor, name: str, dim: int, chosen: np.ndarray, std: float, generator: torch.Generator | None
) -> None:
    """Start the new units of a freshly gathered tensor, in place.

    A vector per unit (bias, BatchNorm) starts as in an untrained layer; rows of a weight are normal with the standard
    deviation of the trained ones; columns, where others read the units, are zero. What begins at zero where it writes
    does so by its BatchNorm's weight where it has one: that norm would blow up the smallest step of a zero row.
    """
    new, zero, positive = (
        torch.from_numpy(np.flatnonzero(which)) for which in (chosen < 0, chosen == NEW_ZERO, chosen == NEW_POSITIVE)
    )
    if tensor.ndim == 1:
        tensor[new] = 1.0 if re.search(r"(norm\d?\.weight|running_var)$", name) else 0.0
        if name.endswith("norm.weight"):
            tensor[zero] = 0.0
    elif dim > 0:
        tensor.index_fill_(dim, new, 0.0)
    else:
        tensor[new] = torch.randn(len(new), *tensor.shape[1:], generator=generator, dtype=tensor.dtype) * std
        tensor[positive] = tensor[positive].abs()
        if not name.endswith(".linear.weight"):
            tensor[zero] = 0.0


def resize(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Interpolate an axis that is a flattened square grid, bicubically; a leading class-token entry stays."""
    if tensor.shape[dim] == size:
        return tensor
    last = tensor.movedim(dim, -1)
    extra = _extra(last.shape[-1])
    head, grid = last[..., :extra], last[..., extra:]
    side, target = round(grid.shape[-1] ** 0.5), round((size - extra) ** 0.5)
    if target**2 + extra != size:
        raise ValueError(f"{size} positions are not a square grid like the {tensor.shape[dim]} of the larger network")
    flat = grid.reshape(1, -1, side, side)
    flat = F.interpolate(flat, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat((head, flat.reshape(*grid.shape[:-1], target**2)), -1).movedim(-1, dim)


def _extra(size: int) -> int:
    """1 if the axis holds a class token before the square grid, else 0."""
    return 0 if round(size**0.5) ** 2 == size else 1


def significant(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Without fixed axes of size 1: a 1x1 convolution's weight reads like a linear layer's."""
    return tuple(a for a in axes if not (isinstance(a, Width) and a.rule == "fixed" and a.size == 1 and not a.name))


def _is(axis: Axis, name: str) -> bool:
    return isinstance(axis, Width) and axis.name == name
