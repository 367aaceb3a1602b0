"""Real, short searches through the command line: found, killed, resumed, interrupted, shared."""

import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUDY = "short"
SHORT = ("--family", "efficientvit", "--family", "shvit", "--sampler", "random", "--seed", "3", "--threads", "1")


def command(out: Path, *words: str, budget: str = "30ms", trials: int = 6) -> list[str]:
    base = ["search", "--latency-budget", budget, "--trials", str(trials), "--study", STUDY, "--out", str(out)]
    return [sys.executable, "-m", "nas.cli", *base, *SHORT, *words]


def start(out: Path, *words: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        command(out, *words, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def trials_of(out: Path) -> list:
    import optuna

    from nas.storage import open_storage

    storage = open_storage(out / STUDY / "study.journal", read_only=True)
    return optuna.load_study(study_name=STUDY, storage=storage).get_trials(deepcopy=False)


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def samples(out: Path) -> int:
    path = out / STUDY / "samples.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory) -> tuple[Path, list, subprocess.CompletedProcess]:
    """A search killed by SIGKILL in its third trial or later, then run again to its end."""
    out = tmp_path_factory.mktemp("runs")
    process = start(out)
    wait_for(lambda: samples(out) >= 2)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in workers), 10)
    before = [t for t in trials_of(out) if t.state.is_finished()]
    return out, before, subprocess.run(command(out), capture_output=True, text=True, timeout=300)


def alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_resume_loses_nothing(killed_and_resumed):
    out, before, resumed = killed_and_resumed
    assert resumed.returncode == 0, resumed.stderr
    after = {t.number: t for t in trials_of(out)}
    assert before
    for trial in before:
        assert after[trial.number].values == trial.values
    assert all(t.state.is_finished() for t in after.values())
    assert 6 <= len(after) <= 7


def test_run_folder(killed_and_resumed):
    out, _, resumed = killed_and_resumed
    folder = out / STUDY
    names = {path.name for path in folder.iterdir()}
    assert {"study.journal", "hardware.json", "trials.csv", "pareto.json", "pareto.png", "report.html", "best"} <= names
    assert {path.name for path in (folder / "best").iterdir()} == {"arch.json", "model.onnx"}
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    complete = [row for row in rows if row["state"] == "complete"]
    for row in complete:
        assert (float(row["latency_ms"]) <= 30) == (row["feasible"].lower() in ("true", "1"))
    front = json.loads((folder / "pareto.json").read_text())
    assert front
    assert all(a["latency_ms"] < b["latency_ms"] and a["quality"] < b["quality"] for a, b in itertools.pairwise(front))
    for point in front:
        assert point["quality"] == pytest.approx(point["quality_estimate"] - point["quality_error"])
    assert "accuracy" not in resumed.stdout
    assert "overhead" in resumed.stdout


LOOP = """
import sys, time, statistics, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
(inp,) = session.get_inputs()
x = numpy.random.default_rng(0).standard_normal(inp.shape).astype("float32")
times = []
for _ in range(80):
    t = time.perf_counter(); (y,) = session.run(None, {inp.name: x}); times.append(time.perf_counter() - t)
assert numpy.isfinite(y).all()
print(statistics.median(times[20:]) * 1000)
"""


def test_reported_latency_holds_in_an_independent_loop(killed_and_resumed, tmp_path):
    """The winner against bare ONNX Runtime in new processes, in units of the reference network: machines drift."""
    from nas.export import write_artifact
    from nas.measure import Settings
    from nas.search import reference_arch

    out, _, _ = killed_and_resumed
    folder = out / STUDY
    arch = json.loads((folder / "best" / "arch.json").read_text())
    trial = next(p["trial"] for p in json.loads((folder / "pareto.json").read_text()) if p["arch"] == arch)
    row = next(r for r in csv.DictReader((folder / "trials.csv").open()) if int(r["trial"]) == trial)
    reported = float(row["latency_ms"]) / float(row["reference_ms"])
    reference = write_artifact(reference_arch(), Settings(threads=1), tmp_path / "reference")

    def bare(path: Path) -> float:
        return float(subprocess.run([sys.executable, "-c", LOOP, str(path)], capture_output=True, check=True).stdout)

    ratios = [bare(folder / "best" / "model.onnx") / bare(reference) / reported for _ in range(4)]
    assert any(1 / 1.5 < ratio < 1.5 for ratio in ratios), ratios


