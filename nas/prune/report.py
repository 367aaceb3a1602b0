"""A pruning's folder for people and other tools: prune.json and report.html.

Everything is drawn from the one JSON-able document that `nas.prune.run` hands over; nothing is measured here.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.export.card import CLASSIFY
from nas.files import replace_file
from nas.prune.request import show
from nas.prune.savings import rates, why_not
from nas.prune.widths import group_of, stage_of
from nas.prune.words import ACCURACIES, Doc, control_words, next_steps, passes, tuning_words
from nas.report.figures import COLOURS, INK, MARKERS, SOFT, new_figure, plain_axes, png_of
from nas.report.page import conditions, duration, render, wall_seconds
from nas.units import counted, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {
    "ffn": "FFN, merging",
    "qk": "Q, K",
    "v": "V",
    "heads": "heads",
    "embed": "width",
    "blocks": "branches",
}
FILES = {
    "arch.json": "the pruned network's widths; every verb takes it",
    "model.safetensors": "its weights",
    "model.onnx": "the same as ONNX, ready to run",
    "preprocess.json": "how an image becomes its input",
    "labels.txt": "its classes",
    "prune.json": "every figure of this page",
    "report.html": "this page",
    "state": "what lets the same command go on, or answer again",
}
NAMED = 6  # more blocks than these are only counted
BEFORE, CUT, GROWN, SAME = "#d3d9df", "#0072B2", "#D55E00", "#9aa5af"  # told apart by colour-blind readers too


def write_report(folder: Path, data: Doc) -> None:
    """Write prune.json and report.html into `folder`, each replaced in one step; without latencies, no report.html.

    Args:
        folder: the pruning's folder, which exists.
        data: the pruning's result; latencies in ms, accuracies in percent. A network outside the families has
            `layers` ({name, before, after}: widths) and empty `blocks` and `importance`.

    Raises:
        OSError: the folder cannot be written; what stood there before is untouched.
    """
    replace_file(folder / "prune.json", json.dumps(data, indent=1).encode())
    if data["after"]["latency_ms"] is None:
        (folder / "report.html").unlink(missing_ok=True)
    else:
        replace_file(folder / "report.html", _html(folder, data).encode())


# ---------------------------------------------------------------------------------- what the page says


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


def _html(folder: Path, data: Doc) -> str:
    before, after = data["before"], data["after"]
    metric = data["budget"]["metric"]
    spent = sum(data["phases"].values())
    cut, grown = _summary(data)
    importance, kinds = _importance_table(data), _importance_kinds(data)
    shown = {
        "layers": data.get("layers", []),
        "conditions": conditions(data["settings"]),
        "waiting": data.get("waiting"),
        "speed": _speed(before, after, bool(data.get("waiting"))),
        "macs": Change(before["macs"], after["macs"]),
        "params": Change(before["params"], after["params"]),
        "amount": lambda value: show(metric, value),
        "factor": _factor,
        "overlap": _overlap,
        "accuracies": ACCURACIES,
        "tuning_words": tuning_words(data) if data.get("tuning") else None,
        "control_words": control_words(data["control"]) if data["control"] else None,
        "trained": passes(data["trained_images"], data["data"]["train"]),
        "cut": cut,
        "grown": grown,
        "gone": [row["block"] for row in data["blocks"] if row["after"] is None],
        "stages": _stages(data),
        "reallocation_plot": _picture(_reallocation_plot(data)) if data["blocks"] else None,
        "importance_plot": _picture(_importance_plot(data)) if data["importance"] else None,
        "importance_table": importance,
        "importance_kinds": kinds,
        "density_power": _power(cell["density"] for row in importance for cell in row["cells"] if cell),
        "importance_power": _power(row["importance"] for row in data["importance"]),
        "unit_power": _power(row["mean"] for row in kinds),
        "cost_unit": "ms" if data.get("costs") else "MMAC",
        "costs": _costs(data),
        "breakdown": [
            {"phase": phase, "seconds": seconds, "share": seconds / spent}
            for phase, seconds in sorted(data["phases"].items(), key=lambda item: -item[1])
        ],
        "spent": duration(spent),
        "wall": duration(wall_seconds(data)),
        "files": {name: what for name, what in FILES.items() if name == "report.html" or (folder / name).exists()},
        "next_steps": next_steps(folder, data),
    }
    return render(Path(__file__).with_suffix(".html"), {**data, **shown, "classify": CLASSIFY})


def _speed(before: Doc, after: Doc, waiting: bool) -> dict[str, Any]:
    """How many times faster, the range that the intervals' ends allow, and the verdict in words.

    waiting: the latencies are waiting times, of which there is none.
    """
    (old_low, old_high), (new_low, new_high) = before["ci"], after["ci"]
    factor = before["latency_ms"] / after["latency_ms"]
    tie = not waiting and _overlap(before, after, "ci")
    words = f"{factor:.2f}x faster" if factor > 1 else f"{1 / factor:.2f}x slower"
    if tie:
        words = "Not measurably faster (a tie)"
    if waiting:
        words = "Waiting times, not speed"
    return {"factor": factor, "low": old_low / new_high, "high": old_high / new_low, "tie": tie, "words": words}


def _overlap(one: Doc, other: Doc, key: str = "top1_ci") -> bool:
    return one[key][0] <= other[key][1] and other[key][0] <= one[key][1]


def _factor(change: Change) -> str:
    """2.00x fewer, 1.20x more, as many."""
    if change.before == change.after:
        return "as many"
    if change.after < change.before:
        return f"{change.before / change.after:.2f}x fewer"
    return f"{change.after / change.before:.2f}x more"


TOTALS: dict[str, Callable[[Doc], float]] = {
    "Q and K dims": lambda widths: widths["heads"] * widths["qk"],
    "V dims": lambda widths: widths["heads"] * widths["v"],
    "attention heads": lambda widths: widths["heads"],
    "FFN hidden units": lambda widths: widths["ffn"],
}


def _summary(data: Doc) -> tuple[list[str], list[str]]:
    """What was cut and what was grown, a line each."""
    rows, lines = data["blocks"], {"cut": [], "grown": []}
    left = [row for row in rows if row["after"] is not None]
    gone = [row["block"] for row in rows if row["after"] is None]
    if gone:
        total = sum("blocks" in row["block"] for row in rows)
        lines["cut"].append(f"{len(gone)} of {counted(total, 'block')} removed whole: {listed(gone, NAMED)}")
    for what, key in (("attention", "attention heads"), ("the FFN", "FFN hidden units")):
        lost = [row["block"] for row in left if _change(row, TOTALS[key]).direction == "gone"]
        if lost:
            lines["cut"].append(
                f"{what} removed from {counted(len(lost), 'other block' if gone else 'block')}: {listed(lost, NAMED)}"
            )
    for label, total in TOTALS.items():
        for direction, said in lines.items():
            changes = {row["block"]: c for row in left if (c := _change(row, total)).direction == direction}
            if changes:
                old, new = (sum(getattr(c, side) for c in changes.values()) for side in ("before", "after"))
                merges = ", merges included" if any("downsample" in path for path in changes) else ""
                where = f"{counted(len(changes), 'block')}{merges}"
                said.append(f"{label} in {where}: {old:,.0f} → {new:,.0f} ({new / old:.2f}x)")
    for label, change in _other_changes(data):
        if change.direction:
            side = "grown" if change.direction == "grown" else "cut"
            lines[side].append(f"{label}: {change.before:,} → {change.after:,}")
    layers = data.get("layers", [])
    narrowed = sum(layer["before"] != layer["after"] for layer in layers)
    if narrowed:
        lines["cut"].append(f"{narrowed} of {counted(len(layers), 'layer')} narrowed: see the table")
    return lines["cut"], lines["grown"]


def _change(row: Doc, total: Callable[[Doc], float]) -> Change:
    return Change(total(row["before"]), total(row["after"]) if row["after"] else 0)


def _other_changes(data: Doc) -> list[tuple[str, Change]]:
    """Widths that belong to no block: stages, the stem; and sums of what the blocks' rows do not hold."""
    if not data["blocks"]:
        return []
    old, new = data["before"]["arch"], data["after"]["arch"]
    after = _stage_widths(new)
    found = [
        (f"width of {stage or 'all blocks'}", Change(width, after[stage]))
        for stage, width in _stage_widths(old).items()
    ]
    stems = zip(old.get("stem", ()), new.get("stem", ()), strict=True)
    found += [(f"stem {i}", Change(a, b)) for i, (a, b) in enumerate(stems)]
    for key, label in (("squeezed", "squeeze-excite dims"), ("conv", "depthwise convolution branches")):
        found.append((label, Change(_total(old, key), _total(new, key))))
    return found


