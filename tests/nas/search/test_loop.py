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
from dataclasses import dataclass
from pathlib import Path

import pytest
import quick
from forked import Forked

STUDY = "short"
FAMILIES = ("--family", "levit", "--family", "shvit")
SHORT = (*FAMILIES, "--sampler", "random", "--seed", "3", "--threads", "1", "--resolution", "64")
TRIALS = 4
MANY = 16  # more than are done by the time a worker is stopped


pytestmark = pytest.mark.usefixtures("few_rounds")


def command(out: Path, *words: str, budget: str = "30ms", trials: int = TRIALS) -> list[str]:
    base = ["search", "--latency-budget", budget, "--trials", str(trials), "--study", STUDY, "--out", str(out)]
    return [*base, *SHORT, *words]


def start(program: str, out: Path, trials: int) -> Forked:
    return Forked(program, *command(out, trials=trials), session=True)


def trials_of(out: Path) -> list:
    import optuna

    from nas.study.storage import open_storage

    storage = open_storage(out / STUDY / "study.journal", read_only=True)
    return optuna.load_study(study_name=STUDY, storage=storage).get_trials(deepcopy=False)


def wait_for(condition, seconds: float = 300) -> None:
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


@dataclass
class Ended:
    """How a process ended, and the trials of the study then."""

    code: int
    out: str
    err: str
    trials: list

    @property
    def finished(self) -> list:
        return [trial for trial in self.trials if trial.state.is_finished()]


def ended(process: Forked, out: Path) -> Ended:
    text, err = process.communicate(timeout=300)
    return Ended(process.returncode, text, err, trials_of(out))


@dataclass
class Course:
    """One search in three processes: two at once, of which the first is killed by SIGKILL and, a trial later, the
    second interrupted by Ctrl-C; a third that runs to the end, which is after `trials`. reported: whether there was a
    report after Ctrl-C."""

    out: Path
    killed: Ended
    interrupted: Ended
    reported: bool
    trials: int
    done: Ended


@pytest.fixture(scope="module")
def course(tmp_path_factory, exports) -> Course:
    out = tmp_path_factory.mktemp("runs")
    exporting = quick.program(exports)
    first, second = start(quick.program(), out, MANY), start(exporting, out, MANY)
    wait_for(lambda: samples(out) >= 2)
    below = children(first.pid)
    first.kill()
    killed = ended(first, out)
    wait_for(lambda: not any(alive(pid) for pid in below))
    before = samples(out)
    wait_for(lambda: samples(out) > before)
    os.kill(second.pid, signal.SIGINT)
    interrupted = ended(second, out)
    reported = (out / STUDY / "report.html").exists()
    trials = max(TRIALS, len(interrupted.finished) + 2)
    done = ended(start(exporting, out, trials), out)
    return Course(out, killed, interrupted, reported, trials, done)


def alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_resume_loses_nothing(course):
    assert course.done.code == 0, course.done.err
    after = {t.number: t for t in course.done.trials}
    for before in (course.killed, course.interrupted):
        assert before.finished
        for trial in before.finished:
            assert after[trial.number].values == trial.values
    assert all(t.state.is_finished() for t in after.values())
    assert course.trials <= len(after) <= course.trials + 3
    assert sum(t.state.name == "COMPLETE" for t in after.values()) >= course.trials - 1


def test_trials_of_dead_workers_are_made_again(course):
    """With what had been suggested of their parameters; one killed before that has none."""
    trials = course.done.trials
    dead_ones = [t for t in trials if t.user_attrs.get("error") == "worker died"]
    at_the_kill = {t.number for t in course.killed.trials if t.state.name != "COMPLETE"}
    assert {t.number for t in dead_ones} <= at_the_kill, "of the other worker none"
    for dead in (t for t in dead_ones if "retry_of" not in t.user_attrs and t.params):
        (again,) = (t for t in trials if t.user_attrs.get("retry_of") == dead.number)
        given = again.system_attrs["fixed_params"] | again.params  # Ctrl-C may have ended it among its suggestions
        assert dead.params.items() <= given.items()


