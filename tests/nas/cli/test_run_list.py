"""`vitnas runs`: folders of every kind, whole and damaged, read by their files alone."""

import fcntl
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nas.cli.run_list import list_runs
from nas.files import folder_lock

WINNER = {
    "label": "trial 12",
    "family": "efficientvit",
    "latency_ms": 1.234,
    "quality": 36.8,
    "quality_estimate": 37.9,
    "top1": 59.5,
}
SEARCH = {"budget_ms": 1.5, "winner": WINNER, "interrupted": False, "failures": []}
TRAIN = {"model": "shvit_s1", "recipe": {"epochs": 3}, "final": {"top1": 61.2}, "epochs": [{}] * 3, "error": None}
PRUNE = {
    "model": "levit_192",
    "budget": {"metric": "macs", "text": "0.5x"},
    "accuracy": {"before": {"top1": 70.0}, "pruned": {"top1": 50.0}, "recovered": {"top1": 65.0}},
    "after": {"latency_ms": 2.0},
}
JUDGED = [{"label": "theirs.onnx", "top1": 50.0}, {"label": "mine.onnx", "top1": 60.0}]
EVALUATE = {"results": JUDGED, "interrupted": False}
BEGUN = {"options": {"model": "levit_192", "budget": "0.5x"}}


@pytest.fixture
def made(tmp_path):
    """Write a file of a run's folder."""

    def write(run: str, name: str, content: object) -> Path:
        path = tmp_path / run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def told(root: Path) -> dict:
    return {row["run"]: (row["kind"], row["budget"], row["best"], row["state"]) for row in list_runs(root)}


def test_every_kind_of_run(made, tmp_path):
    made("a", "result.json", SEARCH)
    made("b", "result.json", SEARCH | {"interrupted": True, "winner": WINNER | {"top1": None}})
    made("c", "result.json", SEARCH | {"winner": None})
    made("d", "metrics.json", TRAIN)
    made("e", "metrics.json", TRAIN | {"epochs": [{}]})
    made("f", "prune.json", PRUNE)
    made("i", "prune.json", PRUNE | {"kept": "pruned"})
    made("j", "result.json", SEARCH | {"winner": WINNER | {"top1": 0.0}})
    made("g", "state/state.json", BEGUN)
    made("h", "arch.json", {"family": "levit"})
    made("k", "evaluate.json", EVALUATE)
    made("l", "prune.json", PRUNE | {"settings": {"precision": "int8"}, "price": {"top1": 64.0}})
    made("m", "prune.json", PRUNE | {"settings": {"precision": "int8"}, "price": None})
    made("n", "prune.json", PRUNE | {"options": {"unlabelled": "photos"}})
    best = "trial 12 (efficientvit), 1.23 ms"
    assert told(tmp_path) == {
        "a": ("search", "1.5 ms", f"{best}, 59.5% top-1", "finished"),
        "b": ("search", "1.5 ms", f"{best}, score 36.8", "interrupted"),
        "c": ("search", "1.5 ms", "nothing fits", "finished"),
        "d": ("train", "", "shvit_s1, 61.2% top-1", "finished"),
        "e": ("train", "", "shvit_s1, 61.2% top-1", "interrupted, 1 of 3 epochs"),
        "f": ("prune", "macs 0.5x", "levit_192, 2.00 ms, 65.0% top-1", "finished"),
        "g": ("prune", "", "levit_192", "interrupted"),
        "h": ("export", "", "levit", "finished"),
        "i": ("prune", "macs 0.5x", "levit_192, 2.00 ms, 50.0% top-1", "finished"),
        "j": ("search", "1.5 ms", f"{best}, 0.0% top-1", "finished"),
        "k": ("evaluate", "", "mine.onnx, 60.0% top-1", "finished"),
        "l": ("prune", "macs 0.5x", "levit_192, 2.00 ms in int8, 64.0% top-1 in int8", "finished"),
        "m": ("prune", "macs 0.5x", "levit_192, 2.00 ms in int8, 65.0% top-1 in fp32", "finished"),
        "n": ("prune", "macs 0.5x", "levit_192, 2.00 ms, 65.0% agreement", "finished"),
    }


def test_a_search_without_a_result_is_known_by_its_journal(made, tmp_path):
    lines = [
        {"op_code": 0, "study_name": "s"},
        {"op_code": 2, "study_id": 0, "user_attr": {"vitnas": {"budget_ms": 2.0}}},
        {"op_code": 6, "trial_id": 0, "state": 1, "values": [1]},
        {"op_code": 6, "trial_id": 1, "state": 3, "values": None},
    ]
    journal = "".join(json.dumps(line) + "\n" for line in lines) + '{"op_code": 6, "tri'
    made("s", "study.journal", journal)
    assert told(tmp_path)["s"] == ("search", "2 ms", "no result yet, 1 trial measured", "interrupted")


