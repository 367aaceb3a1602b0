"""The cache of latencies: what counts as the same measurement."""

import sqlite3
from pathlib import Path

import pytest

from nas.cache import Cache, default_path
from nas.measure import Measurement
from search_spaces import get_arch

MACHINE = {"cpu": "a", "threads": 1}
RESULT = Measurement([[1.0, 1.1]] * 8, [[2.0, 2.0]] * 8, load_s=0.5, wall_s=1.0)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(MACHINE, tmp_path / "deep" / "latency.sqlite")
    cache.put(get_arch("shvit_s1"), 1, RESULT)
    return cache


def test_a_result_comes_back_whole_in_a_new_process(cache: Cache, tmp_path: Path) -> None:
    cache.close()
    when, found = Cache(dict(reversed(MACHINE.items())), tmp_path / "deep" / "latency.sqlite").get(
        get_arch("shvit_s1"), 1, 2.0
    )
    assert found == RESULT
    assert when.startswith("20")


def test_only_the_same_network_batch_and_machine(cache: Cache, tmp_path: Path) -> None:
    assert cache.get(get_arch("shvit_s2"), 1, 2.0) is None
    assert cache.get(get_arch("shvit_s1"), 2, 2.0) is None
    other = Cache(MACHINE | {"threads": 2}, tmp_path / "deep" / "latency.sqlite")
    assert other.get(get_arch("shvit_s1"), 1, 2.0) is None


@pytest.mark.parametrize(
    ("reference_ms", "known"), [(2.0, True), (2.09, True), (1.92, True), (2.2, False), (1.8, False)]
)
def test_only_at_the_same_speed(cache: Cache, reference_ms: float, known: bool) -> None:
    assert (cache.get(get_arch("shvit_s1"), 1, reference_ms) is not None) == known


def test_the_newest_counts(cache: Cache) -> None:
    newer = Measurement([[3.0]] * 8, [[2.0]] * 8)
    cache.put(get_arch("shvit_s1"), 1, newer)
    assert cache.get(get_arch("shvit_s1"), 1, 2.0)[1] == newer


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "latency.sqlite"
    path.write_text("something else, long enough to be read as a header of a database" * 3)
    with pytest.raises(sqlite3.Error):
        Cache(MACHINE, path)


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITNAS_CACHE", "/somewhere")
    assert default_path() == Path("/somewhere/latency.sqlite")
    monkeypatch.delenv("VITNAS_CACHE")
    assert default_path().parts[-3:] == (".cache", "vitnas", "latency.sqlite")
