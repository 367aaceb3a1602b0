"""Weights for any network of a family from any other one: narrower here, wider there, of other depth and grid."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.slicing import Origin, grow, resize, significant
from pruning.units import Scores, cascades
from search_spaces import Arch
from search_spaces.gates import gates_of
from search_spaces.layers import ConvNorm, Linear, LinearNorm
from search_spaces.network import Network
from search_spaces.registry import FAMILIES, Family
from search_spaces.widths import GROWN, NEW, Axis, Cat, Each, Entry, Width, width_table

BLOCK = re.compile(r"(?:stages\.\d+\.)?blocks\.\d+")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
OUTPUTS = ("proj", "fc2", "branch")
"""The last layer of a residual branch."""


def transfer(
    parent: Arch,
    weights: Mapping[str, Tensor],
    child: Arch,
    scores: Scores | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """A state dict for `child` out of the parent's, for any two Archs of one family.

    - Blocks are matched stage by stage, in order, so that most branches agree, then settings; among equal matches the
      earliest blocks are: a shorter stage keeps its first blocks, new ones come last.
    - A block, or a branch of one, that the parent has not is untrained and silent: it begins as the identity.
    - A narrower width keeps its most important units by `scores`, in their order. Without scores it keeps its first:
      that costs nothing and suits a parent in order of importance; for another one, `pruning.importance.score` gives
      scores once for all its children. Heads of a cascade go from the last. SepViT's heads and values are always the
      first, and its stage widths follow them, as the inner residual ties the two.
    - A wider width begins its new units as `slice_weights` does: they write at random (keys zero) and are read with
      weight zero. So do new heads. Where attention splits a stage's width (EfficientViT, SHViT), units go to the part
      that they were in.
    - Kernels are cropped or padded with zeros; bias tables, positions and window tokens resized; the queries take up
      another attention scale; a second classifier copies the first; one for other classes is untrained.

    The outputs are the parent's where the child only adds, but for: stage widths (and SepViT's inner ones) under a
    LayerNorm or GroupNorm, whose statistics change, or with token dropping, whose ranking does; EfficientViT's chunks
    of another number of heads; other grids and windows; a SepViT attention with windows for one without, or back (the
    two sum other terms: its projection is halved or doubled); a patch embedding of another size, which is untrained.

    Args:
        weights: the parent's state dict.
        scores: importance by the parent's width names, (units,) or (heads, units); others than widths are ignored.
        generator: source of random weights; None is the global one.

    Returns:
        One tensor per name of the child, on the CPU, none of which shares memory with `weights`.

    Raises:
        ValueError: another family, or scores that are not of the parent's widths.
    """
    if parent.family != child.family:
        raise ValueError(f"a {child.family} network cannot take the weights of a {parent.family} one")
    if generator is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return transfer(parent, weights, child, scores)
    ours, theirs = _layout(child), _layout(parent)
    names = _sources(ours, theirs)
    units = _Units(ours, theirs, names, scores or {})
    state = {}
    for name, entry in ours.entries.items():
        source = theirs.entries.get(names[name])
        found = None if source is None else _taken(entry, source, weights[source.name].cpu(), units)
        state[name] = _fresh(ours, entry) if found is None else found
    _silence(state, ours, theirs, names)
    _rescale(state, ours, theirs, names)
    return state


def transfer_origins(parent: Arch, child: Arch, scores: Scores | None = None) -> dict[str, Origin]:
    """Where `transfer` takes the units of the child's tensors from; those that the parent has nothing of are left out,
    and so are layers whose input is the sum of another number of terms."""
    ours, theirs = _layout(child), _layout(parent)
    names = _sources(ours, theirs)
    units, found = _Units(ours, theirs, names, scores or {}), {}
    for name, entry in ours.entries.items():
        source = theirs.entries.get(names[name])
        if source is None or not entry.axes or ours.terms.get(name) != theirs.terms.get(source.name):
            continue
        axis, parents = entry.axes[0], source.axes[0]
        if isinstance(axis, Width) and axis.rule != "slice" and axis.size != parents.size:
            continue
        gather = units.gather(axis, parents)
        ratio = theirs.scales.get(source.name, 1.0) / ours.scales.get(name, theirs.scales.get(source.name, 1.0))
        factor = None if ratio == 1 else np.where(_queries(axis), ratio, 1.0)
        found[name] = Origin(source.name, np.arange(axis.size) if gather is None else gather[1], factor)
    return found


Block = tuple[frozenset[str], Mapping[str, Any]]
"""A block's residual branches, and its settings by their path in its document."""