def test_ctrl_c_writes_the_report(course):
    found = course.interrupted
    assert found.code == 130, found.err
    assert "interrupted" in found.err + found.out
    assert course.reported
    assert all(t.state.name in ("COMPLETE", "FAIL", "WAITING") for t in found.trials)
    assert len(course.killed.finished) < len(found.finished) <= len(course.done.finished)


def test_run_folder(course):
    folder = course.out / STUDY
    names = {path.name for path in folder.iterdir()}
    assert {"study.journal", "hardware.json", "trials.csv", "pareto.json", "pareto.png", "report.html", "best"} <= names
    assert {path.name for path in (folder / "best").iterdir()} == {"arch.json", "model.onnx", "preprocess.json"}
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    complete = [row for row in rows if row["state"] == "complete"]
    for row in complete:
        assert (float(row["latency_ms"]) <= 30) == (row["feasible"].lower() in ("true", "1"))
    front = json.loads((folder / "pareto.json").read_text())
    assert front
    assert all(a["latency_ms"] < b["latency_ms"] and a["quality"] < b["quality"] for a, b in itertools.pairwise(front))
    for point in front:
        low, high = point["quality_ci"]
        assert 0 <= low < point["quality"] < point["quality_estimate"] < high <= 100
    assert "accuracy" not in course.done.out
    assert "overhead" not in course.done.out, "that is for --verbose"
    *_, network, report, then = course.done.out.splitlines()
    assert network == f"Network: {folder / 'best' / 'model.onnx'} (random weights)"
    assert report == f"Report: {folder / 'report.html'}"
    assert then.startswith(f"Next: vitnas train {folder / 'best'} --data ")


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


def test_reported_latency_holds_in_an_independent_loop(course, tmp_path):
    """The winner against bare ONNX Runtime in new processes, in units of the reference network: machines drift."""
    from nas.export.artifact import write_artifact
    from nas.measure.runtime import Settings
    from nas.search.trial import reference_arch

    folder = course.out / STUDY
    arch = json.loads((folder / "best" / "arch.json").read_text())
    trial = next(p["trial"] for p in json.loads((folder / "pareto.json").read_text()) if p["arch"] == arch)
    row = next(r for r in csv.DictReader((folder / "trials.csv").open()) if int(r["trial"]) == trial)
    reported = float(row["latency_ms"]) / float(row["reference_ms"])
    reference = write_artifact(reference_arch(), Settings(threads=1), tmp_path / "reference")

    def bare(path: Path) -> float:
        return float(subprocess.run([sys.executable, "-c", LOOP, str(path)], capture_output=True, check=True).stdout)

    ratios = []
    for _ in range(4):
        ratios.append(bare(folder / "best" / "model.onnx") / bare(reference) / reported)
        if 1 / 1.5 < ratios[-1] < 1.5:
            return
    pytest.fail(f"never near the reported ratio: {ratios}")


def test_a_finished_study_is_only_reported_again(course, vitnas, monkeypatch, small_shvit, exports_here):
    quick.small_levit(monkeypatch)
    code, text, err = vitnas(*command(course.out, "--json", trials=course.trials))
    assert code == 0, err
    assert len(trials_of(course.out)) == len(course.done.trials)
    data = json.loads(text)
    assert data["winner"]["arch"] == json.loads((course.out / STUDY / "best" / "arch.json").read_text())
    roles = [row["role"] for row in data["final"] if row["verdict"] == "fits"]
    assert roles.count("winner") == 1


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("--num-classes", "10"), "num_classes"),
        (("--batch-size", "2"), "batch_size"),
        (("--family", "evit"), "families"),
    ],
)
def test_resuming_with_another_setting_is_refused(course, vitnas, words, difference):
    before = (course.out / STUDY / "study.journal").read_bytes()
    vitnas.refused(vitnas(*command(course.out, *words)), difference)
    assert (course.out / STUDY / "study.journal").read_bytes() == before


