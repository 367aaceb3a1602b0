"""The plots of a pruning's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from nas.prune.records import Parts, PruneResult
from nas.prune.tables import KINDS, BlockLine, Change, density_of, kinds_among, place_of, stages_of
from nas.prune.widths import Importance
from nas.report.figures import COLOURS, INK, MARKERS, SOFT, new_figure, plain_axes, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, CUT, GROWN, SAME = "#d3d9df", "#0072B2", "#D55E00", "#9aa5af"  # told apart by colour-blind readers too


def reallocation_plot(result: PruneResult) -> bytes:
    """Four panels over the blocks: Q and K dims, V dims, FFN ratio, width; a pale bar before, a narrow one after."""
    stages = stages_of(result)
    panels: list[tuple[str, Callable[[BlockLine], Change]]] = [
        ("Q, K dims\n(heads x dim)", lambda block: block.qk),
        ("V dims\n(heads x dim)", lambda block: block.v),
        ("FFN ratio", lambda block: block.ratio),
    ]
    figure = new_figure(10, 8.2)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(1.25, 1.25, 1.25, 0.65))
    ticks, x = [], 0.0
    for stage in stages:
        start = x
        for block in stage.blocks:
            ticks.append((x, block.name.removeprefix("blocks.").replace("downsample", "merge")))
            for panel, (_, change_of) in zip(axes, panels, strict=False):
                _draw_change(panel, x, change_of(block), 0.78, 0.4)
                if block.gone:
                    panel.axvspan(
                        x - 0.46, x + 0.46, facecolor="none", edgecolor="#c3cad1", hatch="////", lw=0, zorder=0
                    )
            x += 1
        middle, width = (start + x - 1) / 2, stage.width
        _draw_change(axes[3], middle, width, x - start - 0.22, x - start - 0.6)
        words = f"{width.before} → {width.after}" if width.direction else f"{width.before}"
        at = (middle, max(width.before, width.after))
        axes[3].annotate(words, at, (0, 3), textcoords="offset points", ha="center", fontsize=9.5, color=INK)
        if stage.name:
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            axes[0].annotate(stage.name, (middle, 1.02), **place, fontsize=10.5, color=SOFT)
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
    _legend(figure, [block for stage in stages for block in stage.blocks])
    return png_of(figure)


def _draw_change(axes: Axes, x: float, change: Change, wide: float, narrow: float) -> None:
    colours = {"": SAME, "cut": CUT, "grown": GROWN}
    axes.bar(x, change.before, wide, color=BEFORE, zorder=1)
    if change.direction == "gone":
        axes.plot(x, 0, "x", color=INK, ms=8, mew=1.8, clip_on=False, zorder=4)
    elif change.after:
        axes.bar(x, change.after, narrow, color=colours[change.direction], zorder=2)


def _legend(figure: Figure, blocks: Sequence[BlockLine]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = [
        Patch(color=BEFORE, label="before"),
        Patch(color=CUT, label="after: less"),
        Patch(color=GROWN, label="after: more"),
        Patch(color=SAME, label="after: the same"),
        Line2D([], [], marker="x", color=INK, mew=1.8, ls="", ms=8, label="gone"),
    ]
    if any(block.gone for block in blocks):
        entries.append(Patch(facecolor="white", edgecolor="#aab3bb", hatch="////", label="block removed"))
    figure.legend(handles=entries, loc="outside upper left", ncols=6, frameon=False, fontsize=10.5, handletextpad=0.5)


def importance_plot(parts: Parts) -> bytes:
    """A point a knob by its importance per cost, a lane per kind; what the allocation takes first is on the left."""
    from matplotlib.lines import Line2D

    lane_of = {row.name: _lane(row, len(parts.blocks)) for row in parts.importance}
    places = list(dict.fromkeys(lane_of.values()))
    looks = dict(zip(places, cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    found = [(row, density) for row in parts.importance if (density := density_of(parts, [row])) is not None]
    floor = min((density for _, density in found if density), default=1.0) / 3
    kinds = kinds_among(row for row, _ in found)
    figure = new_figure(10, 1.2 + 0.62 * len(kinds))
    axes = figure.add_subplot()
    for row, density in found:
        place = lane_of[row.name]
        colour, marker = looks[place]
        lane = (places.index(place) + 0.5) / len(places) - 0.5
        y = kinds.index(row.kind) + 0.72 * lane
        fill = colour if density else "white"
        axes.plot(density or floor, y, marker, color=colour, ms=5.5, alpha=0.75, mew=0 if density else 1.2, mfc=fill)
    axes.set_xscale("log")
    plain_axes(axes)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_yticks(range(len(kinds)), [KINDS[kind] for kind in kinds])
    for y in range(1, len(kinds)):
        axes.axhline(y - 0.5, color="#e6e9ed", lw=0.9)
    axes.grid(visible=False, axis="y")
    unit = "ms" if parts.costs else "MMAC"
    zeros = ", hollow: importance 0" if any(density == 0 for _, density in found) else ""
    axes.set_xlabel(f"importance per {unit}, log scale{zeros}", color=INK, fontsize=10.5)
    if len(places) > 1:
        entries = [Line2D([], [], color=c, marker=m, ls="", ms=6.5, label=place) for place, (c, m) in looks.items()]
        figure.legend(
            handles=entries, loc="outside upper left", ncols=8, frameon=False, fontsize=10.5, handletextpad=0.3
        )
    return png_of(figure)


def _lane(row: Importance, depth: int) -> str:
    """A knob's place; in a network without stages its third of the blocks."""
    place = place_of(row)
    if not place.startswith("blocks."):
        return place
    third = 3 * int(place.split(".")[1]) // depth
    first, after = (math.ceil(edge * depth / 3) for edge in (third, third + 1))
    return f"blocks {first} to {after - 1}"
