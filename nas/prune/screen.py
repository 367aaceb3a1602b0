"""The end of a pruning in a terminal: what changed, what it cost and bought, and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nas.intervals import top1_words
from nas.prune.request import show
from nas.prune.savings import why_not
from nas.prune.words import ACCURACIES, Doc, control_words, tuning_words
from nas.report.page import significant
from nas.report.tables import Column, console_of, print_table, prose
from nas.units import listed

if TYPE_CHECKING:
    from rich.console import Console

WIDTHS = ("embed", "heads", "qk", "v", "ffn", "ratio")
BLOCKS = (
    Column("block", label=True),
    Column("width", drop=1),
    Column("heads", drop=2),
    Column("q, k"),
    Column("v"),
    Column("FFN"),
    Column("FFN ratio", drop=3),
)
COUNTS = (Column("", label=True), Column("before"), Column("after"), Column("ratio"), Column("budget"))
COSTS = (
    Column("halved", label=True),
    Column("saves, ms"),
    Column("95%"),
    Column("us per MMAC", drop=1),
)
FILES = ("arch.json", "model.safetensors", "model.onnx", "prune.json")


def show_prune(data: Doc, folder: Path, to_stderr: bool) -> None:
    """Print a pruning's result, as prune.json has it."""
    from nas.prune.words import next_steps

    console = console_of(to_stderr)
    waiting = data.get("waiting")
    if waiting:
        prose(console, f"{waiting[:1].upper()}{waiting[1:]}.")
    _blocks(console, data)
    if line := grown_line(data):
        prose(console, line)
    _savings(console, data)
    print_table(console, COUNTS, count_rows(data), "prune.json has them")
    before, after = data["before"]["ci"], data["after"]["ci"]
    if before and not waiting and before[0] <= after[1] and after[0] <= before[1]:
        prose(console, "The latencies are a tie: their 95% intervals overlap.")
    for which, found in data["accuracy"].items():
        if found:
            prose(console, f"{ACCURACIES[which]}: {top1_words(found['top1'], found['top1_ci'], found['images'])}")
    if data.get("tuning"):
        prose(console, tuning_words(data))
    if data.get("control"):
        prose(console, control_words(data["control"]))
    for line in data.get("failures", ()):
        prose(console, line)
    prose(console, f"{headline(data['budget'])}.")
    files = [name for name in FILES if (folder / name).is_file()]
    prose(console, f"Network: {folder} ({', '.join(files)})")
    if (folder / "report.html").is_file():
        prose(console, f"Report: {folder / 'report.html'}")
    for what, command in next_steps(folder, data)[:2]:
        console.print(f"{what}: {command}")  # not wrapped, so that it can be copied


def grown_line(data: Doc) -> str | None:
    """Which widths of the blocks reallocation has grown; None where none."""
    both = [(row["before"], row["after"]) for row in data["blocks"] if row["after"] is not None]
    grown = [
        column.name
        for key, column in zip(WIDTHS, BLOCKS[1:], strict=True)
        if key != "ratio" and any(_most(new, key) > _most(old, key) for old, new in both)
    ]
    if not grown:
        return None
    return f"Parameters were reallocated: {listed(grown, len(grown))} grew; --no-reallocate leaves that out."


def _most(widths: Doc, key: str) -> float:
    return widths.get(f"{key}_range", [widths[key]])[-1]


def headline(budget: Doc) -> str:
    """Whether the budget is met, by which figures."""
    if budget["reached"] is None:
        return f"Budget {budget['metric']} {budget['text']}: not measured"
    if budget["verdict"] is None:
        return f"Budget {budget['metric']} {budget['text']}: not judged, the latencies are waiting times"
    verdict = {"fits": "met", "over": "NOT met", "unsure": "may be met or not, too close to tell"}[budget["verdict"]]
    by = f"{show(budget['metric'], budget['reached'])} for {show(budget['metric'], budget['target'])}"
    if budget["interval"]:
        low, high = budget["interval"]
        by += f", 95%: {significant(low)} to {significant(high)} ms in the closing run"
    return f"Budget {budget['metric']} {budget['text']}: {verdict} ({by})"


def count_rows(data: Doc) -> list[Sequence[str]]:
    """Rows of `COUNTS`: parameters, MACs, latency and its interval; the budget's verdict at what it is for."""
    before, after, budget = data["before"], data["after"], data["budget"]
    rows = []
    for label, key, unit in (("M parameters", "params", 1e6), ("MMACs", "macs", 1e6), ("ms", "latency_ms", 1)):
        if before[key] is None:
            continue
        told = budget["verdict"] or "not judged" if key.startswith(budget["metric"]) else ""
        ratio = "waiting" if key == "latency_ms" and data.get("waiting") else f"{after[key] / before[key]:.2f}x"
        figures = (significant(before[key] / unit), significant(after[key] / unit))
        rows.append((label, *figures, ratio, told))
    if before["ci"]:
        rows.append(("ms, 95%", *("..".join(map(significant, row["ci"])) for row in (before, after)), "", ""))
    return rows


def _blocks(console: Console, data: Doc) -> None:
    rows = []
    for row in data["blocks"]:
        old, new = row["before"], row["after"]
        if new is None:
            rows.append((row["block"], "removed", *[""] * 5))
        elif old != new:
            rows.append((row["block"], *(change(width(old, key), width(new, key)) for key in WIDTHS)))
    if rows:
        print_table(console, BLOCKS, rows, "prune.json has them")


def _savings(console: Console, data: Doc) -> None:
    rows = []
    for row in data.get("costs") or ():
        saves, rate = (f"{row['ms']:.3f}", significant(1e9 * row["rate"])) if row["shown"] else (why_not(row), "")
        rows.append((row["group"], saves, f"{row['ci'][0]:.3f}..{row['ci'][1]:.3f}", rate))
    if rows:
        print_table(console, COSTS, rows, "prune.json has them")


def width(widths: Doc, key: str) -> str:
    """A width as it is; of heads that differ the least and the most."""
    low, high = widths.get(f"{key}_range", (widths[key], widths[key]))
    if key == "ratio":
        return f"{low:.2f}"
    return f"{low:,.0f}" if low == high else f"{low:,.0f}..{high:,.0f}"


def change(old: str, new: str) -> str:
    """A figure before and after; once where it stayed."""
    return old if old == new else f"{old} -> {new}"
