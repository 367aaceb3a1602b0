"""The papers' rows as a table on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.bench.papers.suite import settings_words
from nas.measure.runtime import Settings

if TYPE_CHECKING:
    from rich.console import Group

COLUMNS = (
    *("id", "paper", "claim", "subject", "baseline", "quantity", "claimed", "claimed_on", "measured"),
    *("ci_low", "ci_high", "subject_ms", "baseline_ms", "runtime", "device", "precision", "batch_size", "threads"),
    *("verdict", "why", "note", "error", "conditions", "source"),
)
Row = Mapping[str, Any]
NONE = "-"


def papers_table(rows: Sequence[Row]) -> Group:
    """A line per claim, claimed beside measured; below, each claim in words with what other settings gave."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("claim", "claimed", "measured (95%)", "ms (baseline's)", "on", "verdict"):
        table.add_column(name, justify="left" if name in ("claim", "on", "verdict") else "right", overflow="fold")
    for row in rows:
        table.add_row(row["id"], _claimed(row), _measured(row), _ms(row), _on(row), row["error"] or row["verdict"])
    words = [f"{row['id']}: {'. '.join(filter(None, (row['claim'], row['why'], row['note'])))}." for row in rows]
    return Group(table, Text(), *map(Text, words))


def papers_markdown(result: Mapping[str, Any]) -> str:
    """The result of `run_papers` as Markdown: one table of claims, one of each block's parts."""
    lines = [
        "| paper | claim | claimed | measured (95%) | ms (baseline's) | on | verdict | elsewhere |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        verdict = row["error"] or row["verdict"]
        elsewhere = ". ".join(filter(None, (row["why"], row["note"])))
        cells = (row["paper"], row["claim"], _claimed(row), _measured(row), _ms(row), _on(row), verdict, elsewhere)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    for row in result["rows"]:
        if row["parts"] and "part" in row["parts"][0]:
            lines += ["", *_parts(row)]
    return "\n".join(lines) + "\n"


def papers_csv(rows: Sequence[Row]) -> bytes:
    """A line per claim; lists (parts, other settings) are in the JSON only, and in words under "why"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = row["ci"] or (None, None)
        writer.writerow({**row, "ci_low": low, "ci_high": high})
    return text.getvalue().encode()


def _parts(row: Row) -> list[str]:
    lines = [
        f"| part ({_on(row)}) | {row['subject']}: paper us | here us | {row['baseline']}: paper us | here us |",
        "|---|---|---|---|---|",
    ]
    total = {"part": "whole block", "measured_us": [_us(row["subject_ms"]), _us(row["baseline_ms"])]}
    total["published_us"] = [row["published"][0]["subject"], row["published"][0]["baseline"]]
    for part in [*row["parts"], total]:
        pairs = zip(part["published_us"], part["measured_us"], strict=True)
        cells = [NONE if value is None else f"{value:.0f}" for pair in pairs for value in pair]
        lines.append(f"| {part['part']} | {' | '.join(cells)} |")
    return lines


def _us(ms: float | None) -> float | None:
    return None if ms is None else 1000 * ms


def _claimed(row: Row) -> str:
    if row["claimed"] is None:
        return NONE
    return f"{'about ' if row['caveat'] else ''}{row['claimed']:.2f}x ({row['claimed_on']})"


def _measured(row: Row) -> str:
    if row["measured"] is None:
        return NONE
    value = f"{row['measured']:.2f}" + ("x" if row["baseline_ms"] is not None else "")
    return f"{value} [{row['ci'][0]:.2f}, {row['ci'][1]:.2f}]" if row["ci"] else value


def _ms(row: Row) -> str:
    return NONE if row["subject_ms"] is None else f"{row['subject_ms']:.2f} ({row['baseline_ms']:.2f})"


def _on(row: Row) -> str:
    return settings_words(Settings(**{name: row[name] for name in Settings.__dataclass_fields__}))
