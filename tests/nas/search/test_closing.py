"""The closing run with a made-up clock: who wins, and who is measured longer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from records import COMPLETE

from nas.export import side_by_side
from nas.measure.budget import Limits
from nas.measure.protocol import Interrupted
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement
from nas.networks.targets import find_target
from nas.search import closing
from nas.search.rows import ClosingRow, OutsideRow, Trial
from nas.search.words import later_rounds
from search_spaces import get_arch

SURE, OVER = (1.0, 1.0), (2.5, 2.5)
WIDE = (1.9, 2.3)
"""The medians of every other round: the interval holds the budget of 2 ms."""


class Clock:
    """`medians`: of every other round, by trial, one pair a run that the trial is in, the last one for all others."""

    def __init__(self) -> None:
        self.medians: dict[int, list[Sequence[float] | MeasureError]] = {}
        self.runs: list[dict[str, int]] = []
        self.memory_mb: dict[int, float] = {}

    def compare(self, paths: dict[str, Any], settings: Any, rounds: int, *_: Any) -> dict[str, Any]:
        self.runs.append(dict.fromkeys(paths, rounds))
        return {label: self._timed(int(label.split()[-1]), rounds) for label in paths}

    def _timed(self, trial: int, rounds: int) -> Measurement | MeasureError:
        left = self.medians[trial]
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, MeasureError):
            return found
        return Measurement([[found[i % 2]] for i in range(rounds)], memory_mb=self.memory_mb.get(trial, 1.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(closing, "network_of", lambda row: row.arch)
    exporter = SimpleNamespace(write=lambda network, settings, stem: stem)
    monkeypatch.setattr(closing, "Exporter", lambda images: nullcontext(exporter))
    monkeypatch.setattr(side_by_side, "device_lock", lambda device: nullcontext())
    monkeypatch.setattr(side_by_side, "compare", found.compare)
    return found


def run(
    tmp_path: Any,
    clock: Clock,
    limits: Limits = Limits(),  # noqa: B008
    feasible: bool = True,
    trial_ms: float = 3.0,
    **medians: Any,
) -> tuple[list[ClosingRow], list[OutsideRow], list[str]]:
    """The rows, and the notes, of trials of falling quality (t0, t1, ...) and of rivals (r7, ...).

    trial_ms: what each took in its trial.
    """
    clock.medians = {int(name[1:]): value if isinstance(value, list) else [value] for name, value in medians.items()}
    trials = [int(name[1:]) for name in medians if name.startswith("t")]
    rows = [
        replace(
            COMPLETE, trial=trial, quality=70.0 - trial, arch={"number": trial}, feasible=feasible, latency_ms=trial_ms
        )
        for trial in trials
    ]
    settings = Settings()
    options = SimpleNamespace(
        budget_ms=2.0, settings=settings, folder=tmp_path, against=(), throughput_at=None, limits=limits
    )
    notes: list[str] = []
    return *closing.closing_run(options, rows, note=notes.append), notes


def close(*given: Any, **more: Any) -> tuple[list[ClosingRow], list[str]]:
    """The final table, and the notes, as `run` has them."""
    final, _, notes = run(*given, **more)
    return final, notes


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Numbers of those that are measured in turn; a test fills it."""
    looks: list[list[int]] = []

    def rivals_of(request: Any, rows: Any, measured: Sequence[OutsideRow] = ()) -> list[Any]:
        seen = {row.label for row in measured}
        for numbers in looks:
            labels = [f"rival {number}" for number in numbers]
            if not seen.issuperset(labels):
                network = SimpleNamespace(resolution=64)
                return [SimpleNamespace(label=label, resolution=64, network=network) for label in labels]
        return []

    monkeypatch.setattr(closing, "rivals_of", rivals_of)
    monkeypatch.setattr(closing, "top1_of", lambda label: 60.0 + int(label.split()[-1]))
    return looks


def test_an_unsure_network_is_measured_longer_until_it_is_sure(tmp_path, clock):
    final, notes = close(tmp_path, clock, t0=[WIDE, (1.9, 1.9)], t1=SURE)
    assert clock.runs == [{"trial 0": 30, "trial 1": 30}, {"trial 0": 30}]
    assert (final[0].trial, final[0].verdict, final[0].role) == (0, "fits", "winner")
    assert final[0].samples == 60
    assert notes == []


def test_one_that_stays_unsure_does_not_win_over_one_that_fits(tmp_path, clock):
    final, notes = close(tmp_path, clock, t0=WIDE, t1=SURE, t2=WIDE)
    assert sum(run["trial 0"] for run in clock.runs) == closing.MOST_ROUNDS
    assert clock.runs[1:] == [{"trial 0": 30}] * 3, "what ranks behind a sure one is left as it is"
    assert [(row.trial, row.verdict, row.role) for row in final] == [
        (1, "fits", "winner"),
        (0, "unsure", "found"),
        (2, "unsure", "found"),
    ]
    assert notes == [
        "trial 0 may be within 2 ms or over it, also after 120 rounds: 95% 1.90 to 2.30 ms",
        "latencies that are not known to 2%: trial 0 (+-9.5%), trial 2 (+-9.5%)",
    ]


