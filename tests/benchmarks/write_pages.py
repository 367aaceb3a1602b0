"""Write the pages of docs/ whose content is data: the benchmarks' results, and the options of every family's axes.

    python tests/benchmarks/write_pages.py

A results page is one file of `tests/benchmarks/results/`. To publish a new figure, edit that file (command, machine and
date included), run this script, and commit both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PAGES = ROOT / "docs"
NOTE = "<!-- Written by tests/benchmarks/write_pages.py from {source}: edit that, not this page. -->"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Section(Record):
    """One measurement.

    machine, software, date (YYYY-MM-DD), command: as it was measured; None where that is not recorded.
    text, reading: Markdown paragraphs above and below the table. rows: cells, as many as columns.
    """

    heading: str
    machine: str | None
    software: str | None
    date: str | None
    command: str | None
    text: list[str]
    columns: list[str]
    rows: list[list[str]]
    reading: list[str]

    def markdown(self) -> str:
        facts = [fact for fact in (self.date, self.machine, self.software) if fact]
        return _paragraphs(
            f"## {self.heading}",
            f"*{'; '.join(facts)}*" if facts else "",
            f"```sh\n{self.command}\n```" if self.command else "",
            *self.text,
            markdown_table(self.columns, self.rows) if self.columns else "",
            *self.reading,
        )


class Page(Record):
    """A page of measurements that answer one question."""

    title: str
    about: str
    sections: list[Section]

    def markdown(self, source: str) -> str:
        sections = [section.markdown() for section in self.sections]
        return _paragraphs(NOTE.format(source=source), f"# {self.title}", self.about, *sections) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Raises ValueError for a row that has not one cell per column."""
    lines = [columns, ["---"] * len(columns), *rows]
    if any(len(line) != len(columns) for line in lines):
        raise ValueError(f"not one cell per column: {', '.join(columns)}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options_page() -> str:
    """Every option of every axis, family by family."""
    from search_spaces import api  # noqa: F401  (registers the families)
    from search_spaces.registry import FAMILIES

    parts = [
        NOTE.format(source="search_spaces/"),
        "# Options of every axis",
        "What a search chooses from, for each family. A trial suggests an integer from 0 to 6 for every parameter; the "
        "family maps it to one of these options, in this order. [The five axes](axes.md) says what they mean. `_s1` is "
        "the first stage.",
    ]
    for name, family in FAMILIES.items():
        rows = [[f"`{axis}`", ", ".join(map(_option, options))] for axis, options in family.space.options.items()]
        parts += [f"## {name}", markdown_table(("parameter", "options"), rows)]
    return _paragraphs(*parts) + "\n"


def pages() -> dict[Path, str]:
    """Path -> content of every page that this script writes."""
    found = {PAGES / "reference" / "options.md": options_page()}
    for path in sorted(RESULTS.glob("*.json")):
        page = Page.model_validate_json(path.read_bytes())
        found[PAGES / "results" / f"{path.stem}.md"] = page.markdown(path.relative_to(ROOT).as_posix())
    return found


def _option(option: object) -> str:
    return f"({', '.join(map(str, option))})" if isinstance(option, tuple) else str(option)


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content)