def test_resuming_with_another_budget_is_refused(course, vitnas):
    vitnas.refused(vitnas(*command(course.out, budget="3ms")), "budget_ms 30")


def test_nothing_fits(tmp_path, vitnas, monkeypatch, small_shvit, exports_here):
    quick.small_levit(monkeypatch)
    code, text, err = vitnas(*command(tmp_path, budget="1us", trials=2))
    assert code == 1, err
    assert "Nothing fits" in text
    assert "Fastest measured" in text
    assert "--family" in text
    assert not (tmp_path / STUDY / "best").exists()
    assert (tmp_path / STUDY / "report.html").exists()


def test_a_candidate_that_fails_is_a_failed_trial(tmp_path, monkeypatch, small_shvit, exports_here):
    from nas.measure.protocol import Measurer
    from nas.measure.runtime import Settings
    from nas.measure.samples import MeasureError
    from nas.search.finish import finish_run
    from nas.search.loop import search
    from nas.search.request import SearchRequest
    from nas.search.rows import rows_of

    real, calls = Measurer.measure, []

    def measure(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MeasureError("killed by signal 9")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Measurer, "measure", measure)
    options = SearchRequest(
        50.0, Settings(threads=1), ("shvit",), 2, None, STUDY, tmp_path, None, "random", 0, 10, resolution=64
    )
    study, run = search(options, lambda progress: None, lambda line: None)
    rows = rows_of(study)
    assert [row.state for row in rows].count("failed") == 1
    assert "killed by signal 9" in next(row.error for row in rows if row.state == "failed")
    outcome = finish_run(options, study, run, "vitnas search")
    assert "killed by signal 9" in (tmp_path / STUDY / "report.html").read_text()
    assert outcome.winner is not None


def test_the_same_arch_is_measured_once(tmp_path, exports_here):
    """Inactive parameters differ, the network does not: the measurement is reused and says so."""
    from nas.measure.runtime import Settings
    from nas.search.loop import search
    from nas.search.published import choices
    from nas.search.request import SearchRequest
    from nas.search.rows import rows_of
    from nas.study.samplers import make_sampler
    from nas.study.trials import enqueue, open_study
    from search_spaces import get_arch  # noqa: F401
    from search_spaces.registry import FAMILIES

    options = SearchRequest(50.0, Settings(threads=1), ("shvit",), 2, None, STUDY, tmp_path, None, "random", 0, 1000)
    options.folder.mkdir()
    study = open_study(STUDY, options.folder / "study.journal", options.identity(), make_sampler("random", 0))
    family = FAMILIES["shvit"]
    for inactive in (0, 6):
        params = {**family.space.encode(family.variants["shvit_s1"].values), "width_s4": inactive}
        enqueue(study, {"family": "shvit", **params}, {}, choices(options))
    study, _ = search(options, lambda progress: None, lambda line: None)
    first, second = rows_of(study)
    assert (first.source, second.source) == ("measured", "reused")
    assert first.latency_ms == second.latency_ms
    assert statistics.median([first.params_m, second.params_m]) == pytest.approx(6.330808)


def test_no_count_of_trials_is_shown_before_a_refusal(tmp_path, monkeypatch):
    from nas.errors import UserError
    from nas.measure.runtime import Settings
    from nas.search.loop import _Search
    from nas.search.request import SearchRequest

    def refuse(self):
        raise UserError("no weights")

    monkeypatch.setattr(_Search, "_open_tier", refuse)
    shown = []
    options = SearchRequest(50.0, Settings(threads=1), ("shvit",), 2, study=STUDY, out=tmp_path, num_classes=10)
    with pytest.raises(UserError, match="no weights"):
        _Search(options, shown.append, lambda line: None, lambda *_: None, None).run()
    assert not shown
