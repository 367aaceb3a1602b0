"""Plots: one look for every figure of a report."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# One pair a family, in alphabetical order: shapes, and colours after Okabe and Ito for colour-blind readers.
COLOURS = ("#D55E00", "#009E73", "#0072B2", "#E69F00", "#B5539C", "#3A8FB7", "#7A6A00", "#555555")


MARKERS = "s^ovDPXh"


INK, SOFT = "#1d2733", "#6b7580"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    """A figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def plain_axes(axes: Axes) -> None:
    """The reports' look: a faint grid behind, no box."""
    axes.grid(color="#e6e9ed", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a94a0")
    axes.tick_params(colors=INK, labelsize=10.5, length=3)
