"""Widths and importance of a network's parts, as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning.units import Anatomy, Scores
    from search_spaces import Arch


def importance_rows(parts: Anatomy, scores: Scores) -> list[dict[str, Any]]:
    """A row for each knob of the whole network: its units, their importance, and what they cost together."""
    from pruning.allocation import Costs

    costs = Costs(parts, "macs")
    rows = []
    for knob in parts.knobs:
        values = knob.importance(scores).sum(axis=0)
        rows.append(
            {
                "name": knob.name,
                "kind": knob.kind,
                "units": knob.size,
                "importance": float(values.sum()),
                "least": float(values.min()),
                "most": float(values.max()),
                "macs": -costs.difference(knob, -knob.size, parts.sizes, ()),
            }
        )
    return rows


def block_rows(before: Arch, after: Arch, origins: Mapping[str, str]) -> list[dict[str, Any]]:
    """Widths of every block of `before` and of what became of it, by the path it had; `after` is None where it went."""
    left = {origins.get(path, path): widths for path, widths in block_widths(after).items()}
    return [{"block": path, "before": widths, "after": left.get(path)} for path, widths in block_widths(before).items()]


def block_widths(arch: Arch) -> dict[str, dict[str, float]]:
    """embed, heads, qk and v (per head: means; in qk_range and v_range the least and the most), ffn (hidden units in
    all) and ratio (ffn / embed), by block path."""
    from search_spaces import table

    found: dict[str, dict[str, list[int]]] = {}
    sizes = {name: width.size for name, width in table(arch).widths().items()}
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
    rows = {}
    for block, widths in found.items():
        stage = stage_of(block)
        embed = sizes[f"{stage}.embed" if stage else "embed"]
        heads = widths.get("heads", [0])[0]
        each = {key: widths.get(key, [0]) for key in ("qk", "v")}
        ffn = sum(widths.get("ffn", []))
        rows[block] = {
            "embed": embed,
            "heads": heads,
            **{key: sum(of_heads) / len(of_heads) for key, of_heads in each.items()},
            **{f"{key}_range": [min(of_heads), max(of_heads)] for key, of_heads in each.items()},
            "ffn": ffn,
            "ratio": ffn / embed,
        }
    return rows


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
