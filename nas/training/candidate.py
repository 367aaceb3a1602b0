"""A network on the memory of a larger one: parts of its weights, gradients and running statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import UserError
from pruning.slicing import significant
from search_spaces import Arch
from search_spaces.registry import FAMILIES
from search_spaces.widths import Axis, Cat, Each, Entry, Width, width_table

View = Callable[[Tensor, int], Tensor]


def _whole(tensor: Tensor, dim: int) -> Tensor:
    return tensor


def _run(start: int, size: int, inner: View = _whole) -> View:
    return lambda tensor, dim: inner(tensor.narrow(dim, start, size), dim)


def _each(outer: int, size: int, heads: int, inner: View) -> View:
    return lambda tensor, dim: inner(tensor.unflatten(dim, (outer, size)).narrow(dim, 0, heads), dim + 1)


def _corner(start: int, side: int, corner: int) -> View:
    def view(tensor: Tensor, dim: int) -> Tensor:
        square: Tensor = tensor.narrow(dim, start, side * side).unflatten(dim, (side, side))
        return square.narrow(dim, 0, corner).narrow(dim + 1, 0, corner)

    return view


def pieces(ours: Axis, theirs: Axis) -> list[tuple[View, View]]:
    """Views of a candidate's axis and of the owner's that hold the same units: together, the candidate's whole axis.

    Raises:
        ValueError: the candidate's axis is larger, or of another structure.
    """
    if _sizes(ours) == _sizes(theirs):
        return [(_whole, _whole)]
    if isinstance(ours, Width) and isinstance(theirs, Width):
        if ours.size > theirs.size or ours.rule == "fixed":
            raise ValueError(f"{ours.name or 'a fixed axis'} is {ours.size}, the supernet has {theirs.size}")
        if ours.rule == "resize":
            side, corner = math.isqrt(theirs.size), math.isqrt(ours.size)
            first = theirs.size - side**2
            if ours.size - corner**2 != first:
                raise ValueError(f"{ours.name}: {ours.size} positions are no corner of {theirs.size}")
            token = [(_run(0, first), _run(0, first))] if first else []
            return [*token, (_corner(first, corner, corner), _corner(first, side, corner))]
        start = (theirs.size - ours.size) // 2 if ours.rule == "crop" else 0
        return [(_whole, _run(start, ours.size))]
    if isinstance(ours, Cat) and isinstance(theirs, Cat) and len(ours.parts) <= len(theirs.parts):
        found, start, begins = [], 0, 0
        for a, b in zip(ours.parts, theirs.parts, strict=False):
            found += [(_run(start, a.size, f), _run(begins, b.size, g)) for f, g in pieces(a, b)]
            start, begins = start + a.size, begins + b.size
        return found
    if isinstance(ours, Each) and isinstance(theirs, Each) and ours.outer.size <= theirs.outer.size:
        heads = ours.outer.size
        return [
            (_each(heads, ours.inner.size, heads, f), _each(theirs.outer.size, theirs.inner.size, heads, g))
            for f, g in pieces(ours.inner, theirs.inner)
        ]
    raise ValueError(f"the axes of {ours} and {theirs} differ in structure, or the supernet's is smaller")


def _sizes(axis: Axis) -> Any:
    if isinstance(axis, Width):
        return axis.size
    return tuple(map(_sizes, axis.parts)) if isinstance(axis, Cat) else (_sizes(axis.outer), _sizes(axis.inner))


class Candidate:
    """A network of an Arch on the owner's memory: `begin`, forward and backward passes of `model`, `finish`.

    own_statistics: BatchNorm has statistics of its own, not the owner's.
    """

    def __init__(
        self, arch: Arch, owner: nn.Module, entries: Mapping[str, Entry], own_statistics: bool = False
    ) -> None:
        with torch.device("meta"):
            self.model = FAMILIES[arch.family].build(arch)
        self.resolution = arch.resolution
        self._taken: tuple[list[Tensor], list[Tensor]] = [], []
        self._added: tuple[list[Tensor], list[Tensor]] = [], []
        self._written: tuple[list[Tensor], list[Tensor]] = [], []
        self._gradients: list[Tensor] = []
        parameters, buffers = dict(owner.named_parameters()), dict(owner.named_buffers())
        modules, device = dict(self.model.named_modules()), next(iter(parameters.values())).device
        for entry in width_table(self.model).entries:
            path, _, last = entry.name.rpartition(".")
            try:
                part = _Part(entry, entries[entry.name])
            except (ValueError, KeyError) as error:
                raise UserError(f"this {arch.family} is not part of the supernet: {entry.name}: {error}") from None
            if entry.trainable:
                modules[path]._parameters[last] = self._parameter(parameters[entry.name], part)
            elif own_statistics:
                modules[path]._buffers[last] = torch.zeros(entry.shape, dtype=buffers[entry.name].dtype, device=device)
            else:
                modules[path]._buffers[last] = self._buffer(buffers[entry.name], part)
        for module in modules.values():
            for name in module._non_persistent_buffers_set:
                module._buffers[name] = module._buffers[name].to(device)

    def _parameter(self, owned: nn.Parameter, part: _Part) -> nn.Parameter:
        memory, values = part.of(owned.detach())
        parameter = nn.Parameter(memory)
        assert owned.grad is not None
        parameter.grad, gradients = part.of(owned.grad)
        _extend(self._taken, values)
        _extend(self._added, [(theirs, mine) for mine, theirs in gradients])
        self._gradients += [parameter.grad] if gradients else []
        return parameter

    def _buffer(self, owned: Tensor, part: _Part) -> Tensor:
        memory, values = part.of(owned)
        _extend(self._taken, values)
        _extend(self._written, [(theirs, mine) for mine, theirs in values])
        return memory

    @torch.no_grad()
    def begin(self) -> None:
        """Bring what is copied up to date."""
        if self._taken[0]:
            torch._foreach_copy_(*self._taken)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the owner the gradients and running statistics of what is copied."""
        if self._added[0]:
            torch._foreach_add_(*self._added)
            torch._foreach_zero_(self._gradients)
        if self._written[0]:
            torch._foreach_copy_(*self._written)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) of any S -> (B, classes)."""
        logits: Tensor = self.model(resized(images, self.resolution))
        return logits


class _Part:
    """The part of an owner's tensor that a candidate's is.

    Raises:
        ValueError: the candidate's is larger, or of another structure.
    """

    def __init__(self, entry: Entry, owned: Entry) -> None:
        ours, theirs = significant(entry.axes), significant(owned.axes)
        self._shape, self._sizes = entry.shape, [axis.size for axis in theirs]
        self._flat = [axis.size for axis in ours]
        axes = [pieces(a, b) for a, b in zip(ours, theirs, strict=True)]
        self._views = [([f for f, _ in part], [g for _, g in part]) for part in itertools.product(*axes)]

    def of(self, owned: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The candidate's tensor in the owner's memory where one view can be it; else a tensor of zeros, and all pairs
        of (a part of it, the same part of the owner's)."""
        whole = owned.view(self._sizes)
        if len(self._views) == 1:
            try:
                return _seen(whole, self._views[0][1]).view(self._shape), []
            except RuntimeError:  # the strides do not allow this shape
                pass
        copy = torch.zeros(self._flat, dtype=owned.dtype, device=owned.device)
        return copy.view(self._shape), [(_seen(copy, mine), _seen(whole, theirs)) for mine, theirs in self._views]


def _seen(tensor: Tensor, views: Sequence[View]) -> Tensor:
    for dim in reversed(range(len(views))):
        tensor = views[dim](tensor, dim)
    return tensor


def _extend(lists: tuple[list[Tensor], list[Tensor]], pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for first, second in pairs:
        lists[0].append(first)
        lists[1].append(second)


def resized(images: Tensor, resolution: int) -> Tensor:
    """Images (B, 3, S, S) at S = `resolution`."""
    if images.shape[-1] == resolution:
        return images
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)
