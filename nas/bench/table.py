"""A bench's rows as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.bench.report import worded
from nas.bench.result import SETTINGS, is_tie, varying
from nas.report.tables import Column, console_of, print_table, prose

if TYPE_CHECKING:
    from nas.bench.result import BenchRow

WAITING = "waiting"
INFEASIBLE = "over --max-drop"
HEADINGS = {"resolution": "px", "batch_size": "batch"}


def show_bench(rows: Sequence[BenchRow], notes: Sequence[str]) -> None:
    """Print rows as a table: settings that differ between them are columns, those of all of them stand above it."""
    console, first = console_of(), rows[0]
    differing = varying(rows, ("resolution", *SETTINGS))
    batches = {row.throughput_batch for row in rows}
    speed = f"img/s at batch {batches.pop()}" if len(batches) == 1 else "img/s at that batch"
    columns = (
        Column("network", label=True),
        *(Column(HEADINGS.get(name, name), label=isinstance(getattr(first, name), str)) for name in differing),
        Column("ms"),
        Column("95% of ms", drop=1),
        Column("p95 ms", drop=3),
        Column(speed, drop=2),
        Column("memory MB", drop=5),
        Column("file MB", drop=6),
        Column("mJ/img", drop=7),
        Column("samples", drop=4),
        Column("ratio"),
        Column("95% of ratio"),
        Column("top-1 %"),
        Column("points less"),
        Column("note", label=True),
    )
    same = [
        worded(name, getattr(first, name))
        for name in ("resolution", *SETTINGS)
        if name not in differing and getattr(first, name)
    ]
    prose(console, f"One interleaved run{': ' if same else ''}{', '.join(same)}.")
    compared = any(row.ratio is not None for row in rows[1:])
    print_table(console, columns, [_cells(row, first, differing, compared) for row in rows])
    intervals = " and of the ratio to the first row" if compared else ""
    meaning = " A ratio is the median over rounds of the ratio within a round." if compared else ""
    prose(
        console,
        f"Intervals: 95%, of the median{intervals}.{meaning} Weights do not matter for time, and are random where an "
        "Arch or timm/NAME without trained ones was given.",
    )
    for line in notes:
        prose(console, line)


def _cells(row: BenchRow, first: BenchRow, differing: Sequence[str], compared: bool) -> tuple[str, ...]:
    (low, high), ratio = row.ci, row.ratio_ci
    return (
        row.model,
        *("" if getattr(row, name) is None else str(getattr(row, name)) for name in differing),
        f"{row.latency_ms:.3f}",
        f"{low:.3f}..{high:.3f}",
        f"{row.p95_ms:.3f}",
        "" if row.throughput is None else f"{row.throughput:.1f}",
        *("" if value is None else f"{value:.1f}" for value in (row.memory_mb, row.file_mb, row.energy_mj)),
        str(row.samples),
        f"{row.ratio:.3f}" if compared and row.ratio is not None else "",
        "" if row is first or ratio is None else f"{ratio[0]:.3f}..{ratio[1]:.3f}",
        "" if row.top1 is None else f"{row.top1:.1f}",
        "" if row.drop is None else f"{row.drop:.1f}",
        INFEASIBLE if row.within is False else WAITING if row.waiting else "tie" if is_tie(row, first) else "",
    )
