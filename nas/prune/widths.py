"""Widths and importance of a network's parts, as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruning.units import Anatomy, Scores
    from search_spaces import Arch


@dataclass(frozen=True)
class Importance:
    """A knob (see `pruning.units.Knob`) of the whole network: what it is worth, and what it costs."""

    name: str
    kind: str
    """A key of `pruning.units.KNOB_KINDS`."""
    units: int
    importance: float
    """Of all its units together."""
    least: float
    """Importance of its least important unit."""
    most: float
    macs: float
    """Multiply-accumulates that the network would save without it."""


@dataclass(frozen=True)
class BlockWidths:
    """Widths of a block. qk and v: dims of a head, means over its heads."""

    embed: int
    heads: int
    qk: float
    v: float
    ffn: int
    """Hidden units of all its FFNs."""
    ratio: float
    """ffn over embed."""
    qk_range: tuple[int, int] | None = None
    """The least and the most of its heads; None in results of earlier versions."""
    v_range: tuple[int, int] | None = None

    def ends(self, name: str) -> tuple[float, float]:
        """The least and the most of a width, by its name here: of heads that differ two figures."""
        value: float = getattr(self, name)
        ends: tuple[float, float] | None = getattr(self, f"{name}_range", None)
        return ends or (value, value)


@dataclass(frozen=True)
class Block:
    """A block by the path it had before pruning. after: None where it was removed."""

    block: str
    before: BlockWidths
    after: BlockWidths | None


def importance_rows(parts: Anatomy, scores: Scores) -> list[Importance]:
    """A row for each knob of the whole network."""
    from pruning.allocation import Costs

    costs = Costs(parts, "macs")
    rows = []
    for knob in parts.knobs:
        values = knob.importance(scores).sum(axis=0)
        macs = -costs.difference(knob, -knob.size, parts.sizes, ())
        total, least, most = float(values.sum()), float(values.min()), float(values.max())
        rows.append(Importance(knob.name, knob.kind, knob.size, total, least, most, macs))
    return rows


def block_rows(before: Arch, after: Arch, origins: Mapping[str, str]) -> tuple[Block, ...]:
    """Every block of `before`, and what became of it. origins: paths in `after` -> paths in `before`, where they
    differ."""
    left = {origins.get(path, path): widths for path, widths in block_widths(after).items()}
    return tuple(Block(path, widths, left.get(path)) for path, widths in block_widths(before).items())


def block_widths(arch: Arch) -> dict[str, BlockWidths]:
    """Widths of every block, by its path."""
    from search_spaces import table

    sizes = {name: width.size for name, width in table(arch).widths().items()}
    return {block: _widths(block, found, sizes) for block, found in _by_block(sizes).items()}


def _by_block(sizes: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """Sizes of each block's widths, by what they are."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, size in sizes.items():
        *path, last = name.split(".")
        for i, part in enumerate(path):
            if part in ("blocks", "downsample"):
                block = ".".join(path[: i + (2 if part == "blocks" else 1)])
                key = {"hidden": "ffn"}.get(last, last)
                if last == "dim" and path[-2:-1] == ["heads"] and path[-1] != "0":
                    key = "v"  # in a cascade, what a head reads is as wide as the values of the head before it
                found.setdefault(block, {}).setdefault(key, []).append(size)
                break
    return found


def _widths(block: str, widths: Mapping[str, list[int]], sizes: Mapping[str, int]) -> BlockWidths:
    stage = stage_of(block)
    embed = sizes[f"{stage}.embed" if stage else "embed"]
    qk, v = (widths.get(key, [0]) for key in ("qk", "v"))
    ffn = sum(widths.get("ffn", []))
    return BlockWidths(
        embed=embed,
        heads=widths.get("heads", [0])[0],
        qk=sum(qk) / len(qk),
        v=sum(v) / len(v),
        ffn=ffn,
        ratio=ffn / embed,
        qk_range=(min(qk), max(qk)),
        v_range=(min(v), max(v)),
    )


def stage_of(path: str) -> str:
    """stages.1 of stages.1.blocks.0; nothing for a network without stages."""
    return ".".join(path.split(".")[:2]) if path.startswith("stages.") else ""


def group_of(width: str, kind: str) -> str:
    """Knobs whose latency is measured together: a kind within a stage; branches by what they are."""
    return " ".join(filter(None, (stage_of(width), kind, width.split(".")[-1] if kind == "blocks" else "")))


def half(size: int, kind: str, multiple_of: int) -> int:
    """Half of a width, on its multiples; the width itself where there is none."""
    step = 1 if kind == "heads" else multiple_of
    return min(size, max(step, size // 2 // step * step))
