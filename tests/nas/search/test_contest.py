"""The closing table of a race: what is trained fully, what wins, and what is said of it."""

from dataclasses import replace

import pytest
from records import COMPLETE

from nas.measure.budget import Verdict
from nas.quality.candidate import Kind
from nas.search.accuracy import Accuracies, Tuning, compare_means
from nas.search.closing import ordered
from nas.search.contest import contest_of, contestants, decision, opponents, winner_of, with_winner
from nas.search.finish import remarks_on_size
from nas.search.rows import ClosingRow, finalists_of

BUDGET_MS = 0.99
"""The networks take 1 ms: what is unsure has its median over the budget."""


def row(number: int, kind: Kind, quality: float, verdict: Verdict = Verdict.FITS) -> ClosingRow:
    """Of a network with an estimate; ready ones have names."""
    trial = replace(
        COMPLETE,
        trial=number,
        kind=kind,
        name=f"ready{number}" if kind == Kind.READY else "",
        parent="larger" if kind == Kind.DERIVED else "",
        quality=quality,
        quality_estimate=quality + 1,
        quality_ci=(quality - 3, quality + 5),
    )
    return ClosingRow.of(trial, latency_ms=1.0, verdict=verdict)


def trained(rows: list[ClosingRow], top1: dict[str, float]) -> list[ClosingRow]:
    """The table after full trainings from three seeds on 1,000 images. top1: in percent, by labels."""

    def accuracy(label: str) -> Accuracies:
        hits = [[i < 10 * top1[label] for i in range(1000)]] * 3
        return Accuracies(label, [top1[label] - 0.2, top1[label], top1[label] + 0.2], 1000, 1.0, hits)

    return [replace(each, accuracy=accuracy(each.label) if each.label in top1 else None) for each in rows]


TABLE = ordered(
    [
        row(1, Kind.SCRATCH, 40),
        row(2, Kind.READY, 48),
        row(3, Kind.READY, 47),
        row(4, Kind.DERIVED, 50),
        row(5, Kind.DERIVED, 49),
        row(6, Kind.READY, 60, Verdict.OVER),
    ]
)


def test_the_winner_the_best_ready_and_the_best_derived_one_are_trained_fully() -> None:
    assert [each.label for each in contestants(TABLE, BUDGET_MS)] == ["trial 4", "ready2"]
    alone = ordered([row(1, Kind.SCRATCH, 40), row(2, Kind.READY, 48)])
    assert [each.label for each in contestants(alone, BUDGET_MS)] == ["ready2", "trial 1"]
    scratch = ordered([row(1, Kind.SCRATCH, 70), row(2, Kind.READY, 48), row(4, Kind.DERIVED, 50)])
    assert [each.label for each in contestants(scratch, BUDGET_MS)] == ["trial 1", "ready2", "trial 4"]
    ready = ordered([row(1, Kind.SCRATCH, 40), row(2, Kind.READY, 60), row(4, Kind.DERIVED, 30)])
    assert [each.label for each in contestants(ready, BUDGET_MS)] == ["ready2", "trial 1", "trial 4"]


@pytest.mark.parametrize(
    ("made", "winner", "verdict"),
    [(53.0, "trial 4", "gain"), (48.5, "trial 4", "tie"), (48.1, "ready2", "tie"), (40.0, "ready2", "loss")],
)
def test_a_ready_network_wins_unless_the_other_leads(made: float, winner: str, verdict: str) -> None:
    table = trained(TABLE, {"trial 4": made, "ready2": 48.0})
    found = contest_of(with_winner(table, winner_of(table, BUDGET_MS)), BUDGET_MS)
    assert (found.winner.name, found.winner.kind) == (winner, "ready" if winner == "ready2" else "derived")
    assert found.best_ready is not None
    assert found.best_derived is not None
    assert (found.best_ready.accuracy, found.best_derived.accuracy) == (48.0, made)
    assert found.gain_over_ready is not None
    assert found.gain_over_ready.points == pytest.approx(made - 48)
    assert found.gain_over_ready.verdict == verdict
    assert f"{made - 48:+.1f} points" in found.line
    assert ("The best ready network wins" in found.line) == (winner == "ready2")