def test_a_finished_study_is_only_reported_again(killed_and_resumed):
    out, _, _ = killed_and_resumed
    before = len(trials_of(out))
    done = subprocess.run(command(out, "--json"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(trials_of(out)) == before
    data = json.loads(done.stdout)
    assert data["winner"]["arch"] == json.loads((out / STUDY / "best" / "arch.json").read_text())
    roles = [row["role"] for row in data["final"] if row["fits"]]
    assert roles.count("winner") == 1


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("--num-classes", "10"), "num_classes"),
        (("--batch-size", "2"), "batch_size"),
        (("--family", "levit"), "families"),
    ],
)
def test_resuming_with_another_setting_is_refused(killed_and_resumed, words, difference):
    out, _, _ = killed_and_resumed
    before = (out / STUDY / "study.journal").read_bytes()
    done = subprocess.run(command(out, *words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert difference in done.stderr
    assert done.stderr.count("\n") == 1
    assert (out / STUDY / "study.journal").read_bytes() == before


def test_resuming_with_another_budget_is_refused(killed_and_resumed):
    out, _, _ = killed_and_resumed
    done = subprocess.run(command(out, budget="3ms"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "budget_ms 30" in done.stderr


def test_nothing_fits(tmp_path):
    done = subprocess.run(command(tmp_path, budget="1us", trials=2), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "Nothing fits" in done.stdout
    assert "Fastest measured" in done.stdout
    assert "--family" in done.stdout
    assert not (tmp_path / STUDY / "best").exists()
    assert (tmp_path / STUDY / "report.html").exists()


def test_ctrl_c_writes_the_report_and_the_same_command_continues(tmp_path):
    process = start(tmp_path, trials=5)
    wait_for(lambda: samples(tmp_path) >= 1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1), err
    assert "interrupted" in err + out
    assert (tmp_path / STUDY / "report.html").exists()
    assert all(t.state.name in ("COMPLETE", "FAIL", "WAITING") for t in trials_of(tmp_path))
    done = subprocess.run(command(tmp_path, trials=5), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert all(t.state.is_finished() for t in trials_of(tmp_path))


def test_two_workers_share_a_study_and_one_dies(tmp_path):
    first, second = start(tmp_path, trials=6), start(tmp_path, trials=6)
    wait_for(lambda: samples(tmp_path) >= 2)
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    trials = trials_of(tmp_path)
    assert all(t.state.is_finished() for t in trials)
    assert sum(t.state.name == "COMPLETE" for t in trials) >= 5
    for dead in (t for t in trials if t.user_attrs.get("error") == "worker died"):
        assert any(t.user_attrs.get("retry_of") == dead.number and t.params == dead.params for t in trials)


def test_a_candidate_that_fails_is_a_failed_trial(tmp_path, monkeypatch):
    from nas.measure import MeasureError, Measurer, Settings
    from nas.outcome import finish_run, rows_of
    from nas.search import Options, search

    real, calls = Measurer.measure, []

    def measure(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MeasureError("killed by signal 9")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Measurer, "measure", measure)
    options = Options(50.0, Settings(threads=1), ("shvit",), 3, None, STUDY, tmp_path, None, "random", 0, 10)
    study, run = search(options, lambda progress: None, lambda line: None)
    rows = rows_of(study)
    assert [row["state"] for row in rows].count("failed") == 1
    assert "killed by signal 9" in next(row["error"] for row in rows if row["state"] == "failed")
    data = finish_run(options, study, run, "vitnas search")
    assert "killed by signal 9" in (tmp_path / STUDY / "report.html").read_text()
    assert data["winner"] is not None


def test_the_same_arch_is_measured_once(tmp_path):
    """Inactive parameters differ, the network does not: the measurement is reused and says so."""
    from nas.measure import Settings
    from nas.outcome import rows_of
    from nas.samplers import make_sampler
    from nas.search import Options, choices, meta, search
    from nas.study import enqueue, open_study
    from search_spaces import get_arch  # noqa: F401
    from search_spaces.registry import FAMILIES

    options = Options(50.0, Settings(threads=1), ("shvit",), 2, None, STUDY, tmp_path, None, "random", 0, 1000)
    options.folder.mkdir()
    study = open_study(STUDY, options.folder / "study.journal", meta(options), make_sampler("random", 0))
    family = FAMILIES["shvit"]
    for inactive in (0, 6):
        params = {**family.space.encode(family.variants["shvit_s1"].values), "width_s4": inactive}
        enqueue(study, {"family": "shvit", **params}, {}, choices(options))
    study, _ = search(options, lambda progress: None, lambda line: None)
    first, second = rows_of(study)
    assert (first["source"], second["source"]) == ("measured", "reused")
    assert first["latency_ms"] == second["latency_ms"]
    assert statistics.median([first["params_m"], second["params_m"]]) == pytest.approx(6.330808)