def _stage_widths(arch: Doc) -> dict[str, int]:
    if "stages" not in arch:
        return {"": arch["embed_dim"]}
    return {f"stages.{i}": stage["embed_dim"] for i, stage in enumerate(arch["stages"])}


def _total(doc: Any, key: str) -> int:
    """Sum of a field wherever it occurs in a document; what is on counts one, what is not there nothing."""
    if isinstance(doc, dict):
        own = doc.get(key)
        return (int(own) if isinstance(own, int) else 0) + sum(_total(item, key) for item in doc.values())
    return sum(_total(item, key) for item in doc) if isinstance(doc, list) else 0


def _stages(data: Doc) -> list[dict[str, Any]]:
    """The blocks' table: per stage its width, per block what it had and has."""
    if not data["blocks"]:
        return []
    old, new = (_stage_widths(data[which]["arch"]) for which in ("before", "after"))
    stages: dict[str, list[dict[str, Any]]] = {stage: [] for stage in old}
    for row in data["blocks"]:
        stage, left = stage_of(row["block"]), row["after"]
        had = row["before"]
        stages[stage].append(
            {
                "name": row["block"].removeprefix(f"{stage}."),
                "had": had,
                "has": left,
                "gone": left is None,
                "qk": _change(row, TOTALS["Q and K dims"]),
                "v": _change(row, TOTALS["V dims"]),
                "hidden": _change(row, TOTALS["FFN hidden units"]),
                "ratio": _change(row, lambda widths: widths["ratio"]),
                "changed": left is None or any(had[key] != left[key] for key in had if key not in ("embed", "ratio")),
            }
        )
    return [{"name": stage, "width": Change(old[stage], new[stage]), "blocks": rows} for stage, rows in stages.items()]