def test_the_final_images_name_no_network() -> None:
    """Two were found; that which ranked first is compared, whatever the other has."""
    table = ordered([row(1, Kind.SCRATCH, 50), row(4, Kind.DERIVED, 49), row(2, Kind.READY, 48)])
    table = trained(table, {"trial 1": 48.0, "trial 4": 60.0, "ready2": 48.0})
    found = contest_of(with_winner(table, winner_of(table, BUDGET_MS)), BUDGET_MS)
    assert (found.winner.name, found.gain_over_ready.points) == ("ready2", 0)
    roles = {each.label: each.role for each in with_winner(table, winner_of(table, BUDGET_MS))}
    assert (roles["ready2"], roles["trial 4"], roles["trial 1"]) == ("winner", "derived", "found")


def test_what_decided_is_said() -> None:
    made, ready = row(4, Kind.DERIVED, 50), row(2, Kind.READY, 48)
    assert "validation images" in decision(made, ready, "trial 4")
    unsure = row(2, Kind.READY, 48, Verdict.UNSURE)
    assert decision(made, unsure, "trial 4") == "trial 4 wins because it surely fits; ready2 may be over the budget"
    assert decision(made, unsure, "ready2").startswith("ready2 wins because its median latency is within the budget")


@pytest.mark.parametrize("made", [60.0, 30.0])
@pytest.mark.parametrize("sure", ["ready2", "trial 4"])
def test_what_surely_fits_wins_over_what_may(made: float, sure: str) -> None:
    ready, derived = (Verdict.FITS if label == sure else Verdict.UNSURE for label in ("ready2", "trial 4"))
    table = ordered([row(2, Kind.READY, 48, ready), row(4, Kind.DERIVED, 50, derived)])
    for top1 in ({"trial 4": made, "ready2": 48.0}, {"trial 4" if sure == "ready2" else "ready2": 50.0}):
        rows = trained(table, top1)
        found = contest_of(with_winner(rows, winner_of(rows, BUDGET_MS)), BUDGET_MS)
        assert found.winner.name == sure
        assert ("which may be over the budget" in found.line) == (len(top1) == 2 or sure == "trial 4")


@pytest.mark.parametrize(("made", "winner"), [(53.0, "trial 4"), (48.1, "trial 4"), (40.0, "ready2")])
def test_a_ready_network_at_the_budget_wins_where_what_surely_fits_is_really_worse(made: float, winner: str) -> None:
    """Its median is the budget itself. A lesser ready one surely fits."""
    table = ordered(
        [
            row(2, Kind.READY, 48, Verdict.UNSURE),
            row(3, Kind.READY, 30),
            row(4, Kind.DERIVED, 50),
            row(5, Kind.READY, 20),
        ]
    )
    assert [each.label for each in contestants(table, 1.0)] == ["trial 4", "ready3", "ready2"]
    rows = trained(table, {"trial 4": made, "ready2": 48.0, "ready3": 30.0})
    found = contest_of(with_winner(rows, winner_of(rows, 1.0)), 1.0)
    assert found.winner.name == winner
    assert found.best_ready.name == ("ready2" if winner == "ready2" else "ready3"), "what others are compared with"
    assert winner_of(rows, BUDGET_MS).label == "trial 4", "over the budget, if little"


def test_the_pair_that_decides_is_the_pair_that_is_told() -> None:
    """A ready network is at the budget, a lesser one surely fits: no real loss to the first, a tie with the second."""
    table = ordered([row(2, Kind.READY, 52, Verdict.UNSURE), row(3, Kind.READY, 51), row(4, Kind.DERIVED, 50)])
    rows = trained(table, {"ready2": 50.0, "ready3": 49.5, "trial 4": 49.4})
    rows = with_winner(rows, winner_of(rows, 1.0))
    found = contest_of(rows, 1.0)
    assert (found.winner.name, found.best_ready.name) == ("ready3", "ready3")
    assert found.gain_over_ready.points == pytest.approx(-0.1)
    assert "validation images" in decision(*opponents(rows, 1.0), found.winner.name)
    without = ordered([row(2, Kind.READY, 52, Verdict.UNSURE), row(4, Kind.DERIVED, 50)])
    rows = trained(without, {"ready2": 50.0, "trial 4": 49.4})
    assert contest_of(with_winner(rows, winner_of(rows, 1.0)), 1.0).winner.name == "trial 4", "no real loss"


