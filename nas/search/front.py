"""pareto.png: the scores of a search's trials against their latencies, with the front and the winner."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from nas.quality.tier import told_score
from nas.report.figures import COLOURS, INK, MARKERS, SOFT, new_figure, plain_axes, png_of
from nas.report.page import conditions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Looks = dict[str, tuple[str, str]]  # a family's colour and marker
BAR_ROOM = 10.0  # points of top-1 that intervals may widen the plot by, each way
FOOT = 0.025  # share of the plot's height at which trials without a score stand
SIDES = ((1, 0), (-1, 0), (-1, 1), (1, -1), (0, 1), (0, -1), (1, 1), (-1, -1))  # of its point a label may stand on


def plot_front(data: dict[str, Any]) -> bytes:
    """Scores against latency; a bar is the 95% interval of a front point's estimate. What a tier that trains has only
    guessed has no height."""
    figure = new_figure(10, 6.4)
    axes = figure.add_subplot()
    measured = [t for t in data["trials"] if t["state"] == "complete"]
    scored = [_as_told(t) for t in measured if not unknown(t)]
    front = sorted(map(_as_told, data["pareto"]), key=lambda p: p["latency_ms"])
    looks = dict(
        zip(sorted({t["family"] for t in data["trials"]}), cycle(zip(COLOURS, MARKERS, strict=True)), strict=False)
    )
    winner = data["winner"] and next((t for t in scored if t["trial"] == data["winner"]["trial"]), None)

    _frame(axes, data, measured, scored, front)
    _draw_trials(axes, looks, [*scored, *filter(unknown, measured)])
    if front:
        _draw_front(axes, looks, front, data["budget_ms"])
    if winner:
        axes.plot(winner["latency_ms"], winner["quality"], "o", ms=18, mfc="none", mec=INK, mew=1.6, zorder=6)
    _legend(figure, looks, bool(front), any(t["guessed"] for t in measured))
    _label(figure, axes, winner, scored, front, data["budget_ms"])
    return png_of(figure)


def _frame(axes: Axes, data: dict[str, Any], measured: list[dict], scored: list[dict], front: list[dict]) -> None:
    """Scales, axis labels, the budget, and limits that keep in sight what matters; what lies beyond is counted."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    budget = data["budget_ms"]
    latencies = [budget, *(t["latency_ms"] for t in measured)]
    fastest = min(latencies[1:], default=budget)
    left, right = min(latencies) / 1.2, min(1.3 * max(latencies), max(8 * budget, 4 * fastest))
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(MaxNLocator(7) if right < 5 * left else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    notes = [(sum(latency > right for latency in latencies), f"slower than {right:.2g} ms", "right")]
    if scored:
        tenth = sorted(t["quality"] for t in scored)[len(scored) // 10]
        bottom = min([tenth, *(t["quality"] for t in [*front, *scored] if "arch" in t or t["name"])])
        top = max(t["quality"] for t in scored)
        bars = [end for p in front for end in p["quality_ci"]]
        bottom = min(bottom, max(min(bars, default=bottom), bottom - BAR_ROOM))
        top = max(top, min(max(bars, default=top), top + BAR_ROOM))
        margin = max(1.0, 0.06 * (top - bottom))
        axes.set_ylim(bottom - margin, top + 1.5 * margin)
        notes.append((sum(t["quality"] < bottom - margin for t in scored), "below the frame", "left"))
    else:
        axes.set_yticks([])
    for count, where, side in notes:
        if count:
            words = f"{count} trial{'s' * (count > 1)} {where}"
            at = {"left": 0.008, "right": 0.992}[side], 2 * FOOT
            axes.text(*at, words, ha=side, transform=axes.transAxes, fontsize=9.5, color=SOFT)
    axes.axvspan(budget, right, color="#f4f5f7", zorder=0, lw=0)
    axes.axvline(budget, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1)

    axes.set_xlabel(f"median latency in ms, log scale ({conditions(data['settings'])})", color=INK, fontsize=11)
    axes.set_ylabel(f"score ({data['quality_tier']['name']}), %", color=INK, fontsize=11)
    plain_axes(axes)


def _draw_trials(axes: Axes, looks: Looks, measured: list[dict]) -> None:
    """A dot a trial, faded over the budget; published variants hollow; below, hollow, those that were not trained."""
    for t in measured:
        colour, marker = looks[t["family"]]
        if unknown(t):
            foot = {"transform": axes.get_xaxis_transform(), "mfc": "none", "mec": colour, "alpha": 0.6, "ms": 6}
            axes.plot(t["latency_ms"], FOOT, marker, **foot)
        elif t["name"]:
            look = {"mfc": "white", "mec": colour, "mew": 1.8, "ms": 8.5, "alpha": 1 if t["feasible"] else 0.5}
            axes.plot(t["latency_ms"], t["quality"], marker, zorder=5, **look)
        else:
            look = {"mew": 0, "ms": 5, "alpha": 0.65 if t["feasible"] else 0.22}
            axes.plot(t["latency_ms"], t["quality"], marker, color=colour, zorder=2, **look)


def _draw_front(axes: Axes, looks: Looks, front: list[dict], budget: float) -> None:
    for p in front:
        bar = {"color": INK, "lw": 0.9, "ms": 5, "alpha": 0.3, "zorder": 1}
        axes.plot([p["latency_ms"]] * 2, p["quality_ci"], marker="_", **bar)
        if not p["name"]:
            colour, marker = looks[p["family"]]
            axes.plot(p["latency_ms"], p["quality"], marker, color=colour, ms=7.5, mec=INK, mew=1, zorder=4)
    ends = [*(p["latency_ms"] for p in front[1:]), budget]
    steps = [(x, p["quality"]) for p, end in zip(front, ends, strict=True) for x in (p["latency_ms"], end)]
    axes.plot(*zip(*steps, strict=True), color=INK, lw=1.3, zorder=3)


def _legend(figure: Figure, looks: Looks, front: bool, guessed: bool) -> None:
    from matplotlib.lines import Line2D

    entries = [
        *(Line2D([], [], color=look[0], marker=look[1], ls="", ms=7, label=family) for family, look in looks.items()),
        Line2D([], [], marker="o", mfc="white", mec=INK, mew=1.6, ls="", ms=7.5, label="published"),
        Line2D([], [], marker="o", color=INK, alpha=0.25, mew=0, ls="", ms=6, label="over budget"),
    ]
    if front:
        entries.append(Line2D([], [], color=INK, lw=1.3, label="front"))
    if guessed:
        entries.append(Line2D([], [], marker="o", mfc="none", mec=SOFT, ls="", ms=6, label="not trained"))
    figure.legend(handles=entries, loc="outside upper left", ncols=5, frameon=False, fontsize=10.5, handletextpad=0.3)


def _label(
    figure: Figure, axes: Axes, winner: dict | None, scored: list[dict], front: list[dict], budget: float
) -> None:
    """Name the budget, the winner and the published variants, each where it covers least, or not at all."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is added from here on moves nothing
    renderer, point = figure.canvas.get_renderer(), figure.dpi / 72
    named = sorted(
        (t for t in scored if t["name"] and t is not winner), key=lambda t: (not t["feasible"], -t["quality"])
    )
    dots, marks = (
        [axes.transData.transform((row["latency_ms"], row["quality"])) for row in rows]
        for rows in (scored, [*front, *named])
    )
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines if len(line.get_xdata()) > 1]
    labels = [(t["name"], t, 7, {"color": INK if t["feasible"] else SOFT, "fontsize": 9.5}) for t in named]
    if winner:
        words = f"winner: {winner['name'] or 'trial ' + str(winner['trial'])}"
        labels.insert(0, (words, winner, 11, {"color": INK, "fontsize": 11, "fontweight": "bold"}))
    halo = {"zorder": 7, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
    offset = {"xytext": (6, -4), "textcoords": "offset points", **halo}
    edge = (budget, axes.get_ylim()[1])
    budget_label = axes.annotate(f"budget {budget:g} ms", edge, va="top", color=INK, fontsize=11, **offset)
    taken = [text.get_window_extent(renderer) for text in [budget_label, *axes.texts]]

    def cost(box: Bbox) -> int:
        """What a label here would cover: a dot 1, a line 4, a mark 10, another label or the frame's edge 100."""
        outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
        covered = sum(box.padded(5 * point).contains(*mark) for mark in marks)
        crossed = sum(line.intersects_bbox(box, filled=False) for line in lines)
        return (
            100 * (outside or box.count_overlaps(taken) > 0)
            + 10 * covered
            + 4 * crossed
            + sum(box.contains(*dot) for dot in dots)
        )

    for words, t, reach, look in labels:
        x, y = axes.transData.transform((t["latency_ms"], t["quality"]))
        text = axes.annotate(words, (t["latency_ms"], t["quality"]), **look, **offset)
        wide, high = text.get_window_extent(renderer).size
        places = [
            (x + dx * reach * point - wide * (1 - dx) / 2, y + dy * reach * point - high * (1 - dy) / 2)
            for dx, dy in SIDES
        ]
        best = min((Bbox.from_bounds(*place, wide, high) for place in places), key=cost)
        if cost(best) < 30 or t is winner:
            text.set_position(((best.x0 - x) / point, (best.y0 - y) / point))
            taken.append(best)
        else:
            text.remove()


def _as_told(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"quality": told_score(row["quality"])}


def unknown(trial: dict[str, Any]) -> bool:
    """Whether nothing says how good a measured network is: a tier that trains has only guessed."""
    return trial["quality"] is None or trial["guessed"]
