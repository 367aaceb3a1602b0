"""A worker that only trains comes before the search that measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.samplers import RandomSampler

from nas.errors import UserError
from nas.quality.plan import TrainingPlan
from nas.search import helping
from nas.search.helping import _Helper, await_search, await_work
from nas.search.request import SearchRequest
from nas.study.jobs import MEASURES, WORKER, at_work
from nas.study.leases import Lease
from nas.study.trials import open_study


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Has something happen in the first sleep; returns the time, which only sleeps pass."""

    def set_clock(happens: Callable[[], object] = lambda: None) -> list[float]:
        now = [0.0]

        def sleep(seconds: float) -> None:
            if not now[0]:
                happens()
            now[0] += seconds

        monkeypatch.setattr(helping, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
        return now

    return set_clock


def requested(tmp_path: Path) -> SearchRequest:
    storage = f"sqlite:///{tmp_path}/studies"
    return SearchRequest(2.0, study="s", storage=storage, plan=TrainingPlan("images"), only="train")


def test_the_study_and_work_are_waited_for_where_a_storage_is_shared(
    tmp_path: Path, clock: Callable[..., list[float]]
) -> None:
    request, said = requested(tmp_path), []
    clock(lambda: open_study("s", request.storage, {"a": 1}, RandomSampler()))
    await_search(request, said.append)
    study = open_study("s", request.storage, {"a": 1}, RandomSampler())
    measuring = at_work(study, [MEASURES])
    clock(measuring.__enter__)
    await_work(request, study, said.append)
    measuring.__exit__(None, None, None)
    assert said == [
        f"waiting for the search that measures, 10 minutes at most: there is no study 's' in {request.storage} yet",
        "waiting for the search that measures, 10 minutes at most: nothing waits for a training, and nobody measures "
        "yet",
    ]


def test_a_search_that_does_not_come_is_not_waited_for_any_longer(
    tmp_path: Path, clock: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helping, "LOOK_S", 100.0)
    request, now = requested(tmp_path), clock()
    with pytest.raises(UserError, match="there is no study 's' in sqlite"):
        await_search(request, lambda _: None)
    assert now == [helping.START_S]
    study = open_study("s", request.storage, {"a": 1}, RandomSampler())
    with pytest.raises(UserError, match="nothing waits for a training, and nobody measures"):
        await_work(request, study, lambda _: None)


@pytest.mark.parametrize("dies", [True, False])
def test_a_search_that_died_is_waited_for_and_one_that_ended_is_not(
    tmp_path: Path, clock: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch, ended: int, dies: bool
) -> None:
    study, said = open_study("s", tmp_path / "j", {"a": 1}, RandomSampler()), []
    step, tasks = SimpleNamespace(), SimpleNamespace(help=lambda: False)
    monkeypatch.setattr(helping, "open_tier", lambda *_: (None, []))
    monkeypatch.setattr(helping, "TrainStep", lambda *_: step)
    monkeypatch.setattr(helping, "open_tasks", lambda *_: tasks)
    monkeypatch.setattr(helping, "LEASE_S", 60.0)
    measuring = at_work(study, [MEASURES])
    measuring.__enter__()

    now = clock()

    def claimed(_: object) -> bool:
        """One training, which is far longer than what is waited, and in which the search ends."""
        if now[0]:
            return False
        now[0] = 600.0
        if dies:
            key = next(each for each in study.user_attrs if each.startswith(WORKER))
            study.set_user_attr(key, {"does": [MEASURES], **Lease.mine().to_json(), "pid": ended})
        else:
            measuring.__exit__(None, None, None)
        return True

    step.claimed = claimed
    assert _Helper(requested(tmp_path), study, None, said.append, lambda *_: None).run() == 1
    waits = ["what measures has died: waiting 1 minutes at most until it is started again"]
    assert said == [*(waits if dies else []), "the search that measures has ended: 1 training made here"]
    assert now[0] == 600.0 + (60.0 if dies else 0.0)


def test_what_only_trains_says_what_it_made_as_json_too(vitnas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helping, "await_search", lambda request, say: request)
    monkeypatch.setattr(helping, "train_measured", lambda *_, **__: 3)
    monkeypatch.setattr("nas.search.run.read_images", lambda request: None)
    words = ("--data", "images", "--study", "s", "--only", "train", "--json")
    code, out, err = vitnas("search", "--latency-budget", "2ms", *words)
    assert code == 0, err
    assert json.loads(out) == {"trainings": 3, "folder": "runs/s"}
