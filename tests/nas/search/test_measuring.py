"""What a search measures besides a trial's latency: the cache, throughput at a batch, networks it is held against."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick

from nas.measure.cache import Cache, default_path
from nas.measure.runtime import Settings
from nas.measure.samples import SEARCH_PRECISION, MeasureError, Measurement
from nas.search.trial import TrialRunner, open_cache
from search_spaces import get_arch

SMALL = ("--latency-budget", "90ms", "--family", "shvit", "--resolution", "64", "--threads", "1", "--seed", "3")


pytestmark = pytest.mark.usefixtures("few_rounds", "small_shvit")


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "trials.csv").open()))


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_second_study_takes_latencies_from_the_cache(vitnas, tmp_path, monkeypatch, exports_here):
    monkeypatch.setattr("nas.measure.cache.SAME_SPEED", 10.0)  # other tests may be running beside this one,
    monkeypatch.setattr("nas.search.trial.is_decided", lambda *_: True)  # and this machine be noisy,
    monkeypatch.setattr("nas.search.trial.quanta", lambda measurement: False)  # or busy
    for study in ("first", "second"):
        assert vitnas("search", *SMALL, "--trials", "1", "--out", str(tmp_path), "--study", study)[0] == 0
    (first,), (second,) = (rows_of(tmp_path / study) for study in ("first", "second"))
    assert first["source"] == "measured"
    assert second["source"].startswith("cache, 20")
    assert second["latency_ms"] == first["latency_ms"]
    trials = [[s["rounds_ms"] for s in samples_of(tmp_path / study) if "trial" in s] for study in ("first", "second")]
    assert trials[0] == trials[1]  # every sample comes along
    assert "1 of 1 trials took their latency from" in (tmp_path / "second/report.html").read_text()


def test_a_cache_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITNAS_CACHE", str(tmp_path / "file" / "below"))
    said = []
    assert open_cache(SimpleNamespace(settings=Settings()), said.append) is None
    (line,) = said
    assert "no earlier latencies are used and none are kept" in line


@pytest.mark.parametrize(("slice_ms", "kept"), [([4.0, 1.0, 4.0], False), ([1.0, 1.0, 1.1], True)])
def test_waiting_times_do_not_enter_the_cache(tmp_path, slice_ms, kept):
    found = Measurement([slice_ms] * 8, [[2.0]] * 8)
    settings = Settings()
    cache = Cache({}, tmp_path / "latency.sqlite")
    runner = TrialRunner(SimpleNamespace(settings=settings, folder=tmp_path), None, None, cache)
    runner.reference_ms, runner._folder, runner._lately = 2.0, tmp_path, deque([2.0])
    runner._exporter = SimpleNamespace(write=lambda *_: tmp_path, running=())
    runner.measurer = SimpleNamespace(prepare=lambda: None, measure=lambda *_, **__: found)
    clock = SimpleNamespace(lap=lambda *_, **__: None, add=lambda *_: None)
    arch = get_arch("shvit_s1")
    assert runner._timed(SimpleNamespace(number=0), arch, settings, 9.0, clock) == (found, None)
    assert (cache.last(arch, 1) is not None) == kept


@pytest.mark.parametrize(
    ("references", "took", "measured"),
    [
        ([1.0, 1.0], 1.2, 1),  # over the budget at the usual speed
        ([1.5, 1.0], 1.2, 2),
        ([1.5, 1.3, 1.4], 1.2, 3),
        ([1.5, 1.5], 1.7, 1),  # over it also at the usual speed
        ([1.5, 1.5], 0.9, 1),  # within it even so
        ([1.1, 1.0], 1.05, 1),  # so little is the noise of a machine
    ],
)
def test_what_is_over_the_budget_while_the_machine_is_slow_is_measured_again(tmp_path, references, took, measured):
    """The measurement whose reference is the fastest is kept, whatever it says of the network."""
    found = [Measurement([[took]] * 8, [[each]] * 8) for each in references]
    runs = iter(found)
    runner = TrialRunner(SimpleNamespace(settings=Settings(), folder=tmp_path), None, None)
    runner._folder, runner._lately = tmp_path, deque([1.0, 1.0, 1.9])
    runner._exporter = SimpleNamespace(write=lambda *_: tmp_path, running=())
    runner.measurer = SimpleNamespace(prepare=lambda: None, measure=lambda *_, **__: next(runs))
    clock = SimpleNamespace(lap=lambda *_, **__: None, add=lambda *_: None)
    result = runner._measured(get_arch("shvit_s1"), Settings(), 1.0, clock, 0.05)
    assert len(found) - len(list(runs)) == measured
    assert result.reference_p50_ms == runner.reference_ms == runner._lately[-1] == min(references[:measured])
    assert len(runner.notes) == measured - 1
    assert all("the machine was slower" in note for note in runner.notes)


def test_where_measuring_again_fails_the_first_measurement_counts(tmp_path):
    first = Measurement([[1.2]] * 8, [[1.5]] * 8)
    runs = iter([first])

    def measure(*_, **__):
        for found in runs:
            return found
        raise MeasureError("killed by signal 9")

    runner = TrialRunner(SimpleNamespace(settings=Settings(), folder=tmp_path), None, None)
    runner._folder, runner._lately = tmp_path, deque([1.0])
    runner._exporter = SimpleNamespace(write=lambda *_: tmp_path, running=())
    runner.measurer = SimpleNamespace(prepare=lambda: None, measure=measure)
    clock = SimpleNamespace(lap=lambda *_, **__: None, add=lambda *_: None)
    assert runner._measured(get_arch("shvit_s1"), Settings(), 1.0, clock, 0.05) is first
    assert runner.notes[1] == "not measured again: killed by signal 9"


@pytest.mark.parametrize(("rounds", "ci"), [(3, (None, None)), (5, (None, None)), (6, (4.0, 4.0))])
def test_a_few_rounds_have_no_interval_of_95_percent(rounds, ci):
    runner = TrialRunner(SimpleNamespace(settings=Settings(), budget_ms=2.0, throughput_at=None), None, None)
    found = Measurement([[4.0]] * rounds, [[2.0]] * rounds)
    runner._timed = lambda *_: (found, None)
    told = runner._latency(None, None, None, "fp32", SEARCH_PRECISION)
    assert (told.latency_ci_low_ms, told.latency_ci_high_ms) == ci
    assert told.rounds == rounds
    assert told.verdict(2.0) == "over", "it was ended so early because it is far over the budget"
    assert told.verdict(3.9) == ("unsure" if rounds < 6 else "over"), "its time was up"


def test_a_cache_that_fails_later_is_told_once(tmp_path):
    runner = TrialRunner(SimpleNamespace(settings=Settings()), None, None, Cache({}, tmp_path / "latency.sqlite"))

    def full(cache):
        raise sqlite3.OperationalError("database or disk is full")

    for _ in range(2):
        assert runner._cached(full) is None
    (note,) = runner.notes
    assert note.startswith(f"the cache of latencies is no longer used: no space left in {tmp_path} (")


def test_throughput_at_a_batch_and_networks_beside(vitnas, tmp_path, monkeypatch, exports_here):
    quick.small_levit(monkeypatch)
    words = (
        "--trials",
        "1",
        "--throughput-at",
        "4",
        "--against",
        "timm/test_vit",
        "--against",
        "levit_128s",
        "--no-cache",
    )
    code, out, err = vitnas("search", *SMALL, *words, "--out", str(tmp_path), "--study", "s", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["throughput_at"] == 4
    rows, samples = rows_of(tmp_path / "s"), samples_of(tmp_path / "s")
    batches = {s["trial"]: s for s in samples if s.get("batch_size") == 4 and "trial" in s}
    assert set(batches) == {int(row["trial"]) for row in rows}
    for row in rows:
        p50 = sorted(ms for part in batches[int(row["trial"])]["rounds_ms"] for ms in part)
        assert float(row["throughput"]) == pytest.approx(4000 / p50[len(p50) // 2], rel=0.2)
        assert float(row["throughput"]) != pytest.approx(1000 / float(row["latency_ms"]), rel=1e-6)
    beside = {row["label"]: row for row in found["against"]}
    assert set(beside) == {"timm/test_vit", "levit_128s"}
    winner = found["final"][0]
    for row in beside.values():
        assert row["verdict"] == "fits"
        assert row["resolution"] == 64  # not timm's own 160, as the winner's is 64
        assert row["ratio"] == pytest.approx(row["latency_ms"] / winner["latency_ms"], rel=0.5)
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    page = (tmp_path / "s" / "report.html").read_text()
    assert "<h2>Against</h2>" in page
    assert "timm/test_vit" in page
    assert not default_path().exists()
    # the second objective belongs to the study
    code, _, err = vitnas("search", *SMALL, "--trials", "1", "--out", str(tmp_path), "--study", "s")
    assert code == 2
    assert "throughput_at" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--against", "timm/no_such_network"), "timm has no network"),
        (("--against", "absent.json"), "no such file"),
        (("--throughput-at", "0"), "batch size is 0"),
        (("--precision", "int4"), "unknown precision 'int4'"),
        (("--precision", "fp16"), "not fp16"),
    ],
)
def test_what_cannot_be_measured_is_refused(vitnas, tmp_path, words, message):
    result = vitnas("search", *SMALL, *words, "--out", str(tmp_path / "runs"))
    vitnas.refused(result, message)
    assert not (tmp_path / "runs").exists()
