"""A bench as CSV and as a plot, and the words of its rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nas.bench.result import SETTINGS, is_tie
from nas.units import counted, shown

if TYPE_CHECKING:
    from nas.bench.result import BenchFailure, BenchRow

COLUMNS = (
    *("model", "resolution", *SETTINGS, "latency_ms", "p95_ms", "ci_low_ms", "ci_high_ms", "samples"),
    *("throughput", "throughput_batch", "ratio", "ratio_low", "ratio_high", "waiting"),
    *("top1", "drop", "drop_low", "drop_high", "within", "memory_mb", "file_mb", "energy_mj", "error"),
)


PLOTS = (".png", ".svg", ".pdf")


def worded(name: str, value: Any) -> str:
    """One of SETTINGS as people read it."""
    if name == "threads":
        return counted(value, "thread")
    return {"batch_size": f"batch {value}", "resolution": f"{value} px"}.get(name, str(value))


def to_csv(rows: Sequence[BenchRow], failed: Sequence[BenchFailure] = ()) -> bytes:
    """A line per row (COLUMNS); latencies in ms, throughput in images/s, sizes in 10^6 bytes, energy of an
    image in mJ. What failed has its error alone."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        (ci_low, ci_high), (ratio_low, ratio_high) = row.ci, row.ratio_ci or (None, None)
        drop_low, drop_high = row.drop_ci or (None, None)
        flat = {"ci_low_ms": ci_low, "ci_high_ms": ci_high, "ratio_low": ratio_low, "ratio_high": ratio_high}
        flat |= {"drop_low": drop_low, "drop_high": drop_high}
        writer.writerow(row.to_json() | flat)
    writer.writerows(failure.to_json() for failure in failed)
    return text.getvalue().encode(errors="surrogateescape")


def to_plot(rows: Sequence[BenchRow], suffix: str) -> bytes:
    """Latencies as bars with their intervals, a panel per combination, as a .png, .svg or .pdf.

    Panels of one batch size share their scale.
    """
    from nas.report.figures import INK, SOFT, new_figure, plain_axes

    equal = len({row.resolution for row in rows}) == 1
    panels: dict[tuple[Any, ...], list[BenchRow]] = {}
    for row in rows:
        panels.setdefault(tuple(getattr(row, name) for name in SETTINGS), []).append(row)
    heights = [len(panel) + 1.6 for panel in panels.values()]
    figure = new_figure(9.5, 0.34 * sum(heights) + 0.5)
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (combination, panel) in zip(grid, panels.items(), strict=True):
        right = max(row.ci[1] for row in rows if row.batch_size == panel[0].batch_size)
        plain_axes(axes)
        axes.grid(axis="y", visible=False)
        places = range(len(panel))
        values = [row.latency_ms for row in panel]
        reach = [
            [row.latency_ms - row.ci[0] for row in panel],
            [row.ci[1] - row.latency_ms for row in panel],
        ]
        colours = ["#0072B2" if row is rows[0] else "#8FB8D8" for row in panel]
        axes.barh(places, values, 0.68, color=colours, xerr=reach, error_kw={"ecolor": INK, "lw": 1.1, "capsize": 2.5})
        for place, row in zip(places, panel, strict=True):
            axes.annotate(
                f"{_figure(row.latency_ms)} ms{_beside(row, rows[0])}",
                (row.ci[1], place),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=9,
            )
        names = [_short(shown(row.model)) + ("" if equal else f", {row.resolution} px") for row in panel]
        axes.set_yticks(places, names)
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_xlim(0, 1.35 * right)
        title = ", ".join(worded(name, value) for name, value in zip(SETTINGS, combination, strict=True))
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    grid[-1].set_xlabel("latency, ms: median and its 95% interval; ratios are to the dark bar", color=SOFT)
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."))
    return content.getvalue()


def _beside(row: BenchRow, first: BenchRow) -> str:
    if row.waiting:
        return "  waiting"
    if row is first or row.ratio is None:
        return ""
    return "  tie" if is_tie(row, first) else f"  {_figure(row.ratio)}x"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _short(label: str, length: int = 40) -> str:
    return label if len(label) <= length else "..." + label[3 - length :]
