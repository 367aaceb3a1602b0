"""The table that ties weights to widths.

A layer says at construction which widths index the axes of its parameters and buffers (`axes`) and at how many
positions its weight is applied (`positions`). `width_table` collects that from a built module (the meta device
is enough). Counting, slicing, growing and sharing weights all read this one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import nn

Rule = Literal["slice", "crop", "resize", "fixed"]
"""How a narrower width is taken from a wider one: "slice" takes units by index, "crop" the centre (kernels), "resize"
interpolates a square grid (bias tables; a leading class-token entry is kept apart), "fixed" must agree (classes, input
channels)."""
Kind = Literal["ffn", "qk", "v", "heads", "embed"]
"""What units are: hidden units of FFNs and the like, query and key dims, value dims, heads, channels of a stage."""
Growth = Literal["random", "zero", "positive"]
"""How new units begin where they write; where others read them they always begin at zero. "zero" is for keys, beside
random queries; "positive" is for units behind a ReLU that reads positive means of a whole image: at random they would
be silent for all images or none."""
Select = Mapping[str, np.ndarray]
"""Width name -> kept units, (units,) or (heads, units); `NEW` for units to be added."""


@dataclass(frozen=True)
class Width:
    """A named run of units."""

    name: str
    """Dotted path in the network. The last part is that of the field of the Arch that holds the size, but for
    `Arch.width_fields`; a stage's width is `embed`."""
    size: int
    rule: Rule = "slice"
    part_of: tuple[str, int] | None = None
    """(name, start) when these units are units start, start + 1, ... of another width."""
    grown: Growth = "random"
    kind: Kind | None = None
    """None: a width that does not change by itself."""


@dataclass(frozen=True)
class Cat:
    """Axes laid end to end, such as the q, k and v rows of one projection."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Each:
    """For each unit of `outer` (a head), a run of `inner`."""

    outer: Width
    inner: Axis

    @property
    def size(self) -> int:
        return self.outer.size * self.inner.size


Axis = Width | Cat | Each


NEW, NEW_ZERO, NEW_POSITIVE = -1, -2, -3
"""Entries of a selection: a unit that the larger network has not; `indices` makes it one of the others where a width's
new units begin so."""
GROWN: Mapping[Growth, int] = {"random": NEW, "zero": NEW_ZERO, "positive": NEW_POSITIVE}


def fixed(size: int) -> Width:
    """An axis that never changes (3x3 kernels, the 1 of a depthwise weight)."""
    return Width("", size, "fixed")


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer."""

    name: str
    axes: tuple[Axis, ...]
    positions: int
    """At how many positions of an image it multiplies; 0: it does not."""
    trainable: bool
    """Whether it is a parameter."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True)
class Product:
    """Attention's products q k^T and weights v; where tokens merge, those of keys with keys and of merged tokens."""

    name: str
    """Path of the module that computes them."""
    axis: Axis
    times: int
    """Multiplications for each unit of the axis."""


@dataclass(frozen=True)
class Table:
    """All entries of a network, and its attention products."""

    entries: tuple[Entry, ...]
    products: tuple[Product, ...]

    def params(self) -> int:
        """Number of trainable parameters."""
        return sum(int(np.prod(e.shape)) for e in self.entries if e.trainable)

    def macs(self) -> int:
        """Multiply-accumulates per image: weights times positions, plus attention products.

        LayerNorm and GroupNorm count 5 an element as in fvcore; BatchNorm (it folds away), softmax, biases and
        activations count zero.
        """
        return self.product_macs() + sum(int(np.prod(e.shape)) * e.positions for e in self.entries)

    def product_macs(self) -> int:
        """Multiply-accumulates of all `Product`s."""
        return sum(product.axis.size * product.times for product in self.products)

    def widths(self) -> dict[str, Width]:
        """Every named width by name."""
        found: dict[str, Width] = {}
        for entry in self.entries:
            for axis in entry.axes:
                found.update((w.name, w) for w in widths_of(axis) if w.name)
        return found


def width_table(model: nn.Module) -> Table:
    """Collect the table from a module built by a family.

    Raises:
        LookupError: a parameter or persistent buffer that no layer declared.
    """
    entries: dict[str, Entry] = {}
    products: list[Product] = []
    for prefix, module in model.named_modules():
        products += [Product(prefix, axis, times) for axis, times in getattr(module, "products", ())]
        for name, axes in getattr(module, "axes", {}).items():
            full = f"{prefix}.{name}" if prefix else name
            positions = getattr(module, "positions", 0) if name == "weight" else 0
            entries[full] = Entry(full, axes, positions, name in module._parameters)
    state = model.state_dict()
    for name in state:
        if name not in entries:
            raise LookupError(f"{name} is in no width table")
    return Table(tuple(entries[name] for name in state), tuple(products))


