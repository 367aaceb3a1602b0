"""What a report shows of a network's parts: lines and tables, worked out from a pruning's result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nas.prune.records import Parts, PruneResult
from nas.prune.savings import Saving, fixed, rates
from nas.prune.widths import Block, BlockWidths, Importance, group_of, stage_of
from nas.units import counted, listed

KINDS = {
    "ffn": "FFN, merging",
    "qk": "Q, K",
    "v": "V",
    "heads": "heads",
    "embed": "width",
    "blocks": "branches",
}
NAMED = 6  # more blocks than these are only counted


@dataclass(frozen=True)
class Change:
    """One width, or a sum of widths, before and after."""

    before: float
    after: float

    @property
    def direction(self) -> str:
        """gone, cut, grown, or nothing."""
        if self.before == self.after:
            return ""
        if not self.after:
            return "gone"
        return "cut" if self.after < self.before else "grown"


TOTALS: dict[str, Callable[[BlockWidths], float]] = {
    "Q and K dims": lambda widths: widths.heads * widths.qk,
    "V dims": lambda widths: widths.heads * widths.v,
    "attention heads": lambda widths: widths.heads,
    "FFN hidden units": lambda widths: widths.ffn,
}


def summary(result: PruneResult) -> tuple[list[str], list[str]]:
    """What was cut and what was grown, a line each."""
    rows = result.parts.blocks
    left = [row for row in rows if row.after is not None]
    lines: dict[str, list[str]] = {"cut": _removed(rows), "grown": []}
    for label, total_of in TOTALS.items():
        for direction, said in lines.items():
            changes = {row.block: c for row in left if (c := _change(row, total_of)).direction == direction}
            if changes:
                old, new = sum(c.before for c in changes.values()), sum(c.after for c in changes.values())
                merges = ", merges included" if any("downsample" in path for path in changes) else ""
                where = f"{counted(len(changes), 'block')}{merges}"
                said.append(f"{label} in {where}: {old:,.0f} → {new:,.0f} ({new / old:.2f}x)")
    for label, change in _other_changes(result):
        if change.direction:
            side = "grown" if change.direction == "grown" else "cut"
            lines[side].append(f"{label}: {change.before:,} → {change.after:,}")
    layers = result.parts.layers or ()
    narrowed = sum(layer.before != layer.after for layer in layers)
    if narrowed:
        lines["cut"].append(f"{narrowed} of {counted(len(layers), 'layer')} narrowed: see the table")
    return lines["cut"], lines["grown"]


def _removed(rows: Sequence[Block]) -> list[str]:
    """Which blocks, and which parts of the others, are gone, a line each."""
    lines = []
    left = [row for row in rows if row.after is not None]
    gone = [row.block for row in rows if row.after is None]
    if gone:
        total = sum("blocks" in row.block for row in rows)
        lines.append(f"{len(gone)} of {counted(total, 'block')} removed whole: {listed(gone, NAMED)}")
    for what, key in (("attention", "attention heads"), ("the FFN", "FFN hidden units")):
        lost = [row.block for row in left if _change(row, TOTALS[key]).direction == "gone"]
        if lost:
            where = counted(len(lost), "other block" if gone else "block")
            lines.append(f"{what} removed from {where}: {listed(lost, NAMED)}")
    return lines


def _change(row: Block, total: Callable[[BlockWidths], float]) -> Change:
    return Change(total(row.before), total(row.after) if row.after else 0)


def _other_changes(result: PruneResult) -> list[tuple[str, Change]]:
    """Widths that belong to no block: stages, the stem; and sums of what the blocks' rows do not hold."""
    old, new = result.before.arch, result.after.arch
    if not result.parts.blocks or old is None or new is None:
        return []
    return [*_stage_changes(old, new), *_summed_changes(old, new)]


def _stage_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Change]]:
    after = _stage_widths(new)
    stages = [
        (f"width of {stage or 'all blocks'}", Change(width, after[stage]))
        for stage, width in _stage_widths(old).items()
    ]
    stems = zip(old.get("stem", ()), new.get("stem", ()), strict=True)
    return stages + [(f"stem {i}", Change(a, b)) for i, (a, b) in enumerate(stems)]


def _summed_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Change]]:
    labels = {"squeezed": "squeeze-excite dims", "conv": "depthwise convolution branches"}
    return [(label, Change(_total(old, key), _total(new, key))) for key, label in labels.items()]


def _stage_widths(arch: Mapping[str, Any]) -> dict[str, int]:
    """The width of each stage by its path; that of all blocks, by "", of a network without stages."""
    if "stages" not in arch:
        return {"": arch["embed_dim"]}
    return {f"stages.{i}": stage["embed_dim"] for i, stage in enumerate(arch["stages"])}


def _total(document: object, key: str) -> int:
    """Sum of a field wherever it occurs in a document; what is on counts one, what is not there nothing."""
    if isinstance(document, dict):
        own = document.get(key)
        return (int(own) if isinstance(own, int) else 0) + sum(_total(item, key) for item in document.values())
    return sum(_total(item, key) for item in document) if isinstance(document, list) else 0


