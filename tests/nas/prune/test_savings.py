"""Measured costs, on invented latencies: noise is no saving, and what is unsure is measured once more."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from nas.measure.samples import Measurement
from nas.prune.savings import HALVED, LONGER_ROUNDS, ROUNDS, Saving, fixed, left_alone, measure_savings, rates
from nas.prune.widths import group_of, half
from pruning.units import KNOB_KINDS, Anatomy, anatomy
from search_spaces import Arch, get_arch, table

KINDS = ("ffn", "qk")


@pytest.fixture(scope="module")
def parts() -> Anatomy:
    raw = json.loads(get_arch("efficientvit_m0", 10).to_json())
    raw |= {"resolution": 48, "stem": [8, 8, 8]}
    for stage in raw["stages"]:
        stage["blocks"] = stage["blocks"][:1]
    return anatomy(Arch.from_json(json.dumps(raw)))


class Clock:
    """The whole network takes 2 ms in each round; a halved group that times what `factors` say, round after round."""

    def __init__(self, factors: Mapping[str, list[float]]) -> None:
        self.factors, self.runs = factors, []

    def __call__(self, archs: Mapping[str, Arch], rounds: int) -> dict[str, Measurement]:
        self.runs.append((set(archs), rounds))
        found = {}
        for name in archs:
            cycle = self.factors.get(name, [0.9]) if name else [1.0]
            found[name] = Measurement(rounds_ms=[[2.0 * cycle[i % len(cycle)]] for i in range(rounds)])
        return found


def test_noise_is_no_saving(parts: Anatomy) -> None:
    """In the median 1% less time, but rounds go both ways: nothing is shown, and nothing is cut for it."""
    noisy, slower = "stages.1 ffn", "stages.0 ffn"
    clock = Clock({noisy: [0.8, 1.15, 0.98, 1.2, 0.85], slower: [1.1]})
    savings, own = measure_savings(parts, KINDS, 8, clock)
    found = {saving.group: saving for saving in savings}
    assert own == 2.0
    assert found[noisy].ms > 0
    assert found[noisy].ci[0] < 0 < found[noisy].ci[1]
    assert not found[noisy].shown
    assert not found[slower].shown
    known = rates(savings)
    assert known[noisy] == known[slower] == 0
    assert all(rate > 0 for group, rate in known.items() if group not in (noisy, slower))


def test_only_what_is_unsure_is_measured_longer(parts: Anatomy) -> None:
    """One more run, of it and the whole network; the longer one counts."""
    late = [0.8, 1.2] * 5 + [0.8] * 30
    clock = Clock({"stages.1 ffn": late, "stages.0 ffn": [1.1]})
    savings, _ = measure_savings(parts, KINDS, 8, clock)
    assert [rounds for _, rounds in clock.runs] == [ROUNDS, LONGER_ROUNDS]
    assert clock.runs[1][0] == {"", "stages.1 ffn"}
    (saving,) = [saving for saving in savings if saving.group == "stages.1 ffn"]
    assert saving.shown
    assert saving.rounds == LONGER_ROUNDS
    assert saving.rate == pytest.approx(0.4 / saving.macs)
    clock = Clock({})
    measure_savings(parts, KINDS, 8, clock)
    assert len(clock.runs) == 1


def test_what_a_branch_takes_at_any_width_is_told_apart(parts: Anatomy) -> None:
    """On a device where each branch takes 0.05 ms, besides a time for each MAC, and the network a millisecond."""

    def clock(archs: Mapping[str, Arch], rounds: int) -> dict[str, Measurement]:
        times = {name: 1 + 1e-7 * table(arch).macs() + 0.05 * branches_of(arch) for name, arch in archs.items()}
        return {name: Measurement(rounds_ms=[[ms]] * rounds) for name, ms in times.items()}

    found = {saving.group: saving for saving in measure_savings(parts, tuple(KNOB_KINDS), 8, clock)[0]}
    assert not any("half" in group for group in found)
    assert found["stages.1 ffn"].fixed_ms == 0
    assert found["stages.1 ffn"].rate == pytest.approx(1e-7)
    for group in ("stages.1 blocks ffn", "stages.1 blocks attn"):
        assert found[group].fixed_each == pytest.approx(0.05), group
        assert found[group].rate == pytest.approx(1e-7), group
        assert fixed(found.values())[group] == found[group].fixed_each
    convs = found["stages.1 blocks conv"]
    assert convs.branches > 1
    assert convs.fixed_each == 0, "it has no inner width: its MACs stand for all of it"
    assert convs.rate == pytest.approx(convs.ms / convs.macs)


def branches_of(arch: Arch) -> int:
    return sum(knob.kind == "blocks" for knob in anatomy(arch).knobs)


def test_noise_is_no_part_of_a_branch(parts: Anatomy) -> None:
    """In the median its narrow half saves a hundredth, but rounds go both ways."""
    group = "stages.1 blocks ffn"
    clock = Clock({HALVED.format(group): [0.8, 1.15, 0.98, 1.2, 0.85]})
    savings, _ = measure_savings(parts, ("ffn", "blocks"), 8, clock)
    (saving,) = (saving for saving in savings if saving.group == group)
    assert saving.shown
    assert saving.branches > 0
    assert saving.fixed_ms == 0
    assert saving.rate == saving.ms / saving.macs


def test_groups_left_alone_are_named_by_the_reason() -> None:
    kinds = {"a": (9, 0.1, 0.3), "b": (9, -0.1, 0.3), "c": (9, -0.3, -0.1), "d": (0, -0.1, 0.3), "e": (9, -0.2, 0.1)}
    rows = [Saving(name, macs, 0.1, (*ends,), 40) for name, (macs, *ends) in kinds.items()]
    assert left_alone(rows) == (
        "left alone, 4 of 5 groups: no saving shown, though measured twice (95% interval of the saving holds 0): b, e; "
        "slower when halved: c; no MACs saved: d"
    )
    assert left_alone(rows[:1]) == ""


def test_what_a_row_holds() -> None:
    row = Saving("stages.0 ffn", 1000, 0.1, (-0.1, 0.3), 40).to_json()
    assert json.loads(json.dumps(row)) == row
    assert row["ci"] == [-0.1, 0.3]
    assert not row["shown"]


def test_groups_of_costs_cover_every_knob(parts: Anatomy) -> None:
    """Knobs of a stage that are of one kind are measured together."""
    groups = {group_of(knob.width, knob.kind) for knob in parts.knobs}
    assert "stages.1 ffn" in groups
    assert "stages.2 blocks attn" in groups
    assert 10 < len(groups) < 40


def test_halves_are_multiples() -> None:
    assert [half(size, "ffn", 8) for size in (100, 20, 8, 6)] == [48, 8, 8, 6]
    assert half(3, "heads", 8) == 1