def places(axis: Axis, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Head (0 outside an `Each`) and unit of the width `name` at each position of an axis; -1 where it has none."""
    if isinstance(axis, Width):
        units, rows = np.full(axis.size, -1), np.zeros(axis.size, dtype=np.int64)
        if axis.name == name:
            units = np.arange(axis.size)
        elif axis.part_of is not None and axis.part_of[0] == name:
            units = axis.part_of[1] + np.arange(axis.size)
        return rows, units
    if isinstance(axis, Cat):
        found = [places(part, name) for part in axis.parts]
        return np.concatenate([rows for rows, _ in found]), np.concatenate([units for _, units in found])
    heads = np.repeat(np.arange(axis.outer.size), axis.inner.size)
    if axis.outer.name == name:
        return np.zeros_like(heads), heads
    return heads, np.tile(places(axis.inner, name)[1], axis.outer.size)


def indices(child: Axis, parent: Axis, select: Select, row: int | None = None) -> np.ndarray:
    """Which units of the parent's axis the child's axis takes, in the child's order; a value of GROWN for a new unit.

    select: parent width name -> kept units (1-D; or 2-D with one row per unit of the enclosing `Each`), NEW for a
    unit that the parent has not.

    Raises:
        ValueError: the axes differ in structure, or the child is larger than the parent.
    """
    if isinstance(child, Width) and isinstance(parent, Width):
        chosen = _chosen(child, parent, select)
        chosen = chosen[row] if chosen.ndim == 2 else chosen
        return np.where(chosen == NEW, GROWN[parent.grown], chosen)
    if isinstance(child, Cat) and isinstance(parent, Cat) and len(child.parts) <= len(parent.parts):
        starts = np.cumsum([0, *(part.size for part in parent.parts)])
        runs = [
            _shifted(start, indices(c, p, select, row))
            for start, c, p in zip(starts, child.parts, parent.parts, strict=False)
        ]
        return np.concatenate(runs)
    if isinstance(child, Each) and isinstance(parent, Each):
        outer = indices(child.outer, parent.outer, select)
        if (outer < 0).any():
            raise ValueError(f"{parent.outer.name}: only units within a head can be new")
        runs = [_shifted(o * parent.inner.size, indices(child.inner, parent.inner, select, int(o))) for o in outer]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)
    raise ValueError(f"the axes of {child} and {parent} differ in structure")


def _chosen(child: Width, parent: Width, select: Select) -> np.ndarray:
    if child.rule == "crop":
        start = (parent.size - child.size) // 2
        chosen = np.arange(start, start + child.size)
    elif parent.name in select:
        chosen = np.asarray(select[parent.name])
    elif parent.part_of is not None and parent.part_of[0] in select:
        start = parent.part_of[1]
        chosen = _shifted(-start, units_within(np.asarray(select[parent.part_of[0]]), start, parent.size))
    else:
        chosen = np.arange(child.size)
    ordered = np.sort(chosen)
    if chosen.dtype.kind not in "iu" or ((np.diff(ordered) == 0) & (ordered[..., 1:] != NEW)).any():
        raise ValueError(f"{parent.name}: a selection is a list of distinct unit numbers")
    if chosen.shape[-1] != child.size or (chosen.size and (chosen.min() < NEW or chosen.max() >= parent.size)):
        raise ValueError(f"{child.name or 'a fixed axis'}: cannot take {child.size} units out of {parent.size}")
    return chosen


def units_within(chosen: np.ndarray, start: int, size: int) -> np.ndarray:
    """Give the part of an ascending selection that falls on units start .. start + size; new units follow the unit
    before them."""
    return chosen[boundary(chosen, start) : boundary(chosen, start + size)]


def boundary(chosen: np.ndarray, unit: int) -> int:
    """Count the entries of an ascending selection before `unit`, new ones with the unit they follow."""
    beyond = np.flatnonzero(chosen >= unit)
    return 0 if unit == 0 else int(beyond[0]) if beyond.size else len(chosen)


def _shifted(start: int, chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen < 0, chosen, chosen + start)


def resized_tensors(model: nn.Module) -> set[str]:
    """Names of the parameters whose size follows the resolution: bias tables, positions, tokens of windows."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, axes in getattr(module, "axes", {}).items()
        if any(width.rule == "resize" for axis in axes for width in widths_of(axis))
    }


def widths_of(axis: Axis) -> Iterator[Width]:
    """All widths along an axis, in order."""
    if isinstance(axis, Width):
        yield axis
    elif isinstance(axis, Cat):
        for part in axis.parts:
            yield from widths_of(part)
    else:
        yield axis.outer
        yield from widths_of(axis.inner)