@dataclass(frozen=True)
class BlockLine:
    """A line of the blocks' table. has: None where the block is gone."""

    name: str
    had: BlockWidths
    has: BlockWidths | None
    qk: Change
    v: Change
    hidden: Change
    ratio: Change

    @property
    def gone(self) -> bool:
        return self.has is None

    @property
    def changed(self) -> bool:
        """Whether any width but the stage's has changed."""
        return self.has is None or replace(self.has, embed=self.had.embed, ratio=self.had.ratio) != self.had


@dataclass(frozen=True)
class Stage:
    """The blocks of a stage, whose name is "" in a network without stages."""

    name: str
    width: Change
    blocks: list[BlockLine]


def stages_of(result: PruneResult) -> list[Stage]:
    """The blocks' table: per stage its width, per block what it had and has."""
    if not result.parts.blocks or result.before.arch is None or result.after.arch is None:
        return []
    old, new = _stage_widths(result.before.arch), _stage_widths(result.after.arch)
    stages: dict[str, list[BlockLine]] = {stage: [] for stage in old}
    for row in result.parts.blocks:
        stage = stage_of(row.block)
        stages[stage].append(
            BlockLine(
                row.block.removeprefix(f"{stage}."),
                row.before,
                row.after,
                qk=_change(row, TOTALS["Q and K dims"]),
                v=_change(row, TOTALS["V dims"]),
                hidden=_change(row, TOTALS["FFN hidden units"]),
                ratio=_change(row, lambda widths: widths.ratio),
            )
        )
    return [Stage(stage, Change(old[stage], new[stage]), blocks) for stage, blocks in stages.items()]


# ---------------------------------------------------------------------------------- importance, costs


def place_of(row: Importance) -> str:
    """Where a knob is: its stage, the stem, its block in a network without stages, or the whole network."""
    path = row.name.split(".")
    if path[0] in ("stages", "blocks"):
        return ".".join(path[:2])
    return "stem" if path[0] == "stem" else "whole network"


def kinds_among(rows: Iterable[Importance]) -> list[str]:
    """The kinds there are, in their order."""
    present = {row.kind for row in rows}
    return [kind for kind in KINDS if kind in present]


def density_of(parts: Parts, rows: Iterable[Importance]) -> float | None:
    """Importance per cost of the knobs that cost anything; None where none does."""
    costs = [(row.importance, cost) for row in rows if (cost := _cost(parts, row))]
    return sum(importance for importance, _ in costs) / sum(cost for _, cost in costs) if costs else None


def _cost(parts: Parts, row: Importance) -> float:
    """What a knob costs: millions of MACs, or ms where those were measured."""
    if not parts.costs:
        return row.macs / 1e6
    group = group_of(row.name.partition("[")[0], row.kind)
    return row.macs * rates(parts.costs).get(group, 0.0) + fixed(parts.costs).get(group, 0.0)


@dataclass(frozen=True)
class Cell:
    """Knobs of one kind in one place."""

    importance: float
    density: float | None
    """Importance per cost; None where they cost nothing."""
    shade: float
    """0 to 1, by the density's logarithm."""


@dataclass(frozen=True)
class Place:
    """A line of the table of importance. cells: one a kind, None where the place has no such knob."""

    place: str
    cells: list[Cell | None]


def importance_table(parts: Parts) -> list[Place]:
    """Importance and density per place and kind."""
    kinds = kinds_among(parts.importance)
    places = list(dict.fromkeys(map(place_of, parts.importance)))
    groups = {
        (place, kind): [row for row in parts.importance if (place_of(row), row.kind) == (place, kind)]
        for place in places
        for kind in kinds
    }
    densities = {key: density_of(parts, found) for key, found in groups.items() if found}
    logs = [math.log(density) for density in densities.values() if density]
    low, high = min(logs, default=0.0), max(logs, default=1.0)

    def cell(key: tuple[str, str]) -> Cell | None:
        if not groups[key]:
            return None
        density = densities[key]
        shade = (math.log(density) - low) / (high - low or 1) if density else 0.0
        return Cell(sum(row.importance for row in groups[key]), density, shade)

    return [Place(place, [cell((place, kind)) for kind in kinds]) for place in places]


@dataclass(frozen=True)
class KindLine:
    """All knobs of a kind. least, mean, most: importance of one unit."""

    label: str
    units: int
    importance: float
    least: float
    mean: float
    most: float
    density: float | None


def importance_kinds(parts: Parts) -> list[KindLine]:
    """Per kind: how many units, their importance together and from the least to the most, their density."""
    lines = []
    for kind in kinds_among(parts.importance):
        rows = [row for row in parts.importance if row.kind == kind]
        units, total = sum(row.units for row in rows), sum(row.importance for row in rows)
        least, most = min(row.least for row in rows), max(row.most for row in rows)
        lines.append(KindLine(KINDS[kind], units, total, least, total / units, most, density_of(parts, rows)))
    return lines


@dataclass(frozen=True)
class CostLine:
    """What halving a group saved."""

    saving: Saving
    relative: float
    """Its ms per MAC over the whole network's."""
    share: float
    """Its ms per MAC over the dearest group's."""


def cost_lines(result: PruneResult) -> list[CostLine]:
    """Measured costs, the dearest by MACs first."""
    if result.before.latency_ms is None:
        return []
    mean = result.before.latency_ms / result.before.macs
    savings = sorted(result.parts.costs or (), key=lambda saving: -saving.rate)
    top = max((saving.rate for saving in savings), default=0) or 1
    return [CostLine(saving, saving.rate / mean, saving.rate / top) for saving in savings]
