"""The end of a pruning in a terminal: what changed, what it cost and bought, and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nas.intervals import top1_words
from nas.measure.budget import Verdict
from nas.prune.records import ACCURACIES, BudgetRow, PriceRow, PruneResult
from nas.prune.request import Metric, show
from nas.prune.savings import Saving
from nas.prune.widths import Block, BlockWidths
from nas.prune.words import control_words, measure_of, next_steps, tuning_words
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
FILES = ("arch.json", "model.safetensors", "model.onnx", "model.int8.onnx", "model.fp16.onnx", "prune.json")


def show_prune(result: PruneResult, folder: Path, to_stderr: bool) -> None:
    """Print a pruning's result."""
    console = console_of(to_stderr)
    waiting = result.waiting
    if waiting:
        prose(console, f"{waiting[:1].upper()}{waiting[1:]}.")
    _blocks(console, result.parts.blocks)
    if line := grown_line(result.parts.blocks):
        prose(console, line)
    _savings(console, result.parts.costs or ())
    print_table(console, COUNTS, count_rows(result), "prune.json has them")
    before, after = result.before.ci, result.after.ci
    if before and after and not waiting and before[0] <= after[1] and after[0] <= before[1]:
        prose(console, "The latencies are a tie: their 95% intervals overlap.")
    for which, words in ACCURACIES.items():
        if found := result.accuracy.of(which):
            prose(console, f"{words}: {top1_words(found.top1, found.top1_ci, found.images, what=measure_of(result))}")
    if line := tuning_words(result):
        prose(console, line)
    if line := control_words(result):
        prose(console, line)
    for line in result.failures:
        prose(console, line)
    prose(console, f"{headline(result.budget, result.price)}.")
    files = [name for name in FILES if (folder / name).is_file()]
    prose(console, f"Network: {folder} ({', '.join(files)})")
    if (folder / "report.html").is_file():
        prose(console, f"Report: {folder / 'report.html'}")
    for what, command in next_steps(folder, result)[:2]:
        console.print(f"{what}: {command}")  # not wrapped, so that it can be copied


def grown_line(blocks: Sequence[Block]) -> str | None:
    """Which widths of the blocks reallocation has grown; None where none."""
    both = [(row.before, row.after) for row in blocks if row.after is not None]
    grown = [
        column.name
        for name, column in zip(WIDTHS, BLOCKS[1:], strict=True)
        if name != "ratio" and any(new.ends(name)[1] > old.ends(name)[1] for old, new in both)
    ]
    if not grown:
        return None
    return f"Parameters were reallocated: {listed(grown, len(grown))} grew; --no-reallocate leaves that out."


def headline(budget: BudgetRow, price: PriceRow | None = None) -> str:
    """Whether the network loses too much in its precision, and the budget is met, by which figures."""
    if price and price.refusal:
        return f"Infeasible: {price.refusal}. {headline(budget)}"
    asked = f"Budget {budget.metric} {budget.text}"
    if budget.reached is None or budget.target is None:
        return f"{asked}: not measured"
    if budget.verdict is None:
        return f"{asked}: not judged, the latencies are waiting times"
    verdict = {
        Verdict.FITS: "met",
        Verdict.OVER: "NOT met",
        Verdict.UNSURE: "may be met or not, too close to tell",
    }[budget.verdict]
    by = f"{show(budget.metric, budget.reached)} for {show(budget.metric, budget.target)}"
    if budget.interval:
        low, high = budget.interval
        by += f", 95%: {significant(low)} to {significant(high)} ms in the closing run"
    return f"{asked}: {verdict} ({by})"


def count_rows(result: PruneResult) -> list[Sequence[str]]:
    """Rows of `COUNTS`: parameters, MACs, latency and its interval; the budget's verdict at what it is for."""
    budget = result.budget
    rows: list[Sequence[str]] = []
    metrics: list[tuple[str, Metric, float]] = [
        ("M parameters", "params", 1e6),
        ("MMACs", "macs", 1e6),
        ("ms", "latency", 1),
    ]
    for label, metric, unit in metrics:
        before, after = result.before.cost(metric), result.after.cost(metric)
        if before is None or after is None:
            continue
        told = budget.verdict or "not judged" if metric == budget.metric else ""
        ratio = "waiting" if metric == "latency" and result.waiting else f"{after / before:.2f}x"
        rows.append((label, significant(before / unit), significant(after / unit), ratio, told))
    if result.before.ci and result.after.ci:
        ends = ("..".join(map(significant, ci)) for ci in (result.before.ci, result.after.ci))
        rows.append(("ms, 95%", *ends, "", ""))
    return rows


def _blocks(console: Console, blocks: Sequence[Block]) -> None:
    rows: list[Sequence[str]] = []
    for row in blocks:
        old, new = row.before, row.after
        if new is None:
            rows.append((row.block, "removed", *[""] * 5))
        elif old != new:
            rows.append((row.block, *(change(width(old, name), width(new, name)) for name in WIDTHS)))
    if rows:
        print_table(console, BLOCKS, rows, "prune.json has them")


def _savings(console: Console, costs: Sequence[Saving]) -> None:
    rows: list[Sequence[str]] = []
    for saving in costs:
        saves, rate = f"{saving.ms:.3f}", significant(1e9 * saving.rate)
        if saving.fixed_ms:
            saves += f" ({saving.fixed_ms:.3f} at any width)"
        if not saving.shown:
            saves, rate = saving.why_not, ""
        rows.append((saving.group, saves, f"{saving.ci[0]:.3f}..{saving.ci[1]:.3f}", rate))
    if rows:
        print_table(console, COSTS, rows, "prune.json has them")


def width(widths: BlockWidths, name: str) -> str:
    """A width as it is; of heads that differ the least and the most."""
    low, high = widths.ends(name)
    if name == "ratio":
        return f"{low:.2f}"
    return f"{low:,.0f}" if low == high else f"{low:,.0f}..{high:,.0f}"


def change(old: str, new: str) -> str:
    """A figure before and after; once where it stayed."""
    return old if old == new else f"{old} -> {new}"
