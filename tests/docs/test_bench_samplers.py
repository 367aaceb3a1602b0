"""The benchmark of samplers: what it counts as found, and how it compares."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from optuna.samplers import RandomSampler

from nas.study.trials import finish, open_study
from search_spaces import get_arch

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/bench_samplers.py"))
Run, Found = BENCH["Run"], BENCH["Found"]


def runs(*bests: float | None) -> dict[int, object]:
    return {seed: Found(best) for seed, best in enumerate(bests)}


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        ((62.0, 63.0, 64.0), ("+2.00 (-0.48 to +4.48)", "tie")),
        ((63.0, 63.0, 63.2), ("+2.07 (+1.78 to +2.35)", "win")),
        ((60.0, 60.0, 59.8), ("-1.07 (-1.35 to -0.78)", "loss")),
        ((62.0, None, 62.0), ("+1.00 (+1.00 to +1.00); 1 without a pair", "win")),
        ((62.0, None, None), ("+1.00; 2 without a pair", "one seed")),
        ((None, None, None), ("none; 3 without a pair", "")),
    ],
)
def test_runs_of_equal_seeds_are_compared(ours, told):
    assert BENCH["compared"](runs(*ours), runs(61.0, 61.0, 61.0) | {7: Found(99.0)}) == told


def test_a_network_counts_where_its_whole_interval_is_within_the_budget(tmp_path, capsys):
    run = Run(2.0, 1, "random", 0)
    (tmp_path / run.study).mkdir()
    (tmp_path / f"{run.study}.log").touch()
    study = open_study(run.study, tmp_path / run.study / "study.journal", {}, RandomSampler())
    for name, ms, high in (("efficientvit_m0", 1.8, 1.9), ("shvit_s1", 1.9, 2.1), ("levit_128s", 3.0, 3.1)):
        detail = {"latency_ms": ms, "latency_ci_low_ms": ms - 0.1, "latency_ci_high_ms": high}
        arch = json.loads(get_arch(name).to_json())
        finish(study, study.ask(), 50.0, 1.0, ms / 2 - 1, {"latency_ms": ms, "arch": arch, "detail": detail})
    found = BENCH["found"](run, tmp_path)
    assert found.best < found.best_by_median, "SHViT-S1 is better, and may be over the budget"
    assert (found.networks, found.families) == (3, 1)
    assert 0 < found.first_s < found.seconds
    lost = Run(2.0, 1, "auto", 0)
    (tmp_path / lost.study).mkdir()
    (tmp_path / f"{lost.study}.log").touch()
    for each in (run, lost):
        (tmp_path / each.study / "ended").touch()
    BENCH["print_table"](tmp_path)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[2], row[3], row[4]) for row in rows] == [
        ("auto", "0 of 1", "none"),
        ("random", "1 of 1", f"{found.best:.2f}"),
    ]
    assert rows[0][5] == "none; 1 without a pair"
