"""What the size prior says now of trials that an older vitnas has scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.networks.counts import counts_of
from nas.search.rows import Trial, candidate_of, known

if TYPE_CHECKING:
    from nas.quality.tier import Tier

SAME = 0.05
"""Points up to which two scores are one: they are printed with one decimal."""
PREDICTED_AGAIN = "an earlier prior scored {} of the {} trials, and chose what was tried: they are predicted again"


def repredict(tier: Tier, rows: Sequence[Trial]) -> tuple[list[Trial], str]:
    """Trials with what the tier predicts of their networks now, so that all are on one scale, and a line that says so;
    "" where nothing changes.

    Args:
        tier: one that trains nothing.
    """
    found = []
    for row in rows:
        if row.complete:
            candidate = candidate_of(row)
            now = tier.predict(candidate, counts_of(candidate.network))
            if abs(now.score - known(row.quality)) > SAME:
                row = dataclasses.replace(
                    row,
                    quality=now.score,
                    quality_estimate=now.value,
                    quality_ci=(now.interval.low, now.interval.high),
                    quality_how=now.how,
                )
        found.append(row)
    changed = sum(now is not row for now, row in zip(found, rows, strict=True))
    return found, PREDICTED_AGAIN.format(changed, len(rows)) if changed else ""
