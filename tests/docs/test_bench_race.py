"""The benchmark of a race: its commands are such as vitnas takes."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import pytest
import typer

from nas.cli.app import app

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/bench_race.py"))
COMMANDS = typer.main.get_command(app).commands


def parsed(name: str, *words: str) -> dict[str, object]:
    return COMMANDS[name].make_context(name, list(words)).params


def test_latencies_are_measured_by_a_command_of_vitnas(tmp_path: Path) -> None:
    assert parsed(*BENCH["bench_command"](tmp_path))["csv"] == tmp_path / "latencies.csv"


@pytest.mark.parametrize("method", BENCH["METHODS"])
def test_a_search_is_a_command_of_vitnas(tmp_path: Path, method: str) -> None:
    args = argparse.Namespace(data=tmp_path, zoo=tmp_path, out=tmp_path, options=["--trials", "9"], px=64)
    found = parsed(*BENCH["search_command"](args, 0.6, method, 1))
    assert found["trials"] == 9
    assert (found["weights_from"] is None) == found["from_scratch"], "both are refused"
