"""The papers' rows as a table on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.bench.papers.rows import MeasuredPart, PapersResult, PapersRow
from nas.bench.papers.suite import settings_words

if TYPE_CHECKING:
    from rich.console import Group

COLUMNS = (
    *("id", "paper", "claim", "subject", "baseline", "quantity", "claimed", "claimed_on", "measured"),
    *("ci_low", "ci_high", "subject_ms", "baseline_ms", "runtime", "device", "precision", "batch_size", "threads"),
    *("verdict", "why", "note", "error", "conditions", "source"),
)
NONE = "-"


def papers_table(rows: Sequence[PapersRow]) -> Group:
    """A line per claim, claimed beside measured; below, each claim in words with what other settings gave."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("claim", "claimed", "measured (95%)", "ms (baseline's)", "on", "verdict"):
        table.add_column(name, justify="left" if name in ("claim", "on", "verdict") else "right", overflow="fold")
    for row in rows:
        table.add_row(row.claim.id, _claimed(row), _measured(row), _ms(row), _on(row), _verdict(row))
    words = [
        f"{row.claim.id}: {'. '.join(filter(None, (row.claim.statement, row.why, row.claim.note)))}." for row in rows
    ]
    return Group(table, Text(), *map(Text, words))


def papers_markdown(result: PapersResult) -> str:
    """The result of `run_papers` as Markdown: one table of claims, one of each block's parts."""
    lines = [
        "| paper | claim | claimed | measured (95%) | ms (baseline's) | on | verdict | elsewhere |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result.rows:
        claim = row.claim
        elsewhere = ". ".join(filter(None, (row.why, claim.note)))
        measured = (_claimed(row), _measured(row), _ms(row), _on(row), _verdict(row))
        cells = (claim.paper, claim.statement, *measured, elsewhere)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    for row in result.rows:
        parts = [part for part in row.parts if isinstance(part, MeasuredPart)]
        if parts:
            lines += ["", *_parts(row, parts)]
    return "\n".join(lines) + "\n"


def papers_csv(rows: Sequence[PapersRow]) -> bytes:
    """A line per claim; lists (parts, other settings) are in the JSON only, and in words under "why"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = row.outcome.ci or (None, None)
        writer.writerow({**row.to_json(), "ci_low": low, "ci_high": high})
    return text.getvalue().encode()


def _parts(row: PapersRow, parts: Sequence[MeasuredPart]) -> list[str]:
    claim, found = row.claim, row.outcome
    lines = [
        f"| part ({_on(row)}) | {claim.subject}: paper us | here us | {claim.baseline}: paper us | here us |",
        "|---|---|---|---|---|",
    ]
    published = claim.published[0]
    total = MeasuredPart(
        "whole block", (published.subject, published.baseline), (_us(found.subject_ms), _us(found.baseline_ms))
    )
    for part in [*parts, total]:
        pairs = zip(part.published_us, part.measured_us, strict=True)
        cells = [NONE if value is None else f"{value:.0f}" for pair in pairs for value in pair]
        lines.append(f"| {part.part} | {' | '.join(cells)} |")
    return lines


def _us(ms: float | None) -> float | None:
    return None if ms is None else 1000 * ms


def _claimed(row: PapersRow) -> str:
    if row.outcome.claimed is None:
        return NONE
    return f"{'about ' if row.caveat else ''}{row.outcome.claimed:.2f}x ({row.claimed_on})"


def _measured(row: PapersRow) -> str:
    found = row.outcome
    if found.measured is None:
        return NONE
    value = f"{found.measured:.2f}" + ("x" if found.baseline_ms is not None else "")
    return f"{value} [{found.ci[0]:.2f}, {found.ci[1]:.2f}]" if found.ci else value


def _ms(row: PapersRow) -> str:
    found = row.outcome
    return NONE if found.subject_ms is None else f"{found.subject_ms:.2f} ({found.baseline_ms:.2f})"


def _on(row: PapersRow) -> str:
    return settings_words(row.settings)


def _verdict(row: PapersRow) -> str:
    return row.outcome.error or row.outcome.verdict
