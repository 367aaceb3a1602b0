"""The benchmark of fine-tuning: the table that it makes of its rows."""

from __future__ import annotations

import runpy
from pathlib import Path

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/bench_finetune.py"))


def test_a_line_for_each_cell_and_one_for_the_mean() -> None:
    """A probe counts for any number of epochs; what was not run leaves its place empty."""
    made = (
        ("a", "probe", 0, (40.0, 42.0)),
        ("a", "timm", 3, (35.5, 36.5)),
        ("a", "ours", 3, (41.0, 43.0)),
        ("b", "probe", 0, (50.0,)),
        ("b", "ours", 3, (53.0,)),
        ("b", "ours", 10, (49.5,)),
        ("b", "timm", 30, (60.0,)),
    )
    rows = [
        BENCH["Row"]("tin20", network, 64, method, epochs, seed, top1, 1000, 10.0 * (seed + 1))
        for network, method, epochs, tops in made
        for seed, top1 in enumerate(tops)
    ]
    lines = BENCH["table"](rows)
    assert {len(line) for line in lines} == {len(BENCH["COLUMNS"])}
    first, *rest = lines
    assert first[:8] == ["tin20", "a", "64", "3", "2", "41.0", "36.0", "42.0"]
    assert (first[8].split()[0], first[9].split()[0], first[10]) == ("+1.0", "+6.0", "15 / 15 / 15")
    assert rest == [
        ["tin20", "b", "64", "3", "1", "50.0", "", "53.0", "+3.0", "", "10 / 10"],
        ["mean", "", "", "3", "", "", "", "", "+2.0 [-10.7, +14.7]", "+6.0", ""],
        ["tin20", "b", "64", "10", "1", "50.0", "", "49.5", "-0.5", "", "10 / 10"],
        ["mean", "", "", "10", "", "", "", "", "-0.5", "", ""],
    ]
