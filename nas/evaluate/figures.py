"""Plots of an evaluation's page: whether a network's confidence is to be trusted, and what it takes for what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nas.report.figures import INK, SOFT, new_figure, plain_axes, png_of
from nas.units import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nas.evaluate.result import ModelResult

MOST_CLASSES = 200
"""Of which a matrix can be looked at."""
MOST_NAMES, MOST_NUMBERS, NAME = 40, 14, 22
ACCENT = "#0b6e58"


def picture_of(result: ModelResult) -> bytes:
    """As PNG: accuracy by confidence and, of few enough classes, the confusion matrix."""
    names = rows_of(result)
    if len(names) > MOST_CLASSES:
        figure = new_figure(4.6, 3.6)
        _calibration(figure.subplots(), result)
        return png_of(figure)
    side = min(8.5, max(4.2, 1.6 + 0.16 * len(names)))
    figure = new_figure(3.6 + side, side)
    one, other = figure.subplots(1, 2, width_ratios=(3.6, side))
    _calibration(one, result)
    one.set_box_aspect(1)
    one.set_anchor("N")
    _matrix(other, result, names)
    return png_of(figure)


def rows_of(result: ModelResult) -> list[str]:
    """Classes of the images, then what else images were taken for."""
    own = [each.name for each in result.per_class]
    return list(dict.fromkeys([*own, *(cell.predicted for cell in result.confusion)]))


def _calibration(axes: Axes, result: ModelResult) -> None:
    plain_axes(axes)
    filled = [each for each in result.calibration if each.images]
    axes.bar(
        [(each.low + each.high) / 2 for each in filled],
        [each.accuracy or 0 for each in filled],
        width=1 / len(result.calibration) - 0.008,
        color="#7fb3a5",
    )
    most = max(each.images for each in filled)
    axes.scatter(
        [each.confidence or 0 for each in filled],
        [each.accuracy or 0 for each in filled],
        s=[8 + 60 * each.images / most for each in filled],
        color=ACCENT,
        zorder=3,
    )
    axes.plot((0, 1), (0, 1), color=SOFT, lw=1, ls="--")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("confidence", color=SOFT)
    axes.set_ylabel("share that is right", color=SOFT)
    axes.set_title(f"calibration error {result.ece:.1f}%", loc="left", fontsize=10.5, color=INK)


def _matrix(axes: Axes, result: ModelResult, names: list[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    own = [each.name for each in result.per_class]
    place = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(own), len(names)), int)
    for cell in result.confusion:
        counts[place[cell.truth], place[cell.predicted]] += cell.images
    shares = counts / counts.sum(1, keepdims=True)
    colours = LinearSegmentedColormap.from_list("", ("#ffffff", ACCENT))
    axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), aspect="equal", interpolation="nearest")
    if len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, parse_math=False)
        axes.set_yticks(range(len(own)), [_short(name) for name in own], parse_math=False)
    else:
        axes.set(xticks=[], yticks=[])
    if len(names) <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.35 else INK
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.spines[:].set_color("#e1e5ea")
    axes.set_xlabel("taken for", color=SOFT)
    axes.set_ylabel("class of the image", color=SOFT)
    axes.set_title("share of each class's images", loc="left", fontsize=10.5, color=INK)


def _short(name: str) -> str:
    plain = shown(name)
    return plain if len(plain) <= NAME else plain[: NAME - 1] + "…"