# ---------------------------------------------------------------------------------- importance, costs


def _place(row: Doc) -> str:
    """Where a knob is: its stage, the stem, its block in a network without stages, or the whole network."""
    path = row["name"].split(".")
    if path[0] in ("stages", "blocks"):
        return ".".join(path[:2])
    return "stem" if path[0] == "stem" else "whole network"


def _kinds(rows: list[Doc]) -> list[str]:
    """The kinds there are, in their order."""
    present = {row["kind"] for row in rows}
    return [kind for kind in KINDS if kind in present]


def _cost(data: Doc, row: Doc) -> float:
    """What a knob costs: millions of MACs, or ms where those were measured."""
    if not data.get("costs"):
        return row["macs"] / 1e6
    return row["macs"] * rates(data["costs"]).get(group_of(row["name"].partition("[")[0], row["kind"]), 0.0)


def _density(data: Doc, rows: list[Doc]) -> float | None:
    """Importance per cost of the knobs that cost anything; None where none does."""
    costs = [(row["importance"], cost) for row in rows if (cost := _cost(data, row))]
    return sum(importance for importance, _ in costs) / sum(cost for _, cost in costs) if costs else None


def _importance_table(data: Doc) -> list[dict[str, Any]]:
    """Importance and density per place and kind, with a shade from 0 to 1 by the density's logarithm."""
    rows = data["importance"]
    groups = {
        (place, kind): [row for row in rows if (_place(row), row["kind"]) == (place, kind)]
        for place in dict.fromkeys(map(_place, rows))
        for kind in _kinds(rows)
    }
    densities = {key: _density(data, found) for key, found in groups.items() if found}
    logs = [math.log(density) for density in densities.values() if density]
    low, high = min(logs, default=0.0), max(logs, default=1.0)
    table = []
    for place in dict.fromkeys(place for place, _ in groups):
        cells = []
        for kind in _kinds(rows):
            found, density = groups[place, kind], densities.get((place, kind))
            shade = (math.log(density) - low) / (high - low or 1) if density else 0
            cells.append(
                found and {"importance": sum(r["importance"] for r in found), "density": density, "shade": shade}
            )
        table.append({"place": place, "cells": cells})
    return table


