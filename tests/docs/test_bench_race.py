"""The benchmark of a race: its commands are such as vitnas takes, and its rows are of searches that have ended."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from nas.cli.app import app

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/bench_race.py"))
COMMANDS = typer.main.get_command(app).commands


def parsed(name: str, *words: str) -> dict[str, object]:
    return COMMANDS[name].make_context(name, list(words)).params


def arguments(folder: Path, **more: Any) -> argparse.Namespace:
    given = {"data": folder / "tin20", "zoo": folder, "out": folder, "options": ["--trials", "9"], "px": 64}
    return argparse.Namespace(**given | {"budget": [0.6], "seeds": 1, "minutes": 60, "methods": ["race"]} | more)


def found(name: str, kind: str, *top1: float) -> Any:
    return BENCH["Found"](name, kind, 64, 0.5, top1)


def row(method: str, seed: int, derived: float, **more: Any) -> Any:
    """A search whose derived network wins over a ready one of 48% by one point, give or take two."""
    made, ready = found("trial 7", "derived", derived, derived + 1), found("efficientvit_m0", "ready", 47.0, 49.0)
    gain = [made.mean - ready.mean, -1.0, 3.0]
    known = {"trial_s": 300.0, "epochs": 12, "gain": gain, "tau": {"0": 0.5}, "ranked": {"0": 5}} | more
    return BENCH["Row"]("tin20", 0.6, method, seed, 600.0, 700.0, 20, made, ready, made, **known)


def test_latencies_are_measured_by_a_command_of_vitnas(tmp_path: Path) -> None:
    assert parsed(*BENCH["bench_command"](tmp_path))["csv"] == tmp_path / "latencies.csv"


@pytest.mark.parametrize("method", BENCH["METHODS"])
def test_a_search_is_a_command_of_vitnas(tmp_path: Path, method: str) -> None:
    """One that is compared with a race has its epochs and, a random one, the time of its trials."""
    words = BENCH["search_command"](arguments(tmp_path), 0.6, method, 1)
    assert parsed(*words)["trials"] == 9
    spent = SimpleNamespace(wall_s=100.0)
    params = parsed(*words, *BENCH["bounds"](method, row("race", 1, 48.0), spent))
    assert (params["weights_from"] is None) == params["from_scratch"], "both are refused"
    assert params["final_epochs"] == (None if method == "race" else 12)
    assert params["timeout"] == ("200s" if method == "random" else None)
    assert (params["trials"] > 9) == (method == "random")


def test_a_search_without_final_accuracies_has_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor has one that is compared with it; others go on, and folders stay. All runs of a command count."""
    standing = {"name": "efficientvit_m0", "kind": "ready", "resolution": 64, "latency_ms": 0.5}
    whole = {
        "quality_tier": {"rungs": [{"epochs": 0, "networks": 4, "tau": {"tau": 0.3}}]},
        "validation": {"networks": 6, "tau": {"before any epoch": {"tau": 0.6}}},
        "accuracy": {"epochs": 12, "rows": [{"label": "efficientvit_m0", "top1": [47.0, 49.0]}]},
        "breakdown": [{"seconds": 200.0}, {"seconds": 50.0}],
        "winner": standing,
        "best_ready": standing,
        "gain_over_ready": None,
    }
    results = {"0.6": (2, None), "0.7": (1, whole | {"accuracy": None}), "0.8": (0, whole)}

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if command[0] == "git":
            return SimpleNamespace(stdout="abc\n")
        code, result = results[command[command.index("--latency-budget") + 1].removesuffix("ms")]
        folder = tmp_path / command[command.index("--study") + 1]
        (folder / "training").mkdir(parents=True, exist_ok=True)
        (folder / "trials.csv").write_text("trial\n0\n1\n")
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=code)

    monkeypatch.setitem(BENCH["run"].__globals__, "subprocess", SimpleNamespace(run=run))
    (tmp_path / "tin20-0.8ms-race-0.spent.json").write_text(json.dumps({"cpu_s": 1000.0, "wall_s": 500.0}))
    BENCH["run"](arguments(tmp_path, budget=[0.6, 0.7, 0.8], methods=["race", "random"]))
    said = capsys.readouterr().out
    assert "tin20-0.6ms-race-0: exit code 2, no final accuracies" in said
    assert "tin20-0.7ms-race-0: exit code 1, no final accuracies" in said
    assert "tin20-0.6ms-random-0: not run" in said
    assert [path.name for path in sorted(tmp_path.glob("*/training"))] == ["training"] * 2
    race, random = BENCH["rows_of"](tmp_path)
    assert (race.key, random.key) == (("tin20", 0.8, "race", 0), ("tin20", 0.8, "random", 0))
    assert (race.trials, race.trial_s, race.epochs, race.commit) == (2, 250.0, 12, "abc")
    assert (race.tau, race.ranked, race.final_tau, race.validated) == ({"0": 0.3}, {"0": 4}, 0.6, 6)
    assert race.cpu_s >= 1000
    assert race.winner.mean == 48


def test_a_search_is_one_value_whatever_its_seeds() -> None:
    """The seeds of final trainings share their network: one search has its own interval, several have Student's and,
    between methods, Welch's."""
    (line,) = BENCH["table"]([row("race", 0, 48.5), row("random", 0, 47.5, gain=None)])
    cells = dict(zip(BENCH["COLUMNS"], line, strict=True))
    assert cells["derived - ready"] == cells["race - ready"] == "+1.0 [-1.0, +3.0]"
    assert cells["derived - random"] == "+1.0"
    assert cells["race"] == "trial 7 (derived), 0.50: 49.0"
    assert cells["tau of rung 0 with the last"] == "0.50 (5)"
    assert cells["CPU min: race, scratch, random"] == "10, -, 10"
    rows = [row("race", 0, 48.5), row("race", 1, 50.5), row("random", 0, 47.5), row("random", 1, 48.5)]
    (line,) = BENCH["table"](rows)
    cells = dict(zip(BENCH["COLUMNS"], line, strict=True))
    assert cells["derived - ready"] == "+2.0 [-10.7, +14.7]"
    assert cells["derived - random"].startswith("+1.5 [-")


def test_rows_of_an_older_version_are_read(tmp_path: Path) -> None:
    ready = {"name": "a", "kind": "ready", "resolution": 64, "latency_ms": 0.5, "top1": [48.0]}
    older = {"data": "tin20", "budget_ms": 0.6, "method": "race", "seed": 0, "cpu_s": 60.0, "wall_s": 60.0, "trials": 9}
    older |= {"winner": ready, "best_ready": ready, "best_derived": None, "tau": {"0": 1.0}, "commit": "abc"}
    (tmp_path / "race.jsonl").write_text(json.dumps(older) + "\n")
    (line,) = BENCH["table"](BENCH["rows_of"](tmp_path))
    assert dict(zip(BENCH["COLUMNS"], line, strict=True))["race - ready"] == "+0.0"
