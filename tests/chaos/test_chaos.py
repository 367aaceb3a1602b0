"""The scripts of this folder in a short form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def chaos(script: str, *words: str) -> str:
    command = [sys.executable, str(FOLDER / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=FOLDER.parents[1])
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow  # by default test_loop kills a search, test_trials and test_storage a worker
def test_kills() -> None:
    assert "stand-in: " in chaos("kills.py", "--kills", "2", "--real", "0")


@pytest.mark.slow  # by default test_storage stops the server within every call of a search
def test_outages() -> None:
    assert "2 outages" in chaos("outages.py", "--kills", "3", "--away", "2")


def test_measuring_and_training_workers_whose_proxy_dies() -> None:
    told = chaos("steps.py", "--workers=3", "--kills=1", "--rounds=1", "--away=1", "--finals=0", "--only=grpc")
    assert "gRPC: 3 workers, " in told
    assert "0 measured twice, 0 epochs trained twice" in told


@pytest.mark.slow
def test_measuring_and_training_workers() -> None:
    told = chaos("steps.py", "--kills", "3", "--rounds", "1")
    assert "PostgreSQL: 8 workers" in told
    assert "gRPC: 8 workers" in told
    assert told.count("2 kills in 4 finals") == told.count("0 finals made twice, 0 finals lost") == 2


@pytest.mark.slow  # by default test_trials has other machines' leases
def test_a_cluster_of_machines_whose_clocks_differ() -> None:
    told = chaos("cluster.py", "--kills", "3", "--rounds", "1")
    assert "PostgreSQL: 8 workers, 3 kills" in told
    assert "gRPC: 8 workers, 3 kills" in told