@dataclass(frozen=True)
class _Layout:
    """An Arch's table, taken apart."""

    family: Family[Any]
    arch: Arch
    model: Network
    """On the meta device."""
    entries: Mapping[str, Entry]
    """By name."""
    widths: Mapping[str, Width]
    """By name."""
    branches: tuple[str, ...]
    """Paths of the residual branches."""
    blocks: Mapping[str, list[Block]]
    """Path of each list of blocks -> its blocks."""
    cascades: Collection[str]
    """Names of the widths of heads that go from the last."""
    scales: Mapping[str, float]
    """Name of each tensor that writes queries -> the attention's scale."""
    terms: Mapping[str, int]
    """Name of a layer's weight -> of how many terms its input is the sum."""


@functools.lru_cache(maxsize=16)
def _layout(arch: Arch) -> _Layout:
    family = FAMILIES[arch.family]
    with torch.device("meta"):
        model = family.build(arch)
    table, gates = width_table(model), gates_of(model)
    branches = tuple(gate.branch for gate in gates.values() if gate.branch is not None)
    raw = arch.model_dump(mode="json")
    blocks: dict[str, list[Block]] = {}
    for prefix, stage in [(f"stages.{i}.", s) for i, s in enumerate(raw.get("stages", ()))] or [("", raw)]:
        path = f"{prefix}blocks"
        inside = [
            frozenset(b.removeprefix(f"{path}.{i}.") for b in branches if b.startswith(f"{path}.{i}."))
            for i in range(len(stage["blocks"]))
        ]
        blocks[path] = list(zip(inside, (dict(_leaves(b)) for b in stage["blocks"]), strict=True))
    scales: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear | LinearNorm | ConvNorm) and module.query_scale is not None:
            last = path if isinstance(module, Linear) else f"{path}.norm"
            scales |= {f"{last}.weight": module.query_scale, f"{last}.bias": module.query_scale}
    return _Layout(
        family=family,
        arch=arch,
        model=model,
        entries={entry.name: entry for entry in table.entries},
        widths=table.widths(),
        branches=branches,
        blocks=blocks,
        cascades=cascades(gates),
        scales=scales,
        terms={f"{path}.weight": layer.terms for path, layer in model.named_modules() if isinstance(layer, Linear)},
    )