def test_of_a_parents_children_that_are_equal_as_far_as_is_known_the_largest_is_compared() -> None:
    """Estimates have a standard error of 2 points."""
    rows = [row(number, Kind.DERIVED, quality) for number, quality in ((1, 50), (2, 49), (3, 48.5), (4, 47))]
    sizes = [6.0, 8.0, 7.0, 12.0]
    rows = [replace(each, macs_m=macs) for each, macs in zip(rows, sizes, strict=True)]
    rows.append(replace(row(5, Kind.DERIVED, 49.5), parent="another", macs_m=20.0))
    table = ordered([*rows, row(6, Kind.READY, 40)])
    assert [each.label for each in table] == ["trial 2", "trial 1", "trial 5", "trial 3", "trial 4", "ready6"]
    assert table[0].role == "winner"
    assert [line.split(",")[0] for line in remarks_on_size(table[0], table)] == ["trial 2 goes before trial 1"]
    assert not [*remarks_on_size(table[2], table)]
    trials = [
        replace(
            COMPLETE,
            trial=each.trial,
            kind=each.kind,
            parent=each.parent,
            quality=each.quality,
            macs_m=each.macs_m,
            quality_estimate=each.quality_estimate,
            quality_ci=each.quality_ci,
            feasible=True,
            arch={"n": each.trial},
        )
        for each in (*rows, *(replace(rows[0], trial=10 + i, quality=49.9 - i / 10) for i in range(3)))
    ]
    assert 2 in {each.trial for each in finalists_of(trials, 2.0)}, "it is measured at the end"


def test_where_one_training_failed_the_other_wins() -> None:
    for label in ("ready2", "trial 4"):
        rows = trained(TABLE, {label: 48.0})
        assert winner_of(rows, BUDGET_MS).label == label
    assert winner_of(TABLE, BUDGET_MS).label == "trial 4", "the winner so far, untrained"


def test_without_a_ready_network_that_is_said() -> None:
    table = trained(ordered([row(4, Kind.DERIVED, 50), row(6, Kind.READY, 60, Verdict.OVER)]), {"trial 4": 50.0})
    found = contest_of(table, BUDGET_MS)
    assert (found.best_ready, found.gain_over_ready) == (None, None)
    assert found.line.startswith("No ready network is within the budget")


def test_one_ready_network_alone_wins() -> None:
    table = trained(ordered([row(2, Kind.READY, 48)]), {"ready2": 48.0})
    found = contest_of(table, BUDGET_MS)
    assert (found.winner.name, found.best_derived, found.gain_over_ready) == ("ready2", None, None)
    assert "nothing that the search made up" in found.line


def test_before_the_trainings_nothing_is_claimed() -> None:
    found = contest_of(TABLE, BUDGET_MS)
    assert (found.winner.accuracy, found.gain_over_ready) == (None, None)
    assert found.line.startswith("Not compared")
    ready_first = ordered([row(2, Kind.READY, 60), row(4, Kind.DERIVED, 50)])
    assert contest_of(ready_first, BUDGET_MS).line.startswith("Not compared")
    half = contest_of(trained(ready_first, {"ready2": 48.0}), BUDGET_MS)
    assert (half.winner.accuracy, half.gain_over_ready) == (48.0, None)
    assert half.line.startswith("Not compared"), "the other training failed"


def test_the_tuning_of_a_parent_is_told_beside_its_childs_own_training() -> None:
    before = Tuning("larger", 30, 1600, 240.0)
    rows = trained(TABLE, {"trial 4": 52.0, "ready2": 48.0})
    rows = [
        replace(each, accuracy=replace(each.accuracy, before=before)) if each.label == "trial 4" else each
        for each in rows
    ]
    found = contest_of(rows, BUDGET_MS)
    derived = found.to_json()["best_derived"]
    assert (derived["parent_epochs"], derived["parent_seconds"]) == (30, 240.0)
    assert found.to_json()["best_ready"]["parent_epochs"] is None
    assert "derived from larger after its 30 epochs of tuning" in found.line
    told = next(each.accuracy for each in rows if each.label == "trial 4")
    assert told.to_json()["parent_tuning"]["epochs"] == 30
    assert "epochs" not in told.to_json()
    assert not told.as_begun
    assert replace(told, epochs=0).as_begun
    assert replace(told, epochs=0).to_json()["epochs"] == 0
    compared = compare_means(told, next(each.accuracy for each in rows if each.label == "ready2"))
    assert "the parent was tuned once" in compared.leaves_out
