"""timm's published networks beside what a search from scratch finds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nas.measure.budget import Verdict
from nas.networks.targets import find_target
from nas.quality.published import published
from nas.search.outcome import Outcome
from nas.search.request import SearchRequest
from nas.search.rivals import DESIGNS, rivals_of, told_of, top1_of
from nas.search.rows import OutsideRow
from nas.search.words import better_line

ROWS = [SimpleNamespace(reference_ms=2.6)]


def request(budget_ms: float = 2.0, **more) -> SearchRequest:
    return SearchRequest(budget_ms, **more)


def test_they_are_the_best_about_the_budget_at_published_resolutions():
    table = {f"timm/{row.name}@{row.resolution}": row for row in published()}
    chosen = [table[target.label] for target in rivals_of(request(), ROWS)]
    assert len({(row.family, row.macs) for row in chosen}) == len(chosen) >= 4, "each in its best recipe"
    assert {row.family for row in chosen} <= set(DESIGNS)
    macs = [row.macs for row in chosen]
    assert max(macs) < 170e6, "none that is far over the budget"
    assert min(macs) < 70e6, "one that is likely within it, should the guess be off"
    every = [row.top1 for row in published() if row.family in DESIGNS and row.macs <= max(macs)]
    assert chosen[0].top1 == max(every)
    larger = rivals_of(request(8.0), ROWS)
    assert max(table[target.label].macs for target in larger) > 300e6
    assert all(target.network.resolution == table[target.label].resolution for target in larger)


@pytest.mark.parametrize(
    "other", [{"num_classes": 10}, {"against": (find_target("levit_128s"),)}, {"resolution": 64}, {"quality": "train"}]
)
def test_none_where_they_do_not_compare(other):
    assert rivals_of(request(**other), ROWS) == []


def test_none_without_a_measured_reference():
    assert rivals_of(request(), []) == []


def row(label: str, verdict: Verdict, ms: float) -> OutsideRow:
    return OutsideRow(label=label, resolution=224, verdict=verdict, latency_ms=ms, published_top1=top1_of(label))


LCNETS = [f"timm/lcnet_{size}.ra2_in1k@224" for size in ("050", "075", "100")]
SMALL = "timm/mobilenetv3_small_100.lamb_in1k@224"


def test_the_three_best_within_the_budget_are_told():
    rows = [row(label, Verdict.FITS, 1.0) for label in (*LCNETS, SMALL)]
    over = row("timm/mobilenetv3_large_100.ra_in1k@224", Verdict.OVER, 3.0)
    assert [each.label for each in told_of([over, *rows])] == [LCNETS[2], LCNETS[1], SMALL]
    slow = [replace(over, latency_ms=ms) for ms in (4.0, 3.0)]
    failed = OutsideRow(label="x", error="killed")
    assert told_of([*slow, failed]) == [slow[1], failed]


def test_a_published_top1_belongs_to_a_resolution():
    assert top1_of("timm/lcnet_050.ra2_in1k@224") == 63.138
    assert top1_of("timm/lcnet_050.ra2_in1k@128") is None
    assert top1_of("timm/lcnet_050") is None
    assert top1_of("levit_128s@224") is None


def outcome(estimate: float, rows: list[OutsideRow], trained: bool = False) -> SimpleNamespace:
    winner = SimpleNamespace(label="trial 7", quality_estimate=estimate, quality_ci=(estimate - 4, estimate + 4))
    found = SimpleNamespace(winner=winner, against=tuple(rows), quality_tier=SimpleNamespace(trained=trained))
    found.better_published = Outcome.better_published.fget(found)
    return found


def test_the_first_line_tells_of_a_published_network_that_is_better():
    rows = [row(LCNETS[0], Verdict.FITS, 1.0), row(LCNETS[2], Verdict.FITS, 1.5)]
    told = better_line(outcome(68.0, rows))
    assert told == (
        "A published network is better: timm/lcnet_100.ra2_in1k@224, with a top-1 of 72.1% on ImageNet and 1.50 ms "
        "here; trial 7 is predicted 68.0% (95%: 64.0 to 72.0)"
    )
    assert better_line(outcome(75.0, rows)) == ""
    assert better_line(outcome(68.0, rows, trained=True)) == ""
    assert better_line(outcome(68.0, [row(LCNETS[2], Verdict.UNSURE, 2.0)])) == "", "it may be over the budget"
