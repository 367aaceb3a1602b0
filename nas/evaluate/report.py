"""An evaluation's folder for people and other tools: evaluate.json and report.html."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.evaluate.figures import picture_of
from nas.evaluate.words import ECE, best_of, best_ways, headline, p_words, speed_words, told_pairs
from nas.files import replace_file, unwritable
from nas.report.page import render
from nas.units import shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from nas.evaluate.result import EvaluateResult, Mistake, ModelResult

RESULT, REPORT = "evaluate.json", "report.html"
PICTURES = 24
"""Mistakes that are shown of each network."""
SIDE = 132
"""Pixels of a picture's longer side."""
ROWS = 100
"""Classes in a table at most."""
CONFUSED = 12


@dataclass(frozen=True)
class Shot:
    """A mistake with its picture, base64 of a JPEG."""

    mistake: Mistake
    picture: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one network."""

    result: ModelResult
    plot: str
    shots: list[Shot]


@dataclass(frozen=True)
class ClassRow:
    """Top-1 of one class by network, in percent."""

    name: str
    images: int
    top1: list[float]


def write_report(folder: Path, result: EvaluateResult, picture: Callable[[int], Image]) -> None:
    """Write evaluate.json and report.html into `folder`, which exists, each in one step.

    Args:
        picture: gives the judged image of an index.

    Raises:
        DiskFull: there is no room.
        UserError: the folder cannot be written.
    """
    page = _html(result, picture)
    try:
        replace_file(folder / RESULT, json.dumps(result.to_json(), indent=1))
        replace_file(folder / REPORT, page)
    except OSError as error:
        raise unwritable(folder, error) from None


def _html(result: EvaluateResult, picture: Callable[[int], Image]) -> str:
    rows = class_rows(result)
    shown_here = {
        "headline": headline(result),
        "best": best_of(result),
        "told": told_pairs(result),
        "sections": [_section(each, picture) for each in best_ways(result)],
        "rows": rows[:ROWS],
        "more_rows": len(rows) - ROWS,
        "p_words": p_words,
        "ece_words": ECE,
        "speed_words": speed_words(result),
        "confused_rows": CONFUSED,
        "pictures": PICTURES,
    }
    return render(Path(__file__).with_suffix(".html"), {**vars(result), **shown_here}, shown=shown, file=file_name)


def class_rows(result: EvaluateResult) -> list[ClassRow]:
    """The classes, those that the first network recognises worst first."""
    found = [{each.name: each for each in other.per_class} for other in result.results]
    rows = [
        ClassRow(each.name, each.images, [others[each.name].top1 for others in found])
        for each in result.results[0].per_class
    ]
    return sorted(rows, key=lambda row: row.top1[0])


def file_name(path: str) -> str:
    """The last two parts of a path: class and file."""
    return "/".join(Path(path).parts[-2:])


def _section(result: ModelResult, picture: Callable[[int], Image]) -> Section:
    shots = [Shot(each, _jpeg(picture(each.index))) for each in result.mistakes[:PICTURES]]
    return Section(result, base64.b64encode(picture_of(result)).decode(), shots)


def _jpeg(image: Image) -> str:
    small, content = image.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(content, "JPEG", quality=82)
    return base64.b64encode(content.getvalue()).decode()
