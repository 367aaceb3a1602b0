"""What can be pruned or grown in a network: its knobs, and what is left of it at given settings of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from search_spaces import Arch, ArchError
from search_spaces.gates import Gate, gates_of
from search_spaces.registry import FAMILIES
from search_spaces.widths import NEW, Each, Entry, Table, Width, width_table, widths_of
from search_spaces.widths import Kind as WidthKind

Kind = WidthKind | Literal["blocks"]
KNOB_KINDS: dict[Kind, str] = {
    "ffn": "hidden units of FFNs, patch merging and squeeze-excite",
    "qk": "query and key dims",
    "v": "value dims",
    "heads": "attention heads",
    "embed": "stage widths and the stem",
    "blocks": "whole residual branches, and blocks left without one",
}
Scores = Mapping[str, np.ndarray]
"""Importance by width name, (units,) or (heads, units), and by the path of a residual branch, ()."""


@dataclass(frozen=True)
class Knob:
    """One thing that can change its size by itself: a run of units of a width, or a residual branch."""

    width: str
    """The width's name, or the path of the residual branch."""
    kind: Kind
    size: int
    """Number of units; 1 for a branch."""
    start: int = 0
    """First unit of the run: a stage's width is divided where attention heads read parts of it."""
    rows: int = 1
    """Number of heads that rank their units apart."""
    follows: tuple[str, ...] = ()
    """Widths that change with it."""
    from_last: bool = False
    """Whether units go from the last one, whatever their importance."""
    grows: bool = False
    """Whether units can be added without changing the outputs."""

    @property
    def name(self) -> str:
        return self.width if not self.start else f"{self.width}[{self.start}:]"

    def importance(self, scores: Scores) -> np.ndarray:
        """Scores of this knob's units, (rows, size)."""
        return np.atleast_1d(scores[self.width])[..., self.start : self.start + self.size].reshape(self.rows, -1)

    def ranking(self, scores: Scores) -> np.ndarray:
        """Its units from the least important up, (rows, size), numbered from `start`."""
        values = self.importance(scores)
        if self.from_last:
            return np.arange(self.size)[::-1].reshape(1, -1)
        return np.argsort(values, axis=1, kind="stable")


