"""timm's published small CNNs that a search from scratch is held against, where the user names no network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.measure.budget import Verdict
from nas.networks.timm_network import TIMM
from nas.quality.prior import CLASSES
from nas.quality.published import published
from nas.search.rows import OutsideRow, known
from nas.search.speed import POWER

if TYPE_CHECKING:
    from nas.networks.targets import Target
    from nas.search.request import SearchRequest
    from nas.search.rows import Trial

DESIGNS = ("lcnet", "mobilenetv3", "mobilenetv3_small", "mobilenetv4", "repghostnet", "efficientnet_lite")
"""Families of the table of published networks."""
TOLD = 3
"""Of those within the budget."""
MEASURED = ((2.0, 2), (1.3, 2), (0.8, 1))
"""How many are measured, and up to how many times the budget they likely take: the guess is rough."""


def rivals_of(request: SearchRequest, rows: Sequence[Trial]) -> list[Target]:
    """Those with the best published top-1 that are likely within the budget or just above it, each at the resolution of
    that top-1; none where networks are trained, have other classes than ImageNet, or the user has named networks.

    Args:
        rows: trials, whose measurements of the reference network tell how fast this machine is.
    """
    from nas.networks.targets import find_target
    from nas.search import trial
    from search_spaces import count

    reference = [row.reference_ms for row in rows if row.reference_ms]
    if not reference or request.against or request.quality != "prior" or request.num_classes != CLASSES:
        return []
    unit_ms, macs = statistics.median(reference), count(trial.reference_arch()).macs
    rows_of_size = {(row.family, round(row.macs / 1e6)): row for row in sorted(published(), key=lambda row: row.top1)}
    likely = {
        row.name: unit_ms * (row.macs / macs) ** POWER / request.budget_ms
        for row in sorted(rows_of_size.values(), key=lambda row: -row.top1)  # of equal networks the best recipe
        if row.family in DESIGNS and request.resolution in (None, row.resolution)
    }
    chosen: dict[str, None] = {}
    for most, number in MEASURED:
        names = [name for name, times in likely.items() if times <= most and name not in chosen]
        chosen |= dict.fromkeys(names[:number])
    sizes = {row.name: row.resolution for row in published()}
    return [find_target(f"{TIMM}{name}@{sizes[name]}") for name in chosen]


def top1_of(label: str) -> float | None:
    """The published top-1 of a network of timm's at a resolution, percent; None where none is in the table."""
    name, _, size = label.removeprefix(TIMM).partition("@")
    found = (row.top1 for row in published() if (row.name, str(row.resolution)) == (name, size))
    return next(found, None) if label.startswith(TIMM) else None


def told_of(rows: Sequence[OutsideRow]) -> list[OutsideRow]:
    """The best of those within the budget, by published top-1; where there is none, the fastest. Last, those that could
    not be measured."""
    failed, measured = [row for row in rows if row.error], [row for row in rows if not row.error]
    fitting = [row for row in measured if row.verdict == Verdict.FITS]
    best = sorted(fitting, key=lambda row: -(row.published_top1 or 0.0))[:TOLD]
    return (best or sorted(measured, key=lambda row: known(row.latency_ms))[:1]) + failed
