"""Export, lock, compare: what is measured side by side, with invented latencies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nas.export import side_by_side
from nas.export.side_by_side import Longer, measure_side_by_side
from nas.measure.protocol import Interrupted
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is locked, exported and timed, in order; networks take 1 ms in every round."""
    told: list[str] = []

    @contextmanager
    def device_lock(device: str) -> Iterator[None]:
        told.append(f"lock {device}")
        yield
        told.append("free")

    def compare(paths, settings, rounds, *_):
        assert all(path.is_file() for path in paths.values())
        told.append(f"time {' '.join(paths)}")
        return {name: Measurement([[1.0]] * rounds) for name in paths}

    monkeypatch.setattr(side_by_side, "device_lock", device_lock)
    monkeypatch.setattr(side_by_side, "compare", compare)
    return told


def export(network: str, stem: Path) -> Path:
    if network == "odd":
        raise ValueError("no such operator\nmore of it")
    stem.write_text(network)
    return stem


def test_what_cannot_be_exported_leaves_the_others(events: list[str], tmp_path: Path) -> None:
    found = measure_side_by_side({"a": "net", "b": "odd"}, export, Settings(), 3, tmp_path)
    assert isinstance(found["b"], MeasureError)
    assert str(found["b"]) == "cannot be exported: no such operator"
    assert len(found["a"].rounds_ms) == 3
    assert events == ["lock cpu", "time a", "free"]
    assert not list(tmp_path.iterdir()), "the files are removed"


def test_the_user_of_it_says_why_a_network_has_no_file(events: list[str], tmp_path: Path) -> None:
    def refuse(network: str, stem: Path) -> Path:
        if network == "odd":
            raise MeasureError("made elsewhere")
        return export(network, stem)

    found = measure_side_by_side({"a": "net", "b": "odd"}, refuse, Settings(), 3, tmp_path)
    assert str(found["b"]) == "made elsewhere"


def test_settings_of_each_and_ctrl_c(events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be exported is among the results of an interrupted run."""

    def compare(paths, settings, *_):
        assert settings == {"a": Settings(threads=2)}
        raise Interrupted({"a": Measurement([[1.0]])}, 1)

    monkeypatch.setattr(side_by_side, "compare", compare)
    each = {"a": Settings(threads=2), "b": Settings()}
    with pytest.raises(Interrupted) as cut:
        measure_side_by_side({"a": "net", "b": "odd"}, export, each, 3, tmp_path)
    assert cut.value.done == 1
    assert list(cut.value.results) == ["b", "a"]


def test_some_are_measured_longer(events: list[str], tmp_path: Path) -> None:
    longer = Longer(lambda results: ["b"], 9, lambda *_: pytest.fail("none fails"))
    found = measure_side_by_side({"a": "net", "b": "net"}, export, Settings(), 3, tmp_path, longer=longer)
    assert {name: len(result.rounds_ms) for name, result in found.items()} == {"a": 3, "b": 9}
    assert events == ["lock cpu", "time a b", "time b", "time b", "free"]
