"""pareto.png: the scores of a search's trials against their latencies, with the front and the winner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from nas.quality.tier import told_score
from nas.report.figures import COLOURS, INK, MARKERS, SOFT, new_figure, plain_axes, png_of
from nas.report.page import conditions
from nas.search.outcome import Outcome
from nas.search.rows import Trial, known

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Looks = dict[str, tuple[str, str]]  # a family's colour and marker
BAR_ROOM = 10.0  # points of top-1 that intervals may widen the plot by, each way
FOOT = 0.025  # share of the plot's height at which trials without a score stand
SIDES = ((1, 0), (-1, 0), (-1, 1), (1, -1), (0, 1), (0, -1), (1, 1), (-1, -1))  # of its point a label may stand on


@dataclass(frozen=True)
class Point:
    """A measured trial as it is drawn. score: in percent, None where nothing says how good it is."""

    trial: int
    family: str
    name: str
    feasible: bool
    ms: float
    score: float | None
    ci: tuple[float, float] | None

    @classmethod
    def of(cls, trial: Trial) -> Point:
        """What a tier that trains has only guessed has no score."""
        score = None if trial.quality is None or trial.guessed else told_score(trial.quality)
        return cls(
            trial.trial, trial.family, trial.name, trial.feasible, known(trial.latency_ms), score, trial.quality_ci
        )

    @property
    def height(self) -> float:
        return known(self.score)


def plot_front(outcome: Outcome) -> bytes:
    """Scores against latency; a bar is the 95% interval of a front point's estimate. What a tier that trains has only
    guessed has no height."""
    figure = new_figure(10, 6.4)
    axes = figure.add_subplot()
    measured = [Point.of(trial) for trial in outcome.trials if trial.complete]
    scored = [point for point in measured if point.score is not None]
    front = list(map(Point.of, outcome.front))
    families = sorted({trial.family for trial in outcome.trials})
    looks = dict(zip(families, cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    number = outcome.winner and outcome.winner.trial
    winner = next((point for point in scored if point.trial == number), None)

    _frame(axes, outcome, measured, scored, front)
    _draw_trials(axes, looks, [*scored, *(point for point in measured if point.score is None)])
    if front:
        _draw_front(axes, looks, front, outcome.budget_ms)
    if winner:
        axes.plot(winner.ms, winner.height, "o", ms=18, mfc="none", mec=INK, mew=1.6, zorder=6)
    _legend(figure, looks, bool(front), any(trial.guessed for trial in outcome.trials if trial.complete))
    _label(figure, axes, winner, scored, front, outcome.budget_ms)
    return png_of(figure)


def _frame(
    axes: Axes, outcome: Outcome, measured: Sequence[Point], scored: Sequence[Point], front: Sequence[Point]
) -> None:
    """Scales, axis labels, the budget, and limits that keep in sight what matters; what lies beyond is counted."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    budget = outcome.budget_ms
    latencies = [budget, *(point.ms for point in measured)]
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
        low, high = _heights(scored, front)
        axes.set_ylim(low, high)
        notes.append((sum(point.height < low for point in scored), "below the frame", "left"))
    else:
        axes.set_yticks([])
    for count, where, side in notes:
        if count:
            words = f"{count} trial{'s' * (count > 1)} {where}"
            at = {"left": 0.008, "right": 0.992}[side], 2 * FOOT
            axes.text(*at, words, ha=side, transform=axes.transAxes, fontsize=9.5, color=SOFT)
    axes.axvspan(budget, right, color="#f4f5f7", zorder=0, lw=0)
    axes.axvline(budget, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1)

    axes.set_xlabel(f"median latency in ms, log scale ({conditions(asdict(outcome.settings))})", color=INK, fontsize=11)
    axes.set_ylabel(f"score ({outcome.quality_tier.name}), %", color=INK, fontsize=11)
    plain_axes(axes)