def test_a_latency_that_is_not_known_to_2_percent_is_measured_longer_where_that_may_help(tmp_path, clock):
    final, notes = close(tmp_path, clock, t0=[(0.97, 1.03), (1.0, 1.0)], t1=(1.4, 1.6), t2=(2.47, 2.53))
    assert clock.runs[1:] == [{"trial 0": 30}], "but not what is over, nor what 120 rounds would leave wider"
    assert [(row.label, row.rounds_alone) for row in final] == [("trial 0", 30), ("trial 1", 0), ("trial 2", 0)]
    assert notes == ["latencies that are not known to 2%: trial 1 (+-6.7%)"]


def test_where_nothing_surely_fits_the_best_that_may_wins(tmp_path, clock):
    final, notes = close(tmp_path, clock, t0=OVER, t1=WIDE, t2=WIDE)
    assert [(row.trial, row.verdict, row.role) for row in final] == [
        (1, "unsure", "winner"),
        (2, "unsure", "found"),
        (0, "over", "found"),
    ]
    assert len(notes) == 3


def test_what_is_over_wins_nothing(tmp_path, clock):
    final, _ = close(tmp_path, clock, t0=OVER, t1=OVER)
    assert [row.role for row in final] == ["found", "found"]
    assert len(clock.runs) == 1


def test_a_run_in_which_all_are_slower_than_in_their_trials_is_repeated(tmp_path, clock):
    """What fitted in its trial would be lost to a slow moment of the machine."""
    final, notes = close(tmp_path, clock, trial_ms=1.9, t0=[OVER, (1.9, 1.9)], t1=[(2.4, 2.4), (1.8, 1.8)])
    assert clock.runs == [{"trial 0": 30, "trial 1": 30}] * 2
    assert [(row.label, row.verdict) for row in final] == [("trial 0", "fits"), ("trial 1", "fits")]
    (note,) = notes
    assert note.endswith("times as long as in their trials: the machine was slower, so they are measured again")


def test_a_run_is_repeated_twice_at_most_and_the_fastest_counts(tmp_path, clock):
    final, notes = close(tmp_path, clock, trial_ms=1.9, t0=[(2.5, 2.5), (2.4, 2.4), (2.6, 2.6)])
    assert len(clock.runs) == 3
    assert [(row.latency_ms, row.verdict) for row in final] == [(2.4, "over")]
    assert len(notes) == 2


def test_a_repeated_run_in_which_one_fails_does_not_count(tmp_path, clock):
    final, _ = close(tmp_path, clock, trial_ms=1.9, t0=[(2.4, 2.4), (1.9, 1.9)], t1=[(2.4, 2.4), MeasureError("gone")])
    assert [(row.latency_ms, row.error) for row in final] == [(2.4, "")] * 2


@pytest.mark.parametrize(("trial_ms", "median"), [(1.5, 1.9), (1.9, 2.1)])
def test_a_run_is_not_repeated_where_all_fit_or_hardly_any_is_slower(tmp_path, clock, trial_ms, median):
    close(tmp_path, clock, trial_ms=trial_ms, t0=(median, median))
    assert len(clock.runs) == 1


def test_one_that_fails_when_measured_longer_keeps_what_it_has(tmp_path, clock):
    final, notes = close(tmp_path, clock, t0=[WIDE, MeasureError("killed by signal 9")], t1=SURE)
    assert len(clock.runs) == 2
    assert [(row.trial, row.error, row.verdict) for row in final] == [(1, "", "fits"), (0, "", "unsure")]
    assert final[1].samples == 30
    assert notes[0] == "trial 0 could not be measured longer: killed by signal 9"


def test_ctrl_c_while_some_are_measured_longer_keeps_the_closing_run(tmp_path, clock, monkeypatch):
    def compare(paths, *more):
        if len(clock.runs) == 2:
            raise KeyboardInterrupt
        return Clock.compare(clock, paths, *more)

    monkeypatch.setattr(side_by_side, "compare", compare)
    with pytest.raises(closing.ClosingInterrupted) as cut:
        close(tmp_path, clock, t0=WIDE, t1=SURE)
    assert [(row.trial, row.role, row.samples) for row in cut.value.final] == [
        (1, "winner", 30),
        (0, "found", 60),
    ]
    assert later_rounds(cut.value.final) == "Measured longer afterwards, in rounds of their own: trial 0."
    assert later_rounds(cut.value.final[:1]) == ""


