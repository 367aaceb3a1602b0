"""The dashboard, through its WSGI callable and as a server, on every kind of storage."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

import nas
from nas.errors import UserError
from nas.search import dashboard
from nas.search.latency import TrialLatency
from nas.study.trials import finish, open_study
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS


def make_study(storage: str) -> optuna.Study:
    study = open_study("levit", storage, {"budget_ms": 2.0}, RandomSampler())
    for quality, constraint in [(70.0, -0.25), (75.0, 0.5)]:
        trial = study.ask()
        trial.suggest_int("width", 0, 6)
        finish(study, trial, quality, 500.0, constraint, {"latency_ms": 1.5})
    study.ask()
    return study


def get(app: Any, path: str) -> tuple[str, bytes]:
    environ: dict[str, Any] = {"PATH_INFO": path, "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    answer: list[str] = []
    body = b"".join(app(environ, lambda status, headers, exc_info=None: answer.append(status)))
    return answer[0], body


EVERY_STORAGE = pytest.mark.parametrize("any_storage", ["journal", "sqlite", "postgres", "grpc"], indirect=True)


@pytest.fixture(
    params=["journal", "postgres", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sqlite", "grpc"))]
)
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "journal":
        yield str(tmp_path / "study.journal")
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/study.db"
    elif request.param == "grpc":
        with request.getfixturevalue("proxied")(tmp_path / "study.journal") as url:
            yield url
    else:
        yield request.getfixturevalue("postgres_url")


@EVERY_STORAGE
def test_lists_the_study_and_every_trials_constraint(any_storage: str) -> None:
    study = make_study(any_storage)
    app = dashboard.app(any_storage)
    status, body = get(app, "/api/studies")
    (summary,) = json.loads(body)["study_summaries"]
    assert (status[:3], summary["study_name"]) == ("200", "levit")

    status, body = get(app, f"/api/studies/{summary['study_id']}")
    detail = json.loads(body)
    assert status.startswith("200")
    assert detail["objective_names"] == ["score (prior)", "throughput, images/s"]
    fits, over, running = detail["trials"]
    assert fits["constraints"] == [-0.25]
    assert over["constraints"] == [0.5]
    assert running["constraints"] == []
    assert fits["values"] == [70.0, 500.0]
    assert [running["state"], over["state"]] == ["Running", "Complete"]
    assert {"key": "latency_ms", "value": "1.5"} in fits["user_attrs"]

    assert get(app, "/dashboard")[0].startswith("200")
    assert get(app, "/api/studies/99")[0].startswith("404")
    # Neither the stored trials nor another reader's see the list.
    assert [t.constraints for t in study.trials[:2]] == [{"latency": -0.25}, {"latency": 0.5}]


@EVERY_STORAGE
def test_other_views_work_on_the_wrapped_storage(any_storage: str) -> None:
    make_study(any_storage)
    app = dashboard.app(any_storage)
    study_id = json.loads(get(app, "/api/studies")[1])["study_summaries"][0]["study_id"]
    for path in [
        "/api/meta",
        f"/api/studies/{study_id}/param_importances",
        f"/csv/{study_id}",
    ]:
        status, body = get(app, path)
        assert status.startswith("200"), (path, status, body[:300])


def test_journal_of_a_live_search_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = make_study(str(path))
    half = b'{"op_code":4,"worker_id":"a writer in the midd'
    with path.open("ab") as file:
        file.write(half)
    before = path.read_bytes()
    app = dashboard.app(path)
    assert b"levit" in get(app, "/api/studies")[1]
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} <= {"study.journal", "study.journal.guard"}
    study.tell(study.ask(), state=TrialState.FAIL)
    assert len(open_study("levit", path, {"budget_ms": 2.0}, RandomSampler()).trials) == 4


@pytest.mark.parametrize("storage", ["none.journal", "sqlite:///{}/none.db", "postgresql://u:pw@127.0.0.1:9/d"])
def test_missing_storage_is_one_line_and_nothing_is_made(tmp_path: Path, storage: str) -> None:
    storage = storage.format(tmp_path) if "://" in storage else str(tmp_path / storage)
    with pytest.raises(UserError) as error:
        dashboard.serve(storage)
    assert "\n" not in str(error.value)
    assert "pw@" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_database_without_studies(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(UserError, match=r"empty.db holds no study$"):
        dashboard.serve(f"sqlite:///{tmp_path}/empty.db")
    assert (tmp_path / "empty.db").read_bytes() == b""


@pytest.mark.parametrize("port", [-1, 70_000])
def test_ports_that_do_not_exist(tmp_path: Path, port: int) -> None:
    make_study(str(tmp_path / "j"))
    with pytest.raises(UserError, match=f"--port is {port}: give 1 to 65535"):
        dashboard.serve(tmp_path / "j", port=port)


def test_port_in_use(tmp_path: Path) -> None:
    make_study(str(tmp_path / "j"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use"):
            dashboard.serve(tmp_path / "j", port=port)


def test_serves_the_printed_address_until_interrupted(tmp_path: Path) -> None:
    make_study(str(tmp_path / "j"))
    code = f"from nas.search.dashboard import serve; serve({str(tmp_path / 'j')!r}, port=0)"
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(nas.__file__).parents[1])},
    )
    try:
        line = server.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/dashboard", line)[0]
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGINT)
        assert server.communicate(timeout=60) == ("", "")
        assert server.returncode == 0
    finally:
        server.kill()


def searched(storage: str, resolution: int | None = 64) -> tuple[optuna.Study, list[Any]]:
    """A study as a trained search leaves it: a network within the budget, a published one, one too slow to be trained,
    a failed one."""
    from nas.study.trials import fail
    from search_spaces import get_arch
    from search_spaces.space import random_params

    meta = {"budget_ms": 1.5, "quality": "train", "resolution": resolution}
    study = open_study("mine", storage, meta, RandomSampler(seed=0))
    archs = [FAMILIES["shvit"].space.decode(random_params(np.random.default_rng(0)), 5, resolution)]
    archs += [get_arch("shvit_s1"), get_arch("levit_128s")]
    for arch, name, latency, rungs in zip(
        archs, ("", "shvit_s1", "levit_128s"), (1.23456, 1.4, 2.25), ({"1": 40.0}, {"1": 50.0}, {}), strict=True
    ):
        trial = study.ask()
        for parameter in PARAMETERS:
            trial.suggest_int(parameter, 0, LEVELS - 1)
        detail = {"quality_estimate": 55.0, "quality_ci": [45.0, 65.0], "quality_how": "trained 1 of 9 epochs"}
        detail |= {"latency_ci_low_ms": latency - 0.03, "latency_ci_high_ms": latency + 0.03}
        attrs = {"family": arch.family, "latency_ms": latency, "budget_ms": 1.5, "resolution": arch.resolution}
        attrs |= {"arch": arch.model_dump(mode="json"), "detail": detail | {"training": {"rungs": rungs}}}
        attrs |= {"feasible": int(latency < 1.5)} | ({"name": name} if name else {})
        finish(study, trial, 50.0 + 10 * latency, 500.0, latency / 1.5 - 1, attrs)
    fail(study, study.ask(), "no answer in 60 s")
    return study, archs


def detail_of(app: Any) -> dict[str, Any]:
    study_id = json.loads(get(app, "/api/studies")[1])["study_summaries"][0]["study_id"]
    status, body = get(app, f"/api/studies/{study_id}")
    assert status.startswith("200"), body
    return json.loads(body)


def test_what_was_measured_briefly_is_told_without_an_interval() -> None:
    latency = TrialLatency.read({"latency_ms": 4.0, "rounds": 3})
    assert dashboard.latency_words(latency, 1.5) == "Latency 4.000 ms (measured briefly), budget 1.5 ms: over."


def test_a_note_tells_a_trial_by_its_values(any_storage: str) -> None:
    study, archs = searched(any_storage)
    detail = detail_of(dashboard.app(any_storage))
    assert detail["objective_names"] == ["score (train)", "throughput, images/s"]
    ours, published, slow, broken = detail["trials"]
    assert {"key": "latency_ms", "value": "1.235"} in ours["user_attrs"]
    note = ours["note"]["body"]
    assert "Latency 1.235 ms (95%: 1.205 to 1.265), budget 1.5 ms: fits." in note
    assert "Score 62.3; its estimate of top-1 (trained 1 of 9 epochs) is 55.0% (95%: 45.0 to 65.0)." in note
    params, options = study.trials[0].params, FAMILIES["shvit"].space.options
    for name in ("depth_s1", "width_s2", "qk"):
        if name in options:
            assert f"| {name} | {options[name][params[name] * len(options[name]) // LEVELS]} |" in note
    assert "| resolution | 64 |" in note
    assert "| stage | embed dim | depth |" in note
    assert json.loads(note.partition("```json")[2].removesuffix("```")) == archs[0].model_dump(mode="json")
    assert max(map(len, note.splitlines())) <= 110, "no page is wider than the screen"
    assert "**shvit_s1** (shvit), 224 px" in published["note"]["body"]
    assert "Not trained" in slow["note"]["body"]
    assert broken["note"]["body"] == "no answer in 60 s"
    assert "| 1 | shvit_s1 | shvit | 1.400 | 64.0 |" in detail["note"]["body"]


def test_what_was_not_trained_has_no_value(any_storage: str) -> None:
    study, _ = searched(any_storage)
    app = dashboard.app(any_storage)
    detail = detail_of(app)
    slow = detail["trials"][2]
    assert slow["state"] == "Pruned"
    assert "values" not in slow
    assert detail["trials"][0]["values"] == [62.346, 500.0]
    status, body = get(app, f"/api/studies/{slow['study_id']}/param_importances")
    assert status.startswith("200"), body
    assert len(json.loads(body)["param_importances"]) == 2
    assert [t.state for t in study.trials[:3]] == [TrialState.COMPLETE] * 3, "nothing of it is written"
    plots = {plot["id"]: json.loads(plot["graph_object"]) for plot in detail["plotly_graph_objects"]}
    (apart,) = [trace for trace in plots["vitnas-front"]["data"] if trace.get("yaxis") == "y2"]
    assert apart["x"] == [2.25]
    assert all(2.25 not in t["x"] for t in plots["vitnas-front"]["data"] if "marker" in t and t is not apart)


def test_latencies_are_plotted_with_the_budget(any_storage: str) -> None:
    searched(any_storage)
    plots = {
        plot["id"]: json.loads(plot["graph_object"])
        for plot in detail_of(dashboard.app(any_storage))["plotly_graph_objects"]
    }
    dots = [trace for trace in plots["vitnas-latency"]["data"] if trace["mode"] == "markers"]
    assert sorted(value for trace in dots for value in trace["y"]) == [1.23456, 1.4, 2.25]
    (budget,) = [trace for trace in plots["vitnas-latency"]["data"] if trace["name"] == "budget"]
    assert budget["y"] == [1.5, 1.5]
    (front,) = [trace for trace in plots["vitnas-front"]["data"] if trace["name"] == "front"]
    assert front["x"] == [1.23456, 1.4, 1.5]


def test_what_an_older_study_holds_is_shown_within_0_and_100(tmp_path: Path) -> None:
    study = open_study("old", tmp_path / "j", {"budget_ms": 2.0}, RandomSampler())
    detail = {"quality_estimate": 210.0, "quality_ci": [-60.0, 240.0], "quality_how": "predicted"}
    for score in (199.0, -60.0):
        attrs = {"family": "shvit", "latency_ms": 1.5, "feasible": 1, "detail": detail}
        finish(study, study.ask(), score, 500.0, -0.25, attrs)
    assert dashboard.score_words(study.trials[0]) == (
        "Score 100.0; its estimate of top-1 (predicted) is 100.0% (95%: 0.0 to 100.0)."
    )
    found = detail_of(dashboard.app(tmp_path / "j"))
    assert [trial["values"] for trial in found["trials"]] == [[100.0, 500.0], [0.0, 500.0]]
    plots = {plot["id"]: json.loads(plot["graph_object"]) for plot in found["plotly_graph_objects"]}
    heights = [trace["y"] for trace in plots["vitnas-front"]["data"]]
    assert heights == [[100.0, 0.0], [0.0, 100.0], [100.0, 100.0]], "dots, budget, front"


def test_a_note_somebody_wrote_is_kept(tmp_path: Path) -> None:
    from optuna_dashboard import save_note

    path = tmp_path / "study.journal"
    study, _ = searched(str(path))
    save_note(study, "mine")
    before = path.read_bytes()
    detail = detail_of(dashboard.app(path))
    assert detail["note"]["body"] == "mine"
    assert "Latency" in detail["trials"][0]["note"]["body"]
    assert path.read_bytes() == before


def test_a_network_of_another_version_is_told(tmp_path: Path) -> None:
    study, _ = searched(str(tmp_path / "j"))
    trial = study.trials[0]
    stranger = trial.user_attrs | {"arch": {"family": "shvit", "shape": "unknown"}}
    trial.user_attrs = stranger
    assert "another version of vitnas" in dashboard.note(trial, dashboard.Searched(1.5))


def test_a_training_is_no_search(vitnas, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    vitnas.refused(vitnas("dashboard", str(tmp_path)), "is a training, not a search: `vitnas show ")