def _heights(scored: Sequence[Point], front: Sequence[Point]) -> tuple[float, float]:
    """Limits of the scores, within 0 to 100: the front, published networks and nine of ten trials are in sight."""
    scores = sorted(point.height for point in scored)
    shown = [point.height for point in (*front, *(point for point in scored if point.name))]
    bottom, top = min([scores[len(scored) // 10], *shown]), scores[-1]
    bars = [end for point in front for end in known(point.ci)]
    bottom = min(bottom, max(min(bars, default=bottom), bottom - BAR_ROOM))
    top = max(top, min(max(bars, default=top), top + BAR_ROOM))
    margin = max(1.0, 0.06 * (top - bottom))
    return max(bottom - margin, 0.0), min(top + 1.5 * margin, 100.0)


def _draw_trials(axes: Axes, looks: Looks, points: Sequence[Point]) -> None:
    """A dot a trial, faded over the budget; published variants hollow; below, hollow, those that were not trained."""
    foot: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "mfc": "none", "alpha": 0.6, "ms": 6}
    hollow: dict[str, Any] = {"mfc": "white", "mew": 1.8, "ms": 8.5, "zorder": 5}
    full: dict[str, Any] = {"mew": 0, "ms": 5, "zorder": 2}
    for t in points:
        colour, marker = looks[t.family]
        if t.score is None:
            axes.plot(t.ms, FOOT, marker, mec=colour, **foot)
        elif t.name:
            axes.plot(t.ms, t.score, marker, mec=colour, alpha=1 if t.feasible else 0.5, **hollow)
        else:
            axes.plot(t.ms, t.score, marker, color=colour, alpha=0.65 if t.feasible else 0.22, **full)


def _draw_front(axes: Axes, looks: Looks, front: Sequence[Point], budget: float) -> None:
    for p in front:
        bar: dict[str, Any] = {"color": INK, "lw": 0.9, "ms": 5, "alpha": 0.3, "zorder": 1}
        axes.plot([p.ms] * 2, known(p.ci), marker="_", **bar)
        if not p.name:
            colour, marker = looks[p.family]
            axes.plot(p.ms, p.height, marker, color=colour, ms=7.5, mec=INK, mew=1, zorder=4)
    ends = [*(p.ms for p in front[1:]), budget]
    steps = [(x, p.height) for p, end in zip(front, ends, strict=True) for x in (p.ms, end)]
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
    figure: Figure, axes: Axes, winner: Point | None, scored: Sequence[Point], front: Sequence[Point], budget: float
) -> None:
    """Name the budget, the winner and the published variants, each where it covers least, or not at all."""
    import numpy as np
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is added from here on moves nothing
    point = figure.dpi / 72
    named = sorted((t for t in scored if t.name and t is not winner), key=lambda t: (not t.feasible, -t.height))
    dots, marks = (
        [axes.transData.transform((row.ms, row.height)) for row in rows] for rows in (scored, [*front, *named])
    )
    lines = [
        line.get_transform().transform_path(line.get_path()) for line in axes.lines if np.size(line.get_xdata()) > 1
    ]
    labels: list[tuple[str, Point, int, dict[str, Any]]] = [
        (t.name, t, 7, {"color": INK if t.feasible else SOFT, "fontsize": 9.5}) for t in named
    ]
    if winner:
        words = f"winner: {winner.name or 'trial ' + str(winner.trial)}"
        labels.insert(0, (words, winner, 11, {"color": INK, "fontsize": 11, "fontweight": "bold"}))
    halo: dict[str, Any] = {"zorder": 7, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
    offset: dict[str, Any] = {"xytext": (6, -4), "textcoords": "offset points", **halo}
    edge = (budget, axes.get_ylim()[1])
    budget_label = axes.annotate(f"budget {budget:g} ms", edge, va="top", color=INK, fontsize=11, **offset)
    if budget_label.get_window_extent().x1 > axes.bbox.x1:
        budget_label.set_horizontalalignment("right")
        budget_label.xyann = (-6, -4)
    taken = [text.get_window_extent() for text in [budget_label, *axes.texts]]

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
        x, y = axes.transData.transform((t.ms, t.height))
        text = axes.annotate(words, (t.ms, t.height), **look, **offset)
        wide, high = text.get_window_extent().size
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