def test_the_journal_is_read_as_optuna_writes_it(tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    (tmp_path / "s").mkdir()
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "s" / "study.journal")))
    study = optuna.create_study(storage=storage)
    study.set_user_attr("vitnas", {"budget_ms": 2.0})
    study.optimize(lambda trial: 1.0, n_trials=2)
    assert told(tmp_path)["s"] == ("search", "2 ms", "no result yet, 2 trials measured", "interrupted")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"budget_ms": 1.5, "win'),
        ("result.json", {}),
        ("result.json", []),
        ("metrics.json", "\0"),
        ("metrics.json", TRAIN | {"epochs": None}),
        ("prune.json", {"model": 3}),
        ("state/state.json", "[]"),
        ("study.journal", "nonsense"),
        ("arch.json", "nonsense"),
        ("arch.json", {"family": 3}),
        ("arch.json", '{"a":' * 100_000),
        ("result.json", SEARCH | {"budget_ms": math.nan}),
        ("result.json", SEARCH | {"budget_ms": 10**400}),
        ("result.json", SEARCH | {"winner": WINNER | {"latency_ms": math.inf}}),
        ("result.json", SEARCH | {"winner": WINNER | {"top1": -math.inf}}),
        ("prune.json", PRUNE | {"after": {"latency_ms": math.nan}}),
        ("study.journal", '{"op_code": 2, "user_attr": ' + "[" * 100_000),
    ],
)
def test_a_damaged_folder_is_one_line(vitnas, made, tmp_path, name, content):
    made("broken", name, content)
    made("whole", "result.json", SEARCH)
    (tmp_path / "empty").mkdir()
    code, out, err = vitnas("runs", str(tmp_path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert "damaged" in next(line for line in lines if line.startswith("broken"))
    assert "finished" in next(line for line in lines if line.startswith("whole"))
    assert "no run" in next(line for line in lines if line.startswith("empty"))


def test_a_run_that_a_process_has_is_running(made, tmp_path):
    made("train", "metrics.json", TRAIN)
    made("search", "result.json", SEARCH)
    lock = made("train", ".lock", f"vitnas train (process {os.getpid()} on here) since a kill")
    scratch = made("search", "tmp/vitnas-1234-abc/candidate.onnx", "").parent
    for path, running in ((lock, "train"), (scratch, "search")):
        assert {row["state"] for row in list_runs(tmp_path)} == {"finished"}
        file = os.open(path, os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            assert {row["run"] for row in list_runs(tmp_path) if row["state"] == "running"} == {running}
        finally:
            os.close(file)
    with folder_lock(tmp_path / "train"):
        assert {row["run"] for row in list_runs(tmp_path) if row["state"] == "running"} == {"train"}


def test_a_folder_that_disappears_is_left_out(made, tmp_path, monkeypatch):
    for name in ("gone", "kept"):
        made(name, "result.json", SEARCH)

    def weight(folder: Path) -> tuple[int, float]:
        if folder.name == "gone":
            raise FileNotFoundError
        return 0, 1e18

    monkeypatch.setattr("nas.cli.run_list.weight", weight)
    assert [(row["run"], row["changed"]) for row in list_runs(tmp_path)] == [("kept", "")]


def test_names_do_not_write_on_the_terminal(vitnas, made, tmp_path):
    made("a\x1b[2J\nb", "metrics.json", TRAIN | {"model": "\ud800\x07"})
    code, out, _ = vitnas("runs", str(tmp_path))
    assert code == 0
    (line,) = (line for line in out.splitlines() if "finished" in line)
    assert line.split() == ["a\\x1b[2J\\nb", "train", "\\ud800\\x07,", "61.2%", "top-1", "finished", *line.split()[-4:]]


def test_size_and_order(made, tmp_path):
    os.utime(made("old", "result.json", SEARCH), (1, 1))
    os.utime(tmp_path / "old", (1, 1))
    made("new", "samples.jsonl", "x" * 2_000_000)
    made("new", "result.json", SEARCH)
    rows = list_runs(tmp_path)
    assert [row["run"] for row in rows] == ["new", "old"]
    assert 2_000_000 < rows[0]["bytes"] < 2_001_000


def test_json_and_no_folder(vitnas, made, tmp_path):
    made("a", "result.json", SEARCH)
    code, out, _ = vitnas("runs", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)[0].keys() == {"run", "kind", "budget", "best", "state", "bytes", "changed"}
    vitnas.refused(vitnas("runs", str(tmp_path / "nowhere")), "nowhere")


def test_neither_runs_nor_the_version_import_torch(tmp_path):
    for words in (["runs", str(tmp_path)], ["--version"], ["--help"]):
        command = [sys.executable, "-X", "importtime", "-m", "nas.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.M))
        assert "typer" in imported
        assert not imported & {"torch", "optuna", "matplotlib", "numpy", "onnxruntime"}


def test_a_run_s_name_is_never_folded(made, tmp_path, monkeypatch, capsys):
    from nas.cli import run_list
    from nas.report.tables import console_of

    console = console_of()
    console.width = 80
    monkeypatch.setattr(run_list, "console_of", lambda: console)
    name = "cpu-onnxruntime-fp32-1thread-1.5ms-flowers-seed3"
    made(name, "result.json", SEARCH)
    run_list.show_runs(list_runs(tmp_path), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == name
    assert "finished" in lines[1]
    assert max(map(len, lines)) <= 80
