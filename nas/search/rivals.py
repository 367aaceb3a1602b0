"""timm's published small CNNs that a search without images is held against, where the user names no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nas.measure.budget import Verdict
from nas.networks.timm_network import TIMM
from nas.quality.prior import CLASSES
from nas.quality.published import Published, published
from nas.search.rows import OutsideRow, known
from nas.search.speed import POWER

if TYPE_CHECKING:
    from nas.networks.targets import Target
    from nas.search.request import SearchRequest
    from nas.search.rows import Trial

DESIGNS = ("lcnet", "mobilenetv3", "mobilenetv3_small", "mobilenetv4", "repghostnet", "efficientnet_lite")
"""Families of the table of published networks."""
TOLD = 3
"""Of those within the budget; as many are measured at once after the first."""
FIRST = ((2.0, 2), (1.3, 2), (0.8, 1))
"""How many are measured first, and up to how many times the budget they likely take: the guess is rough."""
NEAR = 1.2
"""Times the budget that further ones likely take at most, by those that were measured."""


def rivals_of(request: SearchRequest, rows: Sequence[Trial], measured: Sequence[OutsideRow] = ()) -> list[Target]:
    """Those to measure next, each at a resolution for which timm has published its top-1: first some that are likely
    within the budget or just above it, then the next best that may be within it, until three are and none that may be
    is better. None where networks are trained, have other classes than ImageNet, or the user has named networks.

    Args:
        rows: trials, whose measurements of the reference network tell how fast this machine is.
        measured: all that were measured so far.
    """
    from nas.networks.targets import find_target
    from nas.search import trial
    from search_spaces import count

    reference = [row.reference_ms for row in rows if row.reference_ms]
    if not reference or request.against or request.quality != "prior" or request.num_classes != CLASSES:
        return []
    unit_ms, macs = statistics.median(reference), count(trial.reference_arch()).macs
    rows_of_size = {(row.family, round(row.macs / 1e6)): row for row in sorted(published(), key=lambda row: row.top1)}
    guesses_ms = {
        row: unit_ms * (row.macs / macs) ** POWER
        for row in sorted(rows_of_size.values(), key=lambda row: -row.top1)  # of equal networks the best recipe
        if row.family in DESIGNS and request.resolution in (None, row.resolution)
    }
    chosen = _further(guesses_ms, request.budget_ms, measured) if measured else _first(guesses_ms, request.budget_ms)
    return [find_target(label_of(row)) for row in chosen]


def _first(guesses_ms: Mapping[Published, float], budget_ms: float) -> list[Published]:
    """guesses_ms: their likely latencies, the best top-1 first."""
    chosen: dict[Published, None] = {}
    for most, number in FIRST:
        found = [row for row, ms in guesses_ms.items() if ms <= most * budget_ms and row not in chosen]
        chosen |= dict.fromkeys(found[:number])
    return list(chosen)


def _further(
    guesses_ms: Mapping[Published, float], budget_ms: float, measured: Sequence[OutsideRow]
) -> list[Published]:
    """The same, corrected by what was measured of the design, the network nearest in size; where none of it was, by
    that which was the fastest for its size."""
    table = {label_of(row): row for row in guesses_ms}
    times = {
        row: one.latency_ms / guesses_ms[row]
        for one in measured
        if one.latency_ms and (row := table.get(one.label)) is not None
    }
    fitting = sorted((one.published_top1 or 0.0 for one in measured if one.verdict == Verdict.FITS), reverse=True)
    least = fitting[TOLD - 1] if len(fitting) >= TOLD else 0.0

    def likely_ms(row: Published) -> float:
        own = [other for other in times if other.family == row.family]
        nearest = min(own, key=lambda other: abs(math.log(other.macs / row.macs)), default=None)
        return guesses_ms[row] * (times[nearest] if nearest else min(times.values()))

    if not times:
        return []
    left = table.keys() - {one.label for one in measured}
    found = [row for label, row in table.items() if label in left and row.top1 > least]
    return [row for row in found if likely_ms(row) <= NEAR * budget_ms][:TOLD]


def label_of(row: Published) -> str:
    """What the command line calls one of timm's."""
    return f"{TIMM}{row.name}@{row.resolution}"


def top1_of(label: str) -> float | None:
    """The published top-1 of a network of timm's at a resolution, percent; None where none is in the table."""
    return next((row.top1 for row in published() if label_of(row) == label), None)


def told_of(rows: Sequence[OutsideRow]) -> list[OutsideRow]:
    """The best of those within the budget, by published top-1; where there is none, the fastest. Last, those that could
    not be measured."""
    failed, measured = [row for row in rows if row.error], [row for row in rows if not row.error]
    fitting = [row for row in measured if row.verdict == Verdict.FITS]
    best = sorted(fitting, key=lambda row: -(row.published_top1 or 0.0))[:TOLD]
    return (best or sorted(measured, key=lambda row: known(row.latency_ms))[:1]) + failed