def test_further_networks_of_timm_are_measured_beside_the_first(tmp_path, clock, rivals):
    rivals += [[7], [8, 9]]
    final, outside, _ = run(tmp_path, clock, t0=[SURE, (0.5, 0.5)], r7=OVER, r8=SURE, r9=MeasureError("killed"))
    assert clock.runs == [{"trial 0": 30, "rival 7": 30}, {"rival 8": 30, "rival 9": 30, "trial 0": 30}]
    assert [(row.label, row.published_top1, row.ratio, row.beside) for row in outside] == [
        ("rival 8", 68.0, 2.0, "trial 0"),
        ("rival 9", 69.0, None, ""),
    ], "the ratio is that of the rounds that both were measured in"
    assert final[0].latency_ms == 1.0
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    told = {(each["closing"], tuple(each.get("beside", ()))) for each in kept}
    assert told == {("trial 0", ()), ("rival 7", ()), ("rival 8", ()), ("trial 0", ("rival 8", "rival 9"))}


def test_ctrl_c_in_a_further_look_keeps_the_closing_run(tmp_path, clock, rivals, monkeypatch):
    def compare(paths, *more):
        if "rival 8" in paths:
            raise Interrupted({}, 3)
        return Clock.compare(clock, paths, *more)

    rivals += [[7], [8]]
    monkeypatch.setattr(side_by_side, "compare", compare)
    with pytest.raises(closing.ClosingInterrupted) as cut:
        run(tmp_path, clock, t0=SURE, r7=SURE, r8=SURE)
    assert [row.label for row in (*cut.value.final, *cut.value.outside)] == ["trial 0", "rival 7"]


def test_ctrl_c_while_further_networks_are_exported_keeps_the_closing_run(tmp_path, clock, rivals, monkeypatch):
    written = []

    def write(network, settings, stem):
        written.append(stem)
        if len(written) > 2:
            raise KeyboardInterrupt
        return stem

    rivals += [[7], [8]]
    monkeypatch.setattr(closing, "Exporter", lambda images: nullcontext(SimpleNamespace(write=write)))
    with pytest.raises(closing.ClosingInterrupted) as cut:
        run(tmp_path, clock, t0=SURE, r7=SURE, r8=SURE)
    assert [row.label for row in (*cut.value.final, *cut.value.outside)] == ["trial 0", "rival 7"]


def test_where_no_trial_fits_networks_of_timm_are_measured_alone(tmp_path, clock, rivals):
    assert run(tmp_path, clock, feasible=False, t0=OVER) == ([], [], [])
    assert clock.runs == []
    assert not closing.is_due(SimpleNamespace(), [replace(COMPLETE, feasible=False)])
    assert closing.is_due(SimpleNamespace(), [COMPLETE])
    rivals += [[7]]
    assert closing.is_due(SimpleNamespace(), [replace(COMPLETE, feasible=False)])
    final, outside, _ = run(tmp_path, clock, feasible=False, t0=OVER, r7=SURE)
    assert clock.runs == [{"rival 7": 30}]
    assert final == []
    assert [(row.label, row.verdict, row.ratio) for row in outside] == [("rival 7", "fits", None)]


def test_networks_beside_run_at_the_resolution_of_the_best_finalist():
    def row(name: str, resolution: int, quality: float, feasible: bool = True) -> Trial:
        arch = json.loads(get_arch(name).at(resolution).to_json())
        return replace(COMPLETE, quality=quality, resolution=resolution, feasible=feasible, arch=arch)

    finalists = {
        "levit_128s": row("levit_128s", 224, 90.0, feasible=False),
        "trial 1": row("shvit_s1", 96, 60.0),
        "trial 2": row("shvit_s1", 64, 50.0),
    }
    names = ("timm/lcnet_050", "shvit_s2@128", "shvit_s1", "levit_128s", "timm/test_vit@64", "timm/inception_v3")
    found, refused = closing.outside_of([find_target(name) for name in names], finalists)
    assert {label: network.resolution for label, network in found.items()} == {
        "timm/lcnet_050": 96,
        "shvit_s2@128": 128,
        "levit_128s (as named)": 96,
        "timm/test_vit@64": 64,
        "timm/inception_v3": 96,
    }
    assert refused == {}
    small = {"trial 2": finalists["trial 2"]}
    found, refused = closing.outside_of([find_target("timm/inception_v3"), find_target("timm/lcnet_050")], small)
    assert list(found) == ["timm/lcnet_050"]
    assert "cannot take images of 64 px: 96 px works" in refused["timm/inception_v3"]


def test_a_network_over_a_limit_wins_nothing_however_fast(tmp_path, clock):
    clock.memory_mb = {0: 65.0, 1: 64.0}
    final, _ = close(tmp_path, clock, Limits(memory_mb=64.0), t0=SURE, t1=SURE)
    assert [(row.trial, row.verdict, row.role, row.over) for row in final] == [
        (1, "fits", "winner", ()),
        (0, "over", "found", ("memory",)),
    ]
    assert [row.to_json()["memory_mb"] for row in final] == [64.0, 65.0]