def _importance_kinds(data: Doc) -> list[dict[str, Any]]:
    """Per kind: how many units, their importance together and from the least to the most, their density."""
    table = []
    for kind in _kinds(data["importance"]):
        rows = [row for row in data["importance"] if row["kind"] == kind]
        units, total = sum(row["units"] for row in rows), sum(row["importance"] for row in rows)
        table.append(
            {
                "label": KINDS[kind],
                "units": units,
                "importance": total,
                "least": min(row["least"] for row in rows),
                "mean": total / units,
                "most": max(row["most"] for row in rows),
                "density": _density(data, rows),
            }
        )
    return table


def _power(values: Iterable[float | None]) -> int:
    """The power of ten, of thousands, that takes the largest value to 1 or more."""
    largest = max((value for value in values if value), default=1)
    return max(0, -3 * math.floor(math.log10(largest) / 3))


def _costs(data: Doc) -> list[dict[str, Any]]:
    """What halving each group saved as measured, the dearest by MACs first, and beside the whole network's mean."""
    mean = data["before"]["latency_ms"] / data["before"]["macs"]
    rows = sorted(data.get("costs") or (), key=lambda row: -row["rate"])
    top = max((row["rate"] for row in rows), default=0) or 1
    return [{**row, "relative": row["rate"] / mean, "share": row["rate"] / top, "why": why_not(row)} for row in rows]


# ---------------------------------------------------------------------------------- what to do next


# ---------------------------------------------------------------------------------- figures


def _picture(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _reallocation_plot(data: Doc) -> bytes:
    """Four panels over the blocks: Q and K dims, V dims, FFN ratio, width; a pale bar before, a narrow one after."""
    stages = _stages(data)
    panels = [
        ("Q, K dims\n(heads x dim)", lambda block: block["qk"]),
        ("V dims\n(heads x dim)", lambda block: block["v"]),
        ("FFN ratio", lambda block: block["ratio"]),
    ]
    figure = new_figure(10, 8.2)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(1.25, 1.25, 1.25, 0.65))
    ticks, x = [], 0.0
    for stage in stages:
        start = x
        for block in stage["blocks"]:
            ticks.append((x, block["name"].removeprefix("blocks.").replace("downsample", "merge")))
            for panel, (_, change_of) in zip(axes, panels, strict=False):
                _draw_change(panel, x, change_of(block), 0.78, 0.4)
                if block["gone"]:
                    panel.axvspan(
                        x - 0.46, x + 0.46, facecolor="none", edgecolor="#c3cad1", hatch="////", lw=0, zorder=0
                    )
            x += 1
        middle, width = (start + x - 1) / 2, stage["width"]
        _draw_change(axes[3], middle, width, x - start - 0.22, x - start - 0.6)
        words = f"{width.before} → {width.after}" if width.direction else f"{width.before}"
        at = (middle, max(width.before, width.after))
        axes[3].annotate(words, at, (0, 3), textcoords="offset points", ha="center", fontsize=9.5, color=INK)
        if stage["name"]:
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            axes[0].annotate(stage["name"], (middle, 1.02), **place, fontsize=10.5, color=SOFT)
        x += 0.7
    for panel, label in zip(axes, [label for label, _ in panels] + ["width"], strict=True):
        plain_axes(panel)
        panel.grid(visible=False, axis="x")
        panel.set_ylabel(label, color=INK, fontsize=10.5)
        panel.margins(x=0.01)
        panel.set_ylim(bottom=0)
    tops = [panel.get_ylim()[1] for panel in axes[:2]]
    if max(tops) <= 2 * min(tops):
        for panel in axes[:2]:
            panel.set_ylim(top=max(tops))
    axes[3].margins(y=0.3)
    axes[3].set_xticks([at for at, _ in ticks], [label for _, label in ticks], rotation=0 if len(ticks) < 18 else 90)
    axes[3].tick_params(axis="x", length=0)
    axes[3].set_xlabel("block", color=INK, fontsize=10.5)
    _legend(figure, [block for stage in stages for block in stage["blocks"]])
    return png_of(figure)


