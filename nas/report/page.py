"""Pages: one template environment and the forms of figures that every report uses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.units import counted

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: Path, data: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """The page that a template makes of data; it may extend `page.html`. All text is escaped; undefined names are
    errors. filters: the template's own, beside those of all pages."""
    pages = _pages(template.parent)
    pages.filters |= filters
    return pages.get_template(template.name).render(data)


@functools.cache
def _pages(folder: Path) -> Environment:
    """The templates of a folder, each of which is compiled once."""
    import jinja2

    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"significant": significant, "points": points, "millions": millions, "duration": duration}
    return pages


def significant(value: float | None) -> str:
    """`value` in plain decimals with three significant digits at least (1234.5 as 1,234); a dash for None."""
    if value is None:
        return "–"
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def points(value: float | None) -> str:
    """A percentage to a tenth; a dash for None."""
    return "–" if value is None else f"{value:.1f}"


def millions(value: float | None) -> str:
    """Millions of parameters or MACs with their unit letter (M, G); a dash for None."""
    if value is None:
        return "–"
    return f"{significant(value / 1000)} G" if value >= 1000 else f"{significant(value)} M"


def duration(seconds: float) -> str:
    """Seconds as people say them: 2.35 s, 4 min 41 s, 1 h 2 min."""
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def conditions(settings: dict[str, Any]) -> str:
    """What a latency is a property of, besides the network and the machine, in words."""
    runtime = f"{settings['runtime']} {settings['precision']}"
    threads = counted(settings["threads"], "thread")
    return f"{runtime}, {settings['device']}, {threads}, batch {settings['batch_size']}"


def wall_seconds(data: dict[str, Any]) -> float:
    """From the run's start to its end."""
    return (datetime.fromisoformat(data["finished"]) - datetime.fromisoformat(data["started"])).total_seconds()
