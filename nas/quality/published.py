"""The table of published networks: those that the size prior is fitted to (ImageNet-1k only, 30 MMACs to 6 GMACs, one
row a network and recipe), and every recipe and resolution of the designs that a search is held against.

`tests/benchmarks/write_published.py` writes it. It holds facts alone.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Published:
    """A published network and its recipe."""

    name: str
    """Ours, or timm's with its tag."""
    family: str
    """What networks of one design share; ours for the five families."""
    params: int
    """Trainable parameters, with 1000 classes."""
    macs: int
    """Multiply-accumulates of one image by fvcore's rules, with attention's products and without BatchNorm."""
    resolution: int
    """Side of the images that top-1 was measured at, in pixels."""
    distilled: bool
    """Whether another network taught it."""
    top1: float
    """On the 50,000 validation images of ImageNet-1k, in percent."""
    source: str
    """Where its top-1 is from."""
    fit: bool
    """Whether the size prior is fitted to it: no design outweighs others."""


@functools.cache
def published() -> tuple[Published, ...]:
    """All rows of the table."""
    with TABLE.open(newline="") as file:
        return tuple(
            Published(
                name=row["name"],
                family=row["family"],
                params=int(row["params"]),
                macs=int(row["macs"]),
                resolution=int(row["resolution"]),
                distilled=row["distilled"] == "1",
                top1=float(row["top1"]),
                source=row["source"],
                fit=row["fit"] == "1",
            )
            for row in csv.DictReader(file)
        )
