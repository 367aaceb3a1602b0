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
from nas.search.rivals import DESIGNS, NEAR, TOLD, label_of, rivals_of, told_of, top1_of
from nas.search.rows import OutsideRow
from nas.search.words import better_line

ROWS = [SimpleNamespace(reference_ms=2.6)]
TABLE = {label_of(row): row for row in published() if row.family in DESIGNS}


def request(budget_ms: float = 2.0, **more) -> SearchRequest:
    return SearchRequest(budget_ms, **more)


def test_the_table_has_every_recipe_at_every_resolution_that_timm_has_published():
    found = {
        "repghostnet_080.in1k@224": 72.24,
        "repghostnet_130.in1k@224": 76.378,
        "mobilenetv3_small_050.lamb_in1k@224": 57.918,
        "mobilenetv3_large_100.ra4_e3600_r224_in1k@224": 76.31,
        "mobilenetv3_large_100.ra4_e3600_r224_in1k@256": 77.182,
        "mobilenetv4_conv_small.e2400_r224_in1k@256": 74.644,
    }
    assert {label: top1_of(f"timm/{label}") for label in found} == found
    assert len(TABLE) == 51
    for label, row in TABLE.items():
        assert find_target(label).network.resolution == row.resolution, "timm has these weights"


def test_they_are_the_best_about_the_budget_at_published_resolutions():
    chosen = [TABLE[target.label] for target in rivals_of(request(), ROWS)]
    assert len({(row.family, row.macs) for row in chosen}) == len(chosen) >= 4, "each in its best recipe"
    macs = [row.macs for row in chosen]
    assert max(macs) < 170e6, "none that is far over the budget"
    assert min(macs) < 70e6, "one that is likely within it, should the guess be off"
    assert chosen[0].top1 == max(row.top1 for row in TABLE.values() if row.macs <= max(macs))
    larger = rivals_of(request(8.0), ROWS)
    assert max(TABLE[target.label].macs for target in larger) > 300e6
    assert all(target.network.resolution == TABLE[target.label].resolution for target in larger)


def looked(budget_ms: float, ms_per_mmac: dict[str, float]) -> list[OutsideRow]:
    """All that are measured at a budget in turn, where networks of a design take so long for a million MACs, those of
    others 0.02 ms."""
    rows: list[OutsideRow] = []
    while more := rivals_of(request(budget_ms), ROWS, rows):
        for target in more:
            assert target.label not in {row.label for row in rows}
            network = TABLE[target.label]
            ms = ms_per_mmac.get(network.family, 0.02) * network.macs / 1e6
            rows.append(row(target.label, Verdict.FITS if ms <= budget_ms else Verdict.OVER, ms))
    return rows


@pytest.mark.parametrize(
    "slow", [{}, {"repghostnet": 0.08, "mobilenetv3_small": 0.05}, {"lcnet": 0.005, "mobilenetv4": 0.008}]
)
def test_the_next_best_are_measured_until_three_fit_and_none_that_is_better_may(slow):
    """Whatever their designs take for the multiply-accumulates that the first guess goes by."""

    def ms(network) -> float:
        return slow.get(network.family, 0.02) * network.macs / 1e6

    rows = looked(2.0, slow)
    told = [each.published_top1 for each in told_of(rows)]
    fitting = {}  # of equal networks the best recipe
    for network in TABLE.values():
        if ms(network) <= 2.0:
            size = network.family, round(network.macs / 1e6)
            fitting[size] = max(network.top1, fitting.get(size, 0.0))
    assert told == sorted(fitting.values(), reverse=True)[:TOLD]
    assert len(rows) < len(TABLE) / 2


def test_none_is_measured_without_end():
    failed = [OutsideRow(label=target.label, error="killed") for target in rivals_of(request(), ROWS)]
    assert rivals_of(request(), ROWS, failed) == [], "nothing tells how fast the others are"
    over = [replace(each, error="", verdict=Verdict.OVER, latency_ms=2 * NEAR * 2.0) for each in failed]
    assert rivals_of(request(), ROWS, over) == [], "by these, no other is likely within the budget"


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


def outcome(
    estimate: float | None,
    rows: list[OutsideRow],
    trained: bool = False,
    final: tuple[OutsideRow, ...] = (),
    published_top1: float | None = None,
) -> SimpleNamespace:
    """estimate: of the winner; None: there is none."""
    winner = estimate and SimpleNamespace(
        label="trial 7",
        quality_estimate=estimate,
        quality_ci=(estimate - 4, estimate + 4),
        published_top1=published_top1,
    )
    found = SimpleNamespace(
        winner=winner, against=tuple(rows), final=final, quality_tier=SimpleNamespace(trained=trained), budget="2 ms"
    )
    found.better_published = Outcome.better_published.fget(found)
    return found


def test_the_first_line_tells_of_a_published_network_that_is_better():
    rows = [row(LCNETS[0], Verdict.FITS, 1.0), row(LCNETS[2], Verdict.FITS, 1.5)]
    told = better_line(outcome(68.0, rows))
    better = (
        "A published network is better: timm/lcnet_100.ra2_in1k@224, with a top-1 of 72.1% on ImageNet and 1.50 ms here"
    )
    assert told == f"{better}; trial 7 is predicted 68.0% (95%: 64.0 to 72.0)"
    tie = better_line(outcome(70.0, rows))
    assert tie.startswith("A published network is likely as good or better, a tie by the prediction's interval: timm/")
    assert better_line(outcome(75.0, rows)) == ""
    assert better_line(outcome(68.0, rows, trained=True)) == ""
    assert better_line(outcome(68.0, [row(LCNETS[2], Verdict.UNSURE, 2.0)])) == "", "it may be over the budget"
    assert better_line(outcome(68.0, [], final=(rows[1],))).startswith(better), "one of ours in the final table"
    assert better_line(outcome(68.0, rows, published_top1=73.0)) == "", "what was published of the winner counts"
    assert better_line(outcome(75.0, rows, published_top1=70.0)) == f"{better}; trial 7 has 70.0%"
    assert better_line(outcome(None, rows)) == (
        "A published network fits 2 ms, as nothing found does: timm/lcnet_100.ra2_in1k@224, with a top-1 of 72.1% on "
        "ImageNet and 1.50 ms here"
    )
    assert better_line(outcome(None, [])) == ""