def _draw_change(axes: Axes, x: float, change: Change, wide: float, narrow: float) -> None:
    colours = {"": SAME, "cut": CUT, "grown": GROWN}
    axes.bar(x, change.before, wide, color=BEFORE, zorder=1)
    if change.direction == "gone":
        axes.plot(x, 0, "x", color=INK, ms=8, mew=1.8, clip_on=False, zorder=4)
    elif change.after:
        axes.bar(x, change.after, narrow, color=colours[change.direction], zorder=2)


def _legend(figure: Any, blocks: list[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = [
        Patch(color=BEFORE, label="before"),
        Patch(color=CUT, label="after: less"),
        Patch(color=GROWN, label="after: more"),
        Patch(color=SAME, label="after: the same"),
        Line2D([], [], marker="x", color=INK, mew=1.8, ls="", ms=8, label="gone"),
    ]
    if any(block["gone"] for block in blocks):
        entries.append(Patch(facecolor="white", edgecolor="#aab3bb", hatch="////", label="block removed"))
    figure.legend(handles=entries, loc="outside upper left", ncols=6, frameon=False, fontsize=10.5, handletextpad=0.5)


def _importance_plot(data: Doc) -> bytes:
    """A point a knob by its importance per cost, a lane per kind; what the allocation takes first is on the left."""
    from matplotlib.lines import Line2D

    lane_of = {row["name"]: _lane(row, len(data["blocks"])) for row in data["importance"]}
    places = list(dict.fromkeys(lane_of.values()))
    looks = dict(zip(places, cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    found = [(row, density) for row in data["importance"] if (density := _density(data, [row])) is not None]
    floor = min((density for _, density in found if density), default=1.0) / 3
    kinds = _kinds([row for row, _ in found])
    figure = new_figure(10, 1.2 + 0.62 * len(kinds))
    axes = figure.add_subplot()
    for row, density in found:
        place = lane_of[row["name"]]
        colour, marker = looks[place]
        lane = (places.index(place) + 0.5) / len(places) - 0.5
        y = kinds.index(row["kind"]) + 0.72 * lane
        hollow = {} if density else {"mfc": "white"}
        axes.plot(density or floor, y, marker, color=colour, ms=5.5, alpha=0.75, mew=0 if density else 1.2, **hollow)
    axes.set_xscale("log")
    plain_axes(axes)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_yticks(range(len(kinds)), [KINDS[kind] for kind in kinds])
    for y in range(1, len(kinds)):
        axes.axhline(y - 0.5, color="#e6e9ed", lw=0.9)
    axes.grid(visible=False, axis="y")
    unit = "ms" if data.get("costs") else "MMAC"
    zeros = ", hollow: importance 0" if any(density == 0 for _, density in found) else ""
    axes.set_xlabel(f"importance per {unit}, log scale{zeros}", color=INK, fontsize=10.5)
    if len(places) > 1:
        entries = [Line2D([], [], color=c, marker=m, ls="", ms=6.5, label=place) for place, (c, m) in looks.items()]
        figure.legend(
            handles=entries, loc="outside upper left", ncols=8, frameon=False, fontsize=10.5, handletextpad=0.3
        )
    return png_of(figure)


def _lane(row: Doc, depth: int) -> str:
    """A knob's place; in a network without stages its third of the blocks."""
    place = _place(row)
    if not place.startswith("blocks."):
        return place
    third = 3 * int(place.split(".")[1]) // depth
    first, after = (math.ceil(edge * depth / 3) for edge in (third, third + 1))
    return f"blocks {first} to {after - 1}"
