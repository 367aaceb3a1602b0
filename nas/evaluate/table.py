"""An evaluation on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.evaluate.words import (
    FEW,
    comparison_words,
    headline,
    images_words,
    p_words,
    pair_words,
    speed_words,
    told_pairs,
)
from nas.report.tables import Column, console_of, print_table, prose
from nas.units import shown

if TYPE_CHECKING:
    from nas.evaluate.pairs import Pair
    from nas.evaluate.result import EvaluateResult, ModelResult

WORST = 3
"""Classes and mistakes that are named of each network."""
BRIEF = "ECE: expected calibration error, 15 bins."
COLUMNS = (
    Column("network", label=True, fold=40),
    Column("runtime", label=True, drop=1),
    Column("top-1"),
    Column("95%"),
    Column("top-5", drop=3),
    Column("ECE", drop=2),
    Column("ms", drop=4),
    Column("img/s", drop=5),
)
AGAINST = (Column("points to the best"), Column("95% of that", drop=6), Column("p", drop=7))


def show_evaluation(result: EvaluateResult, stderr: bool = False) -> None:
    """Print the answer, the table, the comparisons, what is worst, and the notes."""
    console = console_of(stderr)
    pairs, two = told_pairs(result), len(result.results) == 2
    prose(console, f"{pair_words(pairs[0]) if two else headline(result)}.")
    prose(console, f"{images_words(result)}.")
    if len(result.results) <= FEW:
        print_table(console, COLUMNS, [_cells(each) for each in result.results])
        for pair in () if two else pairs:
            prose(console, f"{pair_words(pair)}.")
    else:
        against = {pair.second: _against(pair) for pair in pairs}
        rows = [(*_cells(each), *against.get(each.label, ("best", "", ""))) for each in result.results]
        print_table(console, (*COLUMNS, *AGAINST), rows)
    for each in result.results:
        if len(result.results) <= FEW:
            prose(console, worst(each))
    for line in result.notes:
        prose(console, shown(line))
    test = f" {comparison_words(result)}" if result.pairs else ""
    prose(console, f"Intervals: 95%, Wilson's.{test} {BRIEF} {speed_words(result)}".rstrip())


def worst(each: ModelResult) -> str:
    """The classes that a network recognises worst, and what it confuses most, in a line."""
    classes = sorted(each.per_class, key=lambda one: one.top1)[:WORST]
    named = ", ".join(f"{shown(one.name)} {one.top1:.0f}%" for one in classes)
    confused = ", ".join(
        f"{shown(cell.truth)} for {shown(cell.predicted)} ({cell.images})" for cell in each.confused[:WORST]
    )
    return f"{shown(each.label)}: lowest {named}" + (f"; takes most often {confused}" if confused else "") + "."


def _against(pair: Pair) -> tuple[str, str, str]:
    """Against the best, which comes first."""
    low, high = pair.difference_ci
    return f"{'tie ' if pair.tie else ''}{pair.difference:+.1f}", f"{low:+.1f}..{high:+.1f}", p_words(pair.p_adjusted)


def _cells(each: ModelResult) -> tuple[str, ...]:
    speed = each.speed
    return (
        each.label,
        f"{each.runtime} {each.precision}",
        f"{each.top1:.1f}%",
        "{:.1f}..{:.1f}".format(*each.top1_ci),
        "" if each.top5 is None else f"{each.top5:.1f}%",
        f"{each.ece:.1f}%",
        "" if speed is None else "waiting" if speed.waiting else f"{speed.latency_ms:.3f}",
        "" if speed is None or speed.waiting else f"{speed.throughput:.0f}",
    )