def _leaves(part: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(part, dict | list):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        return [leaf for key, value in items for leaf in _leaves(value, f"{path}.{key}")]
    return [(path, part)]


def _sources(ours: _Layout, theirs: _Layout) -> dict[str, str]:
    """Name of each of the child's widths and tensors in the parent; no such name means that it is new."""
    origins: dict[str, str] = {}
    for path, blocks in ours.blocks.items():
        matches = matched(blocks, theirs.blocks.get(path, []))
        origins |= {f"{path}.{i}": f"{path}.{matches[i]}" if i in matches else "new" for i in range(len(blocks))}
    names = {}
    for name in [*ours.entries, *ours.widths]:
        block = BLOCK.match(name)
        names[name] = name if block is None else origins[block[0]] + name[block.end() :]
        if name.startswith("head.dist.") and name not in theirs.entries:
            names[name] = name.replace("dist", "cls", 1)
    return names


def matched(ours: list[Block], theirs: list[Block]) -> dict[int, int]:
    """Child's block -> parent's block, both ascending.

    A pair is worth its common branches, and at most one more where its settings are alike; the worth of all is the
    largest there is, and among equals the earliest blocks are taken.
    """
    worth = [[len(a & b) + _likeness(s, t) for b, t in theirs] for a, s in ours]
    best = np.zeros((len(ours) + 1, len(theirs) + 1))
    for i in reversed(range(len(ours))):
        for j in reversed(range(len(theirs))):
            best[i, j] = max(best[i + 1, j], best[i, j + 1], worth[i][j] + best[i + 1, j + 1])
    found, i, j = {}, 0, 0
    while i < len(ours) and j < len(theirs):
        if worth[i][j] + best[i + 1, j + 1] >= best[i, j] - 1e-9:
            found[i] = j
            i, j = i + 1, j + 1
        elif best[i, j + 1] >= best[i, j] - 1e-9:
            j += 1
        else:
            i += 1
    return found


def _likeness(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Mean over all settings: the ratio of two numbers, else whether they are equal."""

    def alike(a: Any, b: Any) -> float:
        numbers = isinstance(a, int | float) and isinstance(b, int | float) and min(a, b) > 0
        return min(a, b) / max(a, b) if numbers else float(a == b)

    both = [alike(value, theirs[path]) for path, value in ours.items() if path in theirs]
    return sum(both) / max(1, len(ours) + len(theirs) - len(both))


Gather = tuple[Tensor, np.ndarray]


class _Units:
    """Which of the parent's units the child's widths and axes take; NEW or another value of GROWN for new ones."""

    def __init__(self, ours: _Layout, theirs: _Layout, names: Mapping[str, str], scores: Scores) -> None:
        self._ours, self._theirs, self._names, self._scores = ours, theirs, names, scores
        self.tokens = ours.family.tokens
        self._chosen: dict[tuple[str, str], np.ndarray] = {}
        self._gathers: dict[tuple[int, int], Gather | None] = {}

    def gather(self, child: Axis, parent: Axis) -> Gather | None:
        """Positions of the parent's axis in the child's order, as an index and with new ones marked; None: all."""
        key = id(child), id(parent)  # of axes that the two layouts keep alive
        if key not in self._gathers:
            chosen = self._along(child, parent)
            same = len(chosen) == parent.size and (chosen == np.arange(parent.size)).all()
            self._gathers[key] = None if same else (torch.from_numpy(np.maximum(chosen, 0)), chosen)
        return self._gathers[key]

    def _along(self, child: Axis, parent: Axis, row: int | None = None) -> np.ndarray:
        if isinstance(child, Width) and isinstance(parent, Width):
            chosen = self._of(child, parent)
            chosen = chosen[row] if chosen.ndim == 2 else chosen
            return np.where(chosen == NEW, GROWN[child.grown], chosen)
        if isinstance(child, Cat) and isinstance(parent, Cat):
            starts = np.cumsum([0, *(part.size for part in parent.parts)])
            runs = [
                _shifted(start, self._along(c, p, row))
                for start, c, p in zip(starts, child.parts, parent.parts, strict=False)
            ]
            return np.concatenate([*runs, *map(_all_new, child.parts[len(runs) :])])
        if isinstance(child, Each) and isinstance(parent, Each):
            runs = [
                _all_new(child.inner)
                if head < 0
                else _shifted(head * parent.inner.size, self._along(child.inner, parent.inner, int(head)))
                for head in self._of(child.outer, parent.outer)
            ]
            return np.concatenate(runs)
        raise TypeError(f"the axes of {child} and {parent} differ in structure")

    def _of(self, child: Width, parent: Width) -> np.ndarray:
        """The parent's units in the child's order, (units,) or (the parent's heads, units)."""
        key = child.name, parent.name
        if key not in self._chosen:
            self._chosen[key] = self._choose(child, parent)
        return self._chosen[key]

    def _choose(self, child: Width, parent: Width) -> np.ndarray:
        if child.rule == "crop":
            centred = np.arange(child.size) + (parent.size - child.size) // 2
            return np.where(centred < parent.size, np.maximum(centred, NEW), NEW)
        if child.part_of is not None and parent.part_of is not None:
            (whole, start), (theirs, begins) = child.part_of, parent.part_of
            units = self._of(self._ours.widths[whole], self._theirs.widths[theirs])[start : start + child.size]
            return np.where((units >= begins) & (units < begins + parent.size), units - begins, NEW)
        values = None if self._first(parent.name) else self._scores.get(parent.name)
        values = np.zeros(parent.size) if values is None else np.asarray(values)
        values = values[0] if values.ndim == 2 and len(values) == 1 else values
        if values.shape[-1:] != (parent.size,):
            raise ValueError(f"the scores of {parent.name} are not those of its {parent.size} units")
        if parent.name.endswith("embed"):
            return self._in_parts(child, parent, values)
        if child.size >= parent.size:
            return np.concatenate([np.arange(parent.size), np.full(child.size - parent.size, NEW)])
        return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., : child.size], axis=-1)

    def _first(self, name: str) -> bool:
        """Whether a width keeps its first units, whatever their importance."""
        return name.rpartition(".")[2] in self._ours.family.ordered or name in self._theirs.cascades

    def _in_parts(self, child: Width, parent: Width, values: np.ndarray) -> np.ndarray:
        """A stage's width: units stay in the parts that they are in, as far as there is room; then anywhere."""
        chosen = np.full(child.size, NEW)
        free = np.ones(parent.size, dtype=bool)
        for own, taken in self._pinned(child, parent):
            if chosen[own] == NEW and free[taken]:
                chosen[own], free[taken] = taken, False
        ours, theirs = self._membership(child, parent)
        kinds, wanted = np.unique(ours, axis=0), np.unique(theirs, axis=0)
        pairs = [((a != b).sum(), i, j) for i, a in enumerate(kinds) for j, b in enumerate(wanted)]
        for _, i, j in sorted(pairs):
            room = np.flatnonzero((ours == kinds[i]).all(1) & (chosen == NEW))
            units = np.flatnonzero((theirs == wanted[j]).all(1) & free)
            units = units[np.argsort(-values[units], kind="stable")[: len(room)]]
            chosen[room[: len(units)]], free[units] = np.sort(units), False
        return chosen

    def _membership(self, child: Width, parent: Width) -> tuple[np.ndarray, np.ndarray]:
        """Which parts that both have each unit of the child and of the parent is in, (units, 1 + parts)."""
        parts = set()
        for name, width in self._ours.widths.items():
            other = self._theirs.widths.get(self._names[name])
            if other is not None and other.part_of is not None and width.part_of is not None:
                (whole, start), (_, begins) = width.part_of, other.part_of
                if whole == child.name:
                    parts.add((start, width.size, begins, other.size))
        ours, theirs = np.arange(child.size), np.arange(parent.size)
        inside = [((a <= ours) & (ours < a + n), (b <= theirs) & (theirs < b + m)) for a, n, b, m in sorted(parts)]
        none = np.zeros_like(ours, dtype=bool), np.zeros_like(theirs, dtype=bool)
        our_columns, their_columns = zip(none, *inside, strict=True)
        return np.stack(our_columns, 1), np.stack(their_columns, 1)

    def _pinned(self, child: Width, parent: Width) -> list[tuple[int, int]]:
        """(The child's channel, the parent's), so that an inner residual of the stage's first attention adds to each
        inner channel what it did."""
        sources = self._ours.family.inner_sources
        if sources is None:
            return []
        stage = child.name.removesuffix(".embed")
        for i in range(len(self._ours.blocks.get(f"{stage}.blocks", ()))):
            entry = self._ours.entries.get(f"{stage}.blocks.{i}.attn.proj.weight")
            source = entry and self._theirs.entries.get(self._names[entry.name])
            if entry and source:
                inner = self._along(entry.axes[1], source.axes[1])
                ours, theirs = (
                    sources(layout.arch, int(stage.removeprefix("stages.")), int(e.name.split(".")[3]))
                    for layout, e in ((self._ours, entry), (self._theirs, source))
                )
                kept = np.flatnonzero(inner >= 0)
                pairs = zip(ours[kept].tolist(), theirs[inner[kept]].tolist(), strict=True)
                return [(a, b) for a, b in pairs if a >= 0 and b >= 0]
        return []


def _shifted(start: int, chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen < 0, chosen, chosen + start)


def _all_new(axis: Axis) -> np.ndarray:
    if isinstance(axis, Width):
        return np.full(axis.size, GROWN[axis.grown])
    if isinstance(axis, Cat):
        return np.concatenate([_all_new(part) for part in axis.parts])
    return np.tile(_all_new(axis.inner), axis.outer.size)


def _taken(entry: Entry, source: Entry, whole: Tensor, units: _Units) -> Tensor | None:
    """The child's tensor out of the parent's; None where an axis that never changes has."""
    axes = list(zip(significant(entry.axes), significant(source.axes), strict=True))
    if any(isinstance(a, Width) and a.rule == "fixed" and a.size != b.size for a, b in axes):
        return None
    tensor = whole.reshape([axis.size for _, axis in axes])
    std = None
    for dim, (axis, theirs) in enumerate(axes):
        if isinstance(axis, Width) and axis.rule in ("resize", "fixed"):
            tensor = resize(tensor, dim, axis.size) if axis.rule == "resize" else tensor
            continue
        gather = units.gather(axis, theirs)
        if gather is None:
            continue
        index, chosen = gather
        tensor = tensor.index_select(dim, index)
        if (chosen < 0).any():
            std = whole.std(correction=0).item() if std is None else std
            if entry.name.rpartition(".")[2] in units.tokens:
                new = torch.from_numpy(np.flatnonzero(chosen < 0))
                values = tensor.movedim(dim, 0)
                values[new] = torch.randn(len(new), *values.shape[1:], dtype=values.dtype) * std
            else:
                grow(tensor, entry.name, dim, chosen, std, None)
    tensor = tensor.reshape(entry.shape)
    return tensor.clone() if tensor.data_ptr() == whole.data_ptr() else tensor


def _fresh(layout: _Layout, entry: Entry) -> Tensor:
    """A tensor as in an untrained network."""
    path, _, last = entry.name.rpartition(".")
    module = layout.model.get_submodule(path)
    tensor = torch.zeros(entry.shape, dtype=getattr(module, last).dtype)
    if isinstance(module, NORMS):
        return tensor.fill_(last in ("weight", "running_var"))
    if isinstance(module, nn.Linear) and last == "weight":
        nn.init.trunc_normal_(tensor, std=0.02)
    if isinstance(module, nn.Conv2d) and last == "weight":
        nn.init.kaiming_uniform_(tensor, a=5**0.5)
    return tensor


def _silence(state: dict[str, Tensor], ours: _Layout, theirs: _Layout, names: Mapping[str, str]) -> None:
    """Zero what new residual branches, position encodings and squeeze-excites add."""

    def zero(path: str) -> None:
        for name in (f"{path}.norm.weight", f"{path}.weight", f"{path}.bias"):
            if name in state and names[name] not in theirs.entries:
                state[name].zero_()

    for branch in ours.branches:
        for output in OUTPUTS:
            zero(f"{branch}.{output}")
    for name in ours.entries:
        if name.endswith(".position.branch.weight"):
            zero(name.removesuffix(".weight"))
        if name.endswith(".se.fc2.weight") and names[name] not in theirs.entries:
            zero(name.removesuffix(".weight"))
            state[name.replace(".se.fc2.", ".project.linear.")] *= 2  # sigmoid(0) is a half


def _rescale(state: dict[str, Tensor], ours: _Layout, theirs: _Layout, names: Mapping[str, str]) -> None:
    """Make good a change of an attention's scale, and of the number of terms that a projection reads the sum of."""
    for name, scale in ours.scales.items():
        parents = theirs.scales.get(names.get(name, ""), scale)
        if scale != parents:
            state[name][torch.from_numpy(_queries(ours.entries[name].axes[0]))] *= parents / scale
    for name, terms in ours.terms.items():
        before = theirs.terms.get(names[name], terms)
        if terms != before:
            state[name] *= before / terms


def _queries(axis: Axis) -> np.ndarray:
    if isinstance(axis, Width):
        return np.full(axis.size, axis.name.endswith("qk") and axis.grown == "random")
    if isinstance(axis, Cat):
        return np.concatenate([_queries(part) for part in axis.parts])
    return np.tile(_queries(axis.inner), axis.outer.size)
