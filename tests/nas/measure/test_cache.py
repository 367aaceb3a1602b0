"""The cache of latencies: what counts as the same measurement."""

import sqlite3
from pathlib import Path

import pytest

import nas.measure
import nas.measure.cache
from nas.bench.known import fill
from nas.measure.cache import (
    SHAPING,
    Cache,
    code_digest,
    default_path,
    digest_of,
    known,
    machine_of,
    opened,
    shaping_files,
)
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement
from nas.networks.timm_network import TimmNetwork
from nas.search.request import SearchRequest
from nas.search.trial import open_cache
from search_spaces import get_arch

MACHINE = {"cpu": "a", "threads": 1}
RESULT = Measurement([[1.0, 1.1]] * 8, [[2.0, 2.0]] * 8, load_s=0.5, wall_s=1.0)
WAITING = Measurement([[4.0, 1.0, 4.0]] * 8, [[2.0, 2.0]] * 8)
"""Turns of the scheduler: most samples have waited for a CPU."""


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


def test_what_was_measured_before_at_any_speed(cache: Cache) -> None:
    """Of the families, with the same batch size and precision, unless it waited for a CPU; the last one last."""
    small, slow = get_arch("levit_128s"), Measurement([[9.0]] * 8, [[4.5]] * 8)
    cache.put(small, 1, slow)
    cache.put(get_arch("shvit_s2"), 2, slow)
    cache.put(get_arch("shvit_s3"), 1, WAITING)
    cache.put(get_arch("shvit_s4"), 1, slow, "int8")
    cache.put(TimmNetwork("lcnet_050"), 1, slow)
    cache._rows.execute("UPDATE latency SET measured = '2020' WHERE arch = ?", [small.to_json()])
    assert cache.relative(1) == [(small, 2.0), (get_arch("shvit_s1"), RESULT.p50_ms / 2)]
    assert Cache(MACHINE | {"threads": 2}, cache.path).relative(1) == []


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "latency.sqlite"
    path.write_text("something else, long enough to be read as a header of a database" * 3)
    with pytest.raises(sqlite3.Error):
        Cache(MACHINE, path)


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITNAS_CACHE", "/somewhere")
    assert default_path() == Path("/somewhere/latency.sqlite")
    monkeypatch.setenv("VITNAS_CACHE", "~/kept")
    assert default_path() == Path.home() / "kept" / "latency.sqlite"
    monkeypatch.setenv("VITNAS_CACHE", "")
    usual = default_path()
    monkeypatch.delenv("VITNAS_CACHE")
    assert default_path() == usual == Path.home() / ".cache" / "vitnas" / "latency.sqlite"


def test_the_code_that_counts_is_there_and_no_more_of_networks_than_shapes_them() -> None:
    root = Path(nas.measure.cache.__file__).parents[2]
    assert [pattern for pattern in SHAPING if not any(root.glob(pattern))] == []
    names = {str(path.relative_to(root)) for path in shaping_files()}
    assert {"search_spaces/widths.py", "nas/measure/runtimes/ort.py", "nas/networks/build.py"} <= names
    assert not {"nas/networks/weights.py", "nas/networks/targets.py"} & names


def test_other_code_or_libraries_measure_another_quantity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in code:
        path.write_text("x = 1")
    before = digest_of(code)
    assert digest_of(code) == before
    code[1].write_text("x = 2")
    assert digest_of(code) != before
    after = digest_of(code)
    whole = nas.measure.cache.version
    monkeypatch.setattr(nas.measure.cache, "version", lambda name: "0.0" if name == "timm" else whole(name))
    assert digest_of(code) != after


def test_what_shapes_a_network_or_its_file_is_among_the_code() -> None:
    root = Path(nas.measure.cache.__file__).parents[2]
    covered = {path for pattern in nas.measure.cache.SHAPING for path in root.glob(pattern)}
    for name in (
        "search_spaces/layers.py",
        "search_spaces/shvit.py",
        "nas/export/artifact.py",
        "nas/export/graph.py",
        "nas/export/options.py",
        "nas/measure/runtimes/ort.py",
    ):
        assert root / name in covered
    assert all(list(root.glob(pattern)) for pattern in nas.measure.cache.SHAPING)


def test_a_search_uses_no_latency_of_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITNAS_CACHE", str(tmp_path))
    options = SearchRequest(1.0, Settings(threads=1), ("shvit",), 1, None, "s", tmp_path, None, "random", 0, 1000)
    open_cache(options, print).put(get_arch("shvit_s1"), 1, RESULT)
    assert open_cache(options, print).get(get_arch("shvit_s1"), 1, 2.0)
    monkeypatch.setattr(nas.measure.cache, "code_digest", lambda: code_digest() + " changed")
    assert open_cache(options, print).get(get_arch("shvit_s1"), 1, 2.0) is None


def test_what_is_known_is_told_whatever_the_speed_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITNAS_CACHE", str(tmp_path / "deep"))
    arch, settings = get_arch("shvit_s1"), Settings()
    assert known(arch, settings) is None
    assert not (tmp_path / "deep").exists()
    cache = Cache(machine_of(settings))
    cache.put(arch, 1, Measurement([[1.0]] * 5, [[2.0]] * 5))
    assert known(arch, settings) is None  # no interval of 95%
    cache.put(arch, 1, WAITING)
    assert known(arch, settings) is None  # kept by an earlier vitnas
    cache.put(arch, 1, RESULT)
    when, found = known(arch, settings)
    assert (when[:2], found) == ("20", RESULT)
    assert known(arch, Settings(batch_size=2)) is None
    assert known(arch.at(96), settings) is None


def test_fill_measures_what_known_then_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class Measurer:
        def __enter__(self) -> "Measurer":
            return self

        def __exit__(self, *_: object) -> None:
            events.append("closed")

        def measure(self, path: str, pause: list) -> Measurement:
            if path == "shvit_s2":
                raise MeasureError("no answer")
            if path == "levit_128":
                raise KeyboardInterrupt
            if path == "shvit_s3":
                return WAITING
            if path == "shvit_s4":
                return Measurement([[1.0]] * 5, [[2.0]] * 5, wall_s=61.0)
            return RESULT

    every = ("efficientvit_m0", "shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4", "levit_128")
    names = {get_arch(name): name for name in every}
    monkeypatch.setattr("nas.export.artifact.Exporter.write", lambda self, arch, settings, stem: names[arch])
    monkeypatch.setattr("nas.measure.device.open_measurer", lambda settings, reference, room: Measurer())
    monkeypatch.setattr("nas.measure.hardware.describe", lambda settings: {})
    monkeypatch.setattr("nas.bench.known.quanta_line", lambda described: "busy")
    archs = {name: arch for arch, name in names.items() if name.startswith("shvit")}
    failed = fill(archs, Settings(), lambda *done: events.append(done))
    few = "only 5 rounds in 61 s, and an interval of 95% needs 6"
    assert failed == {"shvit_s2": "no answer", "shvit_s3": "busy", "shvit_s4": few}
    assert fill({}, Settings()) == {}
    assert events == [*((name, done, 4) for done, name in enumerate(every[1:5])), "closed"]
    assert known(archs["shvit_s1"], Settings())[1] == RESULT
    with opened(Settings()) as cache:
        assert [cache.last(archs[name], 1) is None for name in failed] == [True, True, False]
    with pytest.raises(KeyboardInterrupt):
        fill({name: arch for arch, name in names.items()}, Settings())
    assert known(get_arch("efficientvit_m0"), Settings())[1] == RESULT
