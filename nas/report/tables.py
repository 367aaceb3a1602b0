"""Tables and text for a terminal of any width, and for pipes: no figure is ever cut."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from nas.units import shown

PIPE_WIDTH = 10_000
"""In columns: what is read by a program, or kept in a file, is not wrapped."""
LABEL_WIDTH = 16
"""Columns to which a table's labels are folded at most, if nothing else is said."""
GAP = 2


@dataclass(frozen=True)
class Column:
    """A table's column. label: text, which folds where room is short; others hold figures, which are never cut. drop:
    where the table is still too wide, columns are left out, those with the highest number first; 0: never. fold:
    columns to which a label folds at most; 0: it is to be copied, and never folds."""

    name: str
    label: bool = False
    drop: int = 0
    fold: int = LABEL_WIDTH


def print_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], elsewhere: str = "--json has them"
) -> None:
    """Print a table that fits the terminal, and name below it the columns that do not.

    A column without any text is left out silently.

    Args:
        elsewhere: where those columns can be seen.
    """
    cells = {column: [shown(row[i]) for row in rows] for i, column in enumerate(columns)}
    fitting = [column for column in columns if any(cells[column])]
    widest = {column: max(map(len, (column.name, *cells[column]))) for column in fitting}
    least = {column: narrowest(column, cells[column]) for column in fitting}

    def needed() -> int:
        return sum(least[column] for column in fitting) + GAP * (len(fitting) - 1)

    left_out = []
    while needed() > console.width and any(column.drop for column in fitting):
        left_out.append(max(fitting, key=lambda column: column.drop))
        fitting.remove(left_out[-1])
    spare = max(0, console.width - needed())
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in sorted(fitting, key=lambda column: not column.label):  # labels are widened first
        more = min(spare, widest[column] - least[column])
        least[column] += more
        spare -= more
    for column in fitting:
        justify: Literal["left", "right"] = "left" if column.label else "right"
        table.add_column(column.name, justify=justify, width=least[column], overflow="fold", vertical="top")
    for i in range(len(rows)):
        table.add_row(*(cells[column][i] for column in fitting))
    room = console.width
    console.width = max(room, needed())  # a terminal that is narrower still wraps lines
    console.print(table, soft_wrap=False)
    console.width = room
    if left_out:
        names = ", ".join(column.name for column in columns if column in left_out)
        prose(console, f"Columns left out at {room} columns: {names}; {elsewhere}.")


def narrowest(column: Column, cells: Sequence[str]) -> int:
    """The least width of a column: labels down to their `fold`, figures whole, headings folded between words."""
    heading, widest = max(map(len, column.name.split()), default=0), max(map(len, cells), default=0)
    return max(heading, min(widest, column.fold) if column.label and column.fold else widest)


def prose(console: Console, line: str) -> None:
    """Print a line of text, wrapped between words in a terminal; a long path is left in one piece."""
    wide = console.width - (1 if console.is_terminal else 0)
    lines = textwrap.wrap(line, wide, break_long_words=False, break_on_hyphens=False)
    console.print("\n".join(map(shown, lines)), soft_wrap=True)


def console_of(stderr: bool = False) -> Console:
    """A console that squeezes nothing into 80 columns where its output goes to a file or a pipe."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else PIPE_WIDTH
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)