@dataclass(frozen=True)
class Anatomy:
    """A network taken apart."""

    arch: Arch
    table: Table
    gates: Mapping[str, Gate]
    """By module name; on the meta device."""
    knobs: tuple[Knob, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every width by name."""
        return {name: width.size for name, width in self.table.widths().items()}


def anatomy(arch: Arch) -> Anatomy:
    """Take a network apart, on the meta device.

    Residual branches that the network cannot do without (attention that ranks tokens) are no knobs.
    """
    with torch.device("meta"):
        model = FAMILIES[arch.family].build(arch)
    table = width_table(model)
    gates = gates_of(model)
    return Anatomy(arch, table, gates, (*_widths(arch, table, gates), *_branches(arch, gates)))


def _widths(arch: Arch, table: Table, gates: Mapping[str, Gate]) -> Iterator[Knob]:
    normed = {width.name for entry in table.entries if _is_norm(entry) for width in widths_of(entry.axes[0])}
    rows = {gate.width.name: gate.axis.outer.size for gate in gates.values() if isinstance(gate.axis, Each)}
    in_cascade = cascades(gates)
    drops_tokens = any(rate < 1 for rate in keep_rates(arch.model_dump(mode="json")))
    parts = _parts(table)
    for width in table.widths().values():
        if width.kind is None:
            continue
        runs = parts.get(width.name, [])
        edges = sorted({0, width.size}.union(*({run.start, run.stop} for run, _ in runs)))
        for start, end in itertools.pairwise(edges):
            follows = tuple(part.name for run, part in runs if run.start <= start and end <= run.stop)
            touches_norm = normed & {width.name, *follows}
            yield Knob(
                width=width.name,
                kind=width.kind,
                size=end - start,
                start=start,
                rows=rows.get(width.name, 1),
                follows=follows,
                from_last=width.name in in_cascade,
                grows=width.kind != "heads"
                and not touches_norm
                and not (width.name.endswith("embed") and drops_tokens),
            )


def _parts(table: Table) -> dict[str, list[tuple[range, Width]]]:
    """Name of a width -> (run of its units, the width that these units are)."""
    found: dict[str, list[tuple[range, Width]]] = {}
    for part in table.widths().values():
        if part.part_of is not None:
            whole, start = part.part_of
            found.setdefault(whole, []).append((range(start, start + part.size), part))
    return found


def cascades(gates: Mapping[str, Gate]) -> set[str]:
    """Names of the widths of heads that each add the output of the one before, and so go from the last."""
    return {gate.heads[0].name for gate in gates.values() if gate.heads is not None and gate.heads[1] is not None}


def _branches(arch: Arch, gates: Mapping[str, Gate]) -> Iterator[Knob]:
    for gate in gates.values():
        if gate.branch is None:
            continue
        try:
            arch.without([gate.branch])
        except ArchError:
            continue
        yield Knob(width=gate.branch, kind="blocks", size=1)


def _is_norm(entry: Entry) -> bool:
    """Whether it is a LayerNorm or GroupNorm: a vector that multiplies at positions."""
    return len(entry.axes) == 1 and entry.positions > 0


def keep_rates(part: object) -> Iterator[float]:
    """Yield every token keep rate of an Arch document."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from [value] if key == "keep_rate" else keep_rates(value)
    elif isinstance(part, list):
        for value in part:
            yield from keep_rates(value)


def with_all_tokens(arch: Arch) -> Arch:
    """The same network, which takes the same weights, with no token dropped or merged."""
    return Arch.from_json(json.dumps(_all_kept(arch.model_dump(mode="json"))))


def _all_kept(part: Any) -> Any:
    if isinstance(part, dict):
        known = {"keep_rate": 1.0, "fuse": False, "merge": False}
        return {key: known[key] if key in known else _all_kept(value) for key, value in part.items()}
    return [_all_kept(value) for value in part] if isinstance(part, list) else part


def equal_scores(parts: Anatomy) -> Scores:
    """Scores that value all units alike."""
    sizes = parts.sizes
    return {knob.width: np.ones((knob.rows, sizes.get(knob.width, 1))) for knob in parts.knobs}


Settings = Mapping[str, int]
"""Size of each knob by name; a knob that is not named keeps its size, 0 removes a residual branch."""


@dataclass(frozen=True)
class Cut:
    """A network at other settings of its knobs, as `slice_weights` wants it."""

    arch: Arch
    select: Mapping[str, np.ndarray]
    """Name of each width that changes -> its units in the whole network, (units,) or (heads, units)."""
    blocks: Mapping[str, str]
    """Path of each block -> its path in the whole network."""


def cut(parts: Anatomy, scores: Scores, settings: Settings) -> Cut:
    """The Arch at these settings; each knob keeps its most important units, and new ones follow them."""
    chosen: dict[str, list[tuple[int, np.ndarray]]] = {}
    changed, gone = set(), []
    for knob in parts.knobs:
        size = settings.get(knob.name, knob.size)
        if knob.kind == "blocks":
            gone += [knob.width] if size == 0 else []
            continue
        kept = np.sort(knob.ranking(scores)[:, max(0, knob.size - size) :], axis=1) + knob.start
        new = np.full((knob.rows, max(0, size - knob.size)), NEW)
        chosen.setdefault(knob.width, []).append((knob.start, np.concatenate([kept, new], axis=1)))
        if size != knob.size:
            changed.add(knob.width)
    select = {}
    for width in changed:
        units = np.concatenate([run for _, run in sorted(chosen[width], key=lambda pair: pair[0])], axis=1)
        select[width] = units if len(units) > 1 else units[0]
    resized = parts.arch.resized(select)
    arch, blocks = resized.without(gone)
    return Cut(arch, select, blocks)
