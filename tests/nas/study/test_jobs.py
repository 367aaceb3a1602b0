"""Trainings that one process of a study makes for all, and who is at work."""

from __future__ import annotations

from contextlib import nullcontext

import optuna
import pytest
from optuna.samplers import RandomSampler

from nas.errors import TrainingError, UserError
from nas.study import jobs
from nas.study.jobs import (
    HELD,
    MEASURES,
    TRAINS,
    WORKER,
    Job,
    at_work,
    do,
    has_died,
    post,
    result_of,
    take,
    withdraw,
    workers,
)
from nas.study.leases import Lease, beating
from nas.study.trials import open_study

JOBS = [Job("b", {"seed": 1}), Job("a", {"seed": 0})]
WITH_PROXY = pytest.mark.parametrize("storage", ["journal", "postgres", "grpc"], indirect=True)


@pytest.fixture
def study(storage: str) -> optuna.Study:
    return open_study("s", storage, {"a": 1}, RandomSampler())


@WITH_PROXY
def test_a_job_is_done_once(study: optuna.Study, storage: str) -> None:
    other = open_study("s", storage, {"a": 1}, RandomSampler())
    assert take(study) is None
    post(study, JOBS)
    post(other, JOBS)
    first, second = take(study, ["b", "a"]), take(other)
    assert (first, second) == (JOBS[0], JOBS[1])
    assert take(study) is None
    with pytest.raises(KeyError):
        result_of(study, "b")
    do(study, JOBS[0], lambda: {"top1": 50.0})
    assert result_of(other, "b") == {"top1": 50.0}
    post(study, JOBS)
    assert take(other) is None, "it is done"


def test_a_job_whose_worker_died_or_gave_up_is_taken_by_another(study: optuna.Study, ended: int) -> None:
    post(study, JOBS[1:])
    job = take(study)
    study.set_user_attr(HELD + job.name, {**Lease.mine().to_json(), "pid": ended})
    assert take(study) == job

    def gives_up() -> None:
        raise UserError("no space left")

    with pytest.raises(UserError):
        do(study, job, gives_up)
    assert take(study) == job


def test_a_job_is_leased_while_it_is_done(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(jobs, "beating", lambda extend: calls.append(extend) or beating(extend))
    post(study, JOBS[1:])
    job = take(study)
    seen = []

    def work() -> None:
        study.set_user_attr(HELD + job.name, {**Lease.mine().to_json(), "expires": 0.0})
        seen.append(calls[0]())
        seen.append(study.user_attrs[HELD + job.name]["expires"] > 0)
        study.set_user_attr(HELD + job.name, {**Lease.mine().to_json(), "host": "another"})
        seen.append(calls[0]())

    do(study, job, work)
    assert seen == [True, True, False], "extended, but not where another has taken it"
    assert study.user_attrs[HELD + job.name] is None


def test_a_training_that_failed_is_told_once_and_may_be_tried_again(study: optuna.Study) -> None:
    def fails() -> None:
        raise TrainingError("the loss is no longer finite")

    post(study, JOBS[1:])
    do(study, take(study), fails)
    with pytest.raises(TrainingError, match="no longer finite"):
        result_of(study, "a")
    assert take(study) is None
    post(study, JOBS[1:])
    assert take(study) == JOBS[1]
    withdraw(study, "a")
    assert take(study) is None


@WITH_PROXY
def test_who_is_at_work(study: optuna.Study, ended: int) -> None:
    with at_work(study, [MEASURES]):
        assert (workers(study, MEASURES), workers(study, TRAINS)) == (1, 0)
        gone = {"does": [TRAINS], **Lease.mine().to_json(), "pid": ended}
        study.set_user_attr(f"{WORKER}1", gone)
        assert (workers(study, TRAINS), has_died(study, TRAINS), has_died(study, MEASURES)) == (0, True, False)
        with at_work(study, [TRAINS]):
            assert (workers(study, TRAINS), has_died(study, TRAINS)) == (1, False), "in the place of the dead one"
    assert workers(study, MEASURES) == 0
    study.set_user_attr(f"{WORKER}1", {**gone, "does": [MEASURES, TRAINS]})
    with at_work(study, [TRAINS]):
        assert has_died(study, MEASURES), "who trains does not end the search"
        with at_work(study, [MEASURES]):
            study.set_user_attr(f"{WORKER}2", {**gone, "does": [MEASURES]})
        assert not has_died(study, MEASURES), "the search has ended properly since"
    with at_work(study, [TRAINS]), at_work(study, [MEASURES]):
        assert {key for key in study.user_attrs if key.startswith(WORKER)} == {f"{WORKER}{n}" for n in range(3)}


def test_a_process_that_was_taken_for_dead_is_at_work_again(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = []
    monkeypatch.setattr(jobs, "beating", lambda extend: beats.append(extend) or nullcontext())
    with at_work(study, [TRAINS]):
        study.set_user_attr(f"{WORKER}0", {"does": [TRAINS], **Lease.mine().to_json(), "host": "another"})
        assert beats[0]()
        assert workers(study, TRAINS) == 2
        study.set_user_attr(f"{WORKER}1", {"does": [TRAINS], **Lease.mine().to_json(), "host": "another"})
    assert workers(study, TRAINS) == 2, "it leaves what is another's by now"


def test_a_job_whose_answer_was_lost_is_taken_again(study: optuna.Study) -> None:
    post(study, JOBS[1:])
    assert take(study) == JOBS[1]
    assert take(study) is None, "it is at work"
    jobs._taken.clear()
    assert take(study) == JOBS[1], "the first answer was lost"
