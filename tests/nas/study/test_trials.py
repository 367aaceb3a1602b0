"""Studies on a journal file and on a real PostgreSQL, with processes that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from forked import Forked
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

import nas
from nas.errors import UserError
from nas.identity import IMAGES
from nas.measure.runtime import Settings
from nas.search import trial as search_trial
from nas.search.log import SearchLog
from nas.study import leases
from nas.study import trials as layer
from nas.study.storage import open_storage
from nas.study.trials import (
    DEATHS,
    MEASURED,
    Proposal,
    alone_in,
    claim,
    due,
    enqueue,
    fail,
    finish,
    hand_over,
    heartbeat,
    in_training,
    open_study,
    remaining,
    sweep,
    waiting_for_training,
)
from nas.study.trials import ask as next_trial
from nas.version import version

META = {"budget_ms": 2.0, "runtime": "onnxruntime", "hardware": {"cpu": "Zen 3", "threads": 1}}
CHOICES = {"width": range(7), "depth": range(7)}
WITH_PROXY = pytest.mark.parametrize("storage", ["journal", "postgres", "grpc"], indirect=True)

PROLOGUE = f"""
import os, sys, time
from optuna.samplers import RandomSampler
from pathlib import Path
from nas.study.trials import AllBegun, claim, due, enqueue, finish, heartbeat, open_study, remaining, sweep
from nas.study.trials import ask as next_trial
storage = sys.argv[1]
META, CHOICES = {META!r}, {CHOICES!r}
def start():
    return open_study("s", storage, META, RandomSampler())
def ask(study, total=None):
    trial = next_trial(study, total=total)
    for name, permitted in CHOICES.items():
        trial.suggest_int(name, permitted[0], permitted[-1])
    return trial
def wait_for_all(n, what="go"):
    folder = Path(sys.argv[2], what)
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < n:
        time.sleep(0.01)
"""


def start(storage: str | Path, **changes: Any) -> optuna.Study:
    return open_study("s", storage, {**META, **changes}, RandomSampler())


def ask(study: optuna.Study, leased: bool = True) -> optuna.Trial:
    trial = next_trial(study) if leased else study.ask()
    for name, permitted in CHOICES.items():
        trial.suggest_int(name, permitted[0], permitted[-1])
    return trial


def test_a_study_of_an_older_vitnas_is_called_so(tmp_path: Path) -> None:
    start(tmp_path / "study.journal", **{IMAGES: "0123456789abcdef"})
    with pytest.raises(UserError, match="begun by an older vitnas; use --study"):
        start(tmp_path / "study.journal", **{IMAGES: "2:0123456789abcdef"})


def process(body: str, *args: object) -> subprocess.Popen[str]:
    """One that is listened to while it runs."""
    return subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + body, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(nas.__file__).parents[1])},
    )


def outputs(count: int, body: str, *args: object) -> list[list[str]]:
    """What as many processes print."""
    processes = [Forked(PROLOGUE + body, *map(str, args)) for _ in range(count)]
    results = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), results
    return [out.split() for out, _ in results]


def barrier(tmp_path: Path) -> Path:
    folder = tmp_path / f"barrier-{time.time_ns()}"
    folder.mkdir()
    return folder


def put_lease(study: optuna.Study, trial: optuna.Trial, **changes: Any) -> None:
    trial.set_user_attr("lease", {**trial.user_attrs["lease"], **changes})


def dead_pid() -> int:
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------- opening


@WITH_PROXY
def test_created_study_is_loaded_again(storage: str) -> None:
    study = start(storage)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert study.metric_names == ["quality", "throughput"]
    trial = ask(study)
    finish(study, trial, 70.0, 500.0, -0.1, {})
    again = start(storage)
    assert again.user_attrs == {"vitnas": META}
    assert again.trials == study.trials
    assert len(again.trials) == 1


def test_what_is_enqueued_where_none_waits_is_asked_next(tmp_path: Path) -> None:
    study, called, prepared = start(tmp_path / "study.journal"), [], []

    def enqueue_one() -> None:
        called.append(1)
        study.enqueue_trial({}, {"given": len(called)})

    def prepare() -> None:
        prepared.append(len(called))
        alone_in(start(tmp_path / "study.journal"), lambda: None)  # others may decide

    assert next_trial(study, enqueue_one, prepare).user_attrs["given"] == 1
    study.enqueue_trial({}, {"given": "before"})
    assert next_trial(study, enqueue_one, prepare).user_attrs["given"] == "before"
    assert (len(called), prepared) == (1, [0])
    with pytest.raises(LookupError):
        next_trial(study, lambda: {}["nothing"])
    assert len(study.trials) == 2


def test_what_is_proposed_begins_with_its_parameters_and_its_lease(storage: str) -> None:
    study = start(storage)
    trial = next_trial(study, lambda: Proposal({"width": 3, "depth": 4}, CHOICES, {"name": "levit_128s"}))
    (begun,) = start(storage).trials
    assert begun.state == TrialState.RUNNING
    assert begun.params == {"width": 3, "depth": 4}
    assert begun.user_attrs.keys() == {"name", "lease"}
    assert (trial.suggest_int("width", 0, 6), trial.suggest_int("depth", 0, 6)) == (3, 4)
    assert sweep(study) == []
    put_lease(study, trial, pid=dead_pid())
    assert sweep(study) == [0]
    again = ask(study)
    assert again.params == begun.params
    assert again.user_attrs["name"] == "levit_128s"


def test_only_the_creator_keeps_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_draw(path: Path) -> dict[str, int]:
        return ask(open_study("s", path, META, RandomSampler(seed=3))).params

    monkeypatch.setitem(CHOICES, "fine", range(10**9))
    created = [first_draw(tmp_path / name) for name in ("a", "b")]
    assert created[0] == created[1]
    assert first_draw(tmp_path / "a") != created[0]


def test_study_that_disagrees_is_refused_with_every_difference(storage: str) -> None:
    start(storage)
    with pytest.raises(UserError) as error:
        start(storage, budget_ms=3.0)
    assert one_line(error) == ("this study has budget_ms 2.0, this command says 3.0; use --study for a new one")
    with pytest.raises(UserError) as error:
        start(storage, hardware={"cpu": "Zen 4", "cores": 2}, tier="prior")
    for part in ("hardware.cpu Zen 3, this command says Zen 4", "hardware.threads 1, ", "unset"):
        assert part in one_line(error)
    assert "hardware.cores unset, this command says 2" in one_line(error)
    assert "tier unset, this command says prior" in one_line(error)
    assert "budget_ms" not in one_line(error)
    assert "runtime" not in one_line(error)
    start(storage)


def test_study_of_another_tier_is_refused_in_words(tmp_path: Path) -> None:
    """Not with everything that only one of the two tiers depends on."""
    start(tmp_path / "j", quality="prior")
    with pytest.raises(UserError) as error:
        start(tmp_path / "j", quality="race", training={"epochs": 1}, parent=None)
    begun, now = "--quality prior without --data", "--quality race and --data"
    assert one_line(error) == f"this study was begun with {begun}, this command says {now}; use --study for a new one"


def test_tuples_and_lists_are_the_same_to_a_resumed_study(tmp_path: Path) -> None:
    start(tmp_path / "j", families=("levit", "shvit"))
    start(tmp_path / "j", families=["levit", "shvit"])


def test_foreign_study_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    foreign = optuna.create_study(study_name="s", storage=open_storage(path))
    foreign.tell(foreign.ask(), 1.0)
    with pytest.raises(UserError, match="not made by vitnas"):
        start(path)
    assert "vitnas" not in optuna.load_study(study_name="s", storage=foreign._storage).user_attrs


def test_processes_create_and_enqueue_at_the_same_moment(storage: str, tmp_path: Path) -> None:
    body = """
wait_for_all(3)
study = start()
print(study._study_id)
wait_for_all(3, "created")
for n in range(10):
    print(enqueue(study, {"width": n % 7, "depth": n // 7}, {}, CHOICES))
"""
    folder = barrier(tmp_path)
    results = outputs(3, body, storage, folder)
    assert len({ids for ids, *_ in results}) == 1
    assert sum(out.count("True") for out in results) == 10
    study = start(storage)
    assert optuna.get_all_study_names(study._storage) == ["s"]
    assert study.user_attrs == {"vitnas": META}
    enqueued = [t.system_attrs["fixed_params"] for t in study.trials]
    assert len({tuple(params.items()) for params in enqueued}) == len(enqueued) == 10


# ------------------------------------------------------------------------- running a trial


def test_killed_worker_is_swept_and_its_parameters_run_again(storage: str, tmp_path: Path) -> None:
    study = start(storage)
    finish(study, ask(study), 70.0, 500.0, -0.1, {})
    body = """
study = start()
trial = ask(study)
trial.set_constraint("latency", 5.0)
print(trial.number, flush=True)
time.sleep(60)
"""
    killed = process(body, storage)
    number = int(killed.stdout.readline())
    assert sweep(study) == []  # it is alive
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # a zombie still, as under an init that reaps nothing
    assert sweep(study) == [number]
    assert sweep(study) == []
    killed.communicate()

    dead = study.trials[number]
    assert dead.state == TrialState.FAIL
    assert dead.user_attrs["error"] == "worker died"
    retry = ask(study)
    assert retry.params == dead.params
    assert retry.user_attrs["retry_of"] == number
    assert finish(study, retry, 71.0, 400.0, -0.2, {})
    assert study.trials[retry.number].constraints == {"latency": -0.2}
    assert {t.number for t in study.best_trials} == {0, retry.number}
    assert not [t for t in study.trials if not t.state.is_finished()]


def test_retry_whose_worker_dies_too_is_not_run_a_third_time(storage: str) -> None:
    study = start(storage)
    assert enqueue(study, {"width": 1, "depth": 2}, {"published": "levit_128s"}, CHOICES)
    first = ask(study)
    put_lease(study, first, pid=dead_pid())
    assert sweep(study) == [first.number]
    second = ask(study)
    assert second.params == {"width": 1, "depth": 2}
    assert second.user_attrs["published"] == "levit_128s"
    put_lease(study, second, pid=dead_pid())
    assert sweep(study) == [second.number]
    assert len(study.trials) == 2
    assert sweep(study) == []


def test_who_counts_as_dead(tmp_path: Path) -> None:
    study = start(tmp_path / "j")
    alive = ask(study)
    put_lease(study, alive, expires=0)
    reused_pid = ask(study)
    put_lease(study, reused_pid, started=reused_pid.user_attrs["lease"]["started"] - 100)
    elsewhere = ask(study)
    put_lease(study, elsewhere, host="elsewhere", pid=dead_pid())
    expired = ask(study)
    put_lease(study, expired, host="elsewhere", pid=os.getpid(), expires=time.time() - leases.CLOCKS_S - 1)
    unleased = ask(study, leased=False)
    assert sweep(study) == [reused_pid.number, expired.number, unleased.number]
    states = {t.number: t.state for t in study.trials}
    assert states[alive.number] == states[elsewhere.number] == TrialState.RUNNING


def test_another_machine_s_worker_lives_while_its_lease_changes_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, now = start(tmp_path / "j"), [0.0]
    monkeypatch.setattr(leases, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))
    beating, silent = ask(study), ask(study)
    for trial, clock in ((beating, -600), (silent, 600)):
        put_lease(study, trial, host=f"elsewhere {clock}", expires=time.time() + clock)
    for beat in range(1, 4):
        assert sweep(study) == []
        now[0] += 0.4 * leases.LEASE_S
        put_lease(study, beating, expires=time.time() - 600 + beat)
    assert sweep(study) == [silent.number]
    now[0] += 0.9 * leases.LEASE_S
    assert sweep(study) == []


def test_a_lease_of_an_older_vitnas_is_read(tmp_path: Path) -> None:
    study = start(tmp_path / "j")
    trial = ask(study)
    known = {name: trial.user_attrs["lease"][name] for name in ("host", "pid", "started", "expires")}
    trial.set_user_attr("lease", known | {"host": "elsewhere"})
    assert sweep(study) == []
    trial.set_user_attr("lease", known | {"pid": dead_pid()})
    assert sweep(study) == [0]
    start(tmp_path / "j")


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_worker_of_another_version_is_refused_while_others_work(tmp_path: Path, host: str) -> None:
    study = start(tmp_path / "j")
    trial = ask(study)
    there = {"host": "elsewhere", "pid": dead_pid()} if host == "elsewhere" else {}
    put_lease(study, trial, version="0.0.9 (code 12345678)", **there)
    with pytest.raises(
        UserError, match=r"^vitnas 0\.0\.9 \(code 12345678\) works at .* \(code [0-9a-f]{8}\): "
    ) as refused:
        start(tmp_path / "j")
    assert version() in str(refused.value)
    put_lease(study, trial, expires=0, pid=dead_pid())
    start(tmp_path / "j")


def test_a_lease_that_was_given_up_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "BEAT_S", 0.001)
    study = start(tmp_path / "j")
    handed_over, taken = ask(study), ask(study)
    for trial, held in ((handed_over, None), (taken, taken.user_attrs["lease"] | {"pid": dead_pid()})):
        trial.set_user_attr("lease", held)
        with heartbeat(trial):
            deadline = time.monotonic() + 60
            while any(thread.name == "heartbeat" for thread in threading.enumerate()):
                assert time.monotonic() < deadline
        assert study.trials[trial.number].user_attrs["lease"] == held


def test_trial_without_parameters_yet_is_failed_and_neither_retried_nor_counted(tmp_path: Path) -> None:
    study = start(tmp_path / "j")
    study.ask()
    assert sweep(study) == [0]
    assert len(study.trials) == 1
    assert remaining(study, 1) == 1


def test_a_trial_that_was_given_something_else_than_parameters_runs_again(tmp_path: Path) -> None:
    study = start(tmp_path / "study.journal")
    study.enqueue_trial({}, {"given": "this"})
    assert fail(study, next_trial(study), "interrupted", retry=True)
    again = next_trial(study)
    assert (again.user_attrs["given"], again.user_attrs["retry_of"]) == ("this", 0)


@WITH_PROXY
def test_lease_is_extended_whatever_the_worker_does(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "BEAT_S", 0.01)
    study = start(storage)
    trial, other = ask(study), start(storage)

    def leased() -> float:
        return other.trials[trial.number].user_attrs["lease"]["expires"]

    with heartbeat(trial):
        for _ in range(2):
            before, deadline = leased(), time.monotonic() + 60
            while leased() == before:
                assert time.monotonic() < deadline
        assert finish(study, trial, 70.0, 500.0, -0.1, {})
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_trial_is_leased_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a trial does reports anything, as when images are decoded or judged."""
    monkeypatch.setattr(layer, "BEAT_S", 0.01)
    beats, study = threading.Semaphore(0), start(tmp_path / "j")

    def measure_and_tell(*_: Any) -> bool:
        return all(beats.acquire(timeout=60) for _ in range(3))

    extend = layer.lease
    monkeypatch.setattr(layer, "lease", lambda trial: (extend(trial), beats.release()))
    monkeypatch.setattr(search_trial, "suggest", lambda *_: None)
    runner, run = (
        search_trial.TrialRunner(SimpleNamespace(settings=Settings(), trials=1), study, None),
        SearchLog("now"),
    )
    monkeypatch.setattr(runner, "_measure_and_tell", measure_and_tell)
    runner.trial(run)
    assert not run.notes


def test_last_worker_waits_for_other_machines_until_they_show_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "LOOK_S", 0.0)
    study, said = start(tmp_path / "j"), []
    trials = [ask(study), ask(study)]
    for trial in trials:
        put_lease(study, trial, host="elsewhere")

    def one_lives_and_one_ends(line: str) -> None:
        said.append(line)
        put_lease(study, trials[0], expires=time.time() + 99)
        finish(study, trials[1], 70.0, 500.0, -0.1, {})

    assert due(study, 2, one_lives_and_one_ends) == 0
    assert len(said) == 1
    assert "trial 0, 1" in said[0]
    assert due(study, 3, said.append) == 1, "there is something to do"
    assert due(study, 2, said.append, lambda: True) == 0, "time is up"
    assert len(said) == 1
    assert due(study, 2, lambda line: put_lease(study, trials[0], expires=0)) == 1
    assert ask(study).params == trials[0].params
    assert study.trials[0].user_attrs["error"] == "worker died"


def test_worker_sweeps_after_its_closing_run(
    tmp_path: Path, vitnas: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = start(tmp_path / "j")

    def finish_run(*_: Any) -> SimpleNamespace:
        put_lease(study, ask(study), pid=dead_pid())
        return SimpleNamespace(exit_code=1, failures=(), interrupted=False)

    monkeypatch.setattr("nas.search.run.run_trials", lambda *_: (study, SearchLog("now")))
    monkeypatch.setattr("nas.search.run.finish_run", finish_run)
    monkeypatch.setattr("nas.cli.display.show_result", lambda *_, **__: None)
    assert vitnas("search", "--latency-budget", "2ms", "--out", str(tmp_path))[0] == 1
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_sweepers_at_the_same_moment_enqueue_once(storage: str, tmp_path: Path) -> None:
    study = start(storage)
    pid = dead_pid()
    for _ in range(12):
        put_lease(study, ask(study), pid=pid)
    body = """
study = start()
wait_for_all(3)
print(*sweep(study))
"""
    folder = barrier(tmp_path)
    results = outputs(3, body, storage, folder)
    assert sorted(int(n) for out in results for n in out) == list(range(12))
    assert [t.user_attrs.get("retry_of") for t in study.trials] == [None] * 12 + [*range(12)]


def test_sweeper_killed_before_it_enqueues_loses_nothing(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = start(storage)
    trial = ask(study)
    put_lease(study, trial, pid=dead_pid())
    with monkeypatch.context() as patch:

        def killed(*args: object) -> None:
            raise SystemExit

        patch.setattr(study, "enqueue_trial", killed)
        with pytest.raises(SystemExit):
            sweep(study)
    assert study.trials[0].state == TrialState.FAIL
    assert len(study.trials) == 1
    assert sweep(study) == []
    assert sweep(study) == []
    assert [t.user_attrs.get("retry_of") for t in study.trials] == [None, 0]


@WITH_PROXY
def test_result_of_a_swept_trial_is_dropped(storage: str) -> None:
    study = start(storage)
    trial = ask(study)
    put_lease(study, trial, pid=dead_pid())
    assert sweep(start(storage)) == [trial.number]
    assert finish(study, trial, 70.0, 500.0, -0.1, {"latency_ms": 1.8}) is False
    assert fail(study, trial, "late") is False
    dead = study.trials[trial.number]
    assert dead.state == TrialState.FAIL
    assert dead.user_attrs["error"] == "worker died"
    assert ask(study).params == trial.params


# ------------------------------------------------------------------------ trained elsewhere


def measured(study: optuna.Study) -> optuna.Trial:
    trial = ask(study)
    trial.set_user_attr(MEASURED, {"latency_ms": 1.5})
    return trial


def test_a_trial_that_is_handed_over_is_claimed_once_and_told_by_who_claims_it(storage: str, tmp_path: Path) -> None:
    study = start(storage)
    assert claim(study) is None
    ask(study)  # not measured yet
    trials = [measured(study) for _ in range(4)]
    assert claim(study) is None, "its own worker goes on with each"
    for trial in trials:
        hand_over(trial)
    assert sweep(study) == []
    assert [t.number for t in waiting_for_training(study)] == [1, 2, 3, 4]
    assert remaining(study, 6) == 1
    assert due(study, 6, lambda line: None) == 5, "one to start, four to train"
    body = """
study = start()
wait_for_all(3)
trial = claim(study)
print(trial.number, trial.user_attrs["measured"]["latency_ms"], *map(trial.params.get, CHOICES))
finish(study, trial, 70.0, 500.0, -0.1, {})
"""
    told = outputs(3, body, storage, barrier(tmp_path))
    expected = {(str(t.number), "1.5", *(str(t.params[name]) for name in CHOICES)) for t in trials[:3]}
    assert {tuple(out) for out in told} == expected, "the oldest, each once, with its parameters"
    assert [t.state.name for t in study.trials] == ["RUNNING", *3 * ["COMPLETE"], "RUNNING"]
    assert [t.number for t in in_training(study)] == [4]


def test_the_sampler_proposes_nothing_for_a_claimed_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = start(tmp_path / "j")
    hand_over(measured(study))
    monkeypatch.setattr(study.sampler, "before_trial", lambda *_: pytest.fail("asked"))
    assert claim(study).number == 0


@WITH_PROXY
def test_a_training_whose_worker_dies_waits_again_and_keeps_what_was_measured(storage: str) -> None:
    study = start(storage)
    hand_over(measured(study))
    for death in range(1, DEATHS + 1):
        trial = claim(study)
        assert (trial.number, trial.user_attrs[MEASURED]) == (0, {"latency_ms": 1.5})
        put_lease(study, trial, pid=dead_pid())
        assert sweep(study) == ([0] if death == DEATHS else [])
    assert claim(study) is None
    assert len(study.trials) == 1
    assert study.trials[0].user_attrs["error"] == "3 workers died while they trained it"


def test_who_measured_and_died_in_its_own_training_is_followed_by_another(storage: str) -> None:
    study = start(storage)
    put_lease(study, measured(study), pid=dead_pid())
    assert sweep(study) == []
    trial = claim(study)
    assert finish(study, trial, 70.0, 500.0, -0.1, {})
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]


def test_a_trained_trial_that_failed_is_measured_again_where_it_is_retried(tmp_path: Path) -> None:
    study = start(tmp_path / "j")
    assert fail(study, measured(study), "interrupted", retry=True)
    assert MEASURED not in ask(study).user_attrs


def test_finish_sets_one_constraint_and_the_attributes(storage: str) -> None:
    study = start(storage)
    attrs = {"latency_ms": 1.8, "feasible": 1, "family": "levit", "arch": {"stages": [1, 2]}}
    assert finish(study, ask(study), 70.0, 500.0, -0.1, attrs)
    assert finish(study, ask(study), 75.0, 300.0, 0.5, attrs)
    fits, over = study.trials
    assert fits.state == over.state == TrialState.COMPLETE
    assert fits.values == [70.0, 500.0]
    assert fits.constraints == {"latency": -0.1}
    assert over.constraints == {"latency": 0.5}
    assert {k: v for k, v in fits.user_attrs.items() if k != "lease"} == attrs
    assert study.best_trials == [fits]


def test_further_limits_are_constraints_too(storage: str) -> None:
    study = start(storage)
    assert finish(study, ask(study), 70.0, 500.0, -0.1, {}, {"memory": 0.2})
    assert study.trials[0].constraints == {"latency": -0.1, "memory": 0.2}
    assert study.best_trials == []


def test_failed_trial_says_why_and_an_interrupted_one_runs_again(storage: str) -> None:
    study = start(storage)
    broken = ask(study)
    assert fail(study, broken, "export: unsupported operator")
    assert study.trials[0].user_attrs["error"] == "export: unsupported operator"
    assert len(study.trials) == 1
    interrupted = ask(study)
    assert fail(study, interrupted, "interrupted", retry=True)
    again = ask(study)
    assert again.params == interrupted.params
    assert again.number == 2
    assert fail(study, again, "interrupted", retry=True)
    assert ask(study).params == interrupted.params


def test_remaining_counts_finished_and_running(tmp_path: Path) -> None:
    study = start(tmp_path / "j")
    assert remaining(study, 4) == 4
    enqueue(study, {"width": 0, "depth": 0}, {}, CHOICES)
    assert remaining(study, 4) == 4
    finish(study, ask(study), 70.0, 500.0, -0.1, {})
    fail(study, ask(study), "broken")
    ask(study)
    assert remaining(study, 4) == 1
    interrupted = ask(study)
    assert remaining(study, 4) == 0
    fail(study, interrupted, "interrupted", retry=True)
    assert remaining(study, 4) == 1
    ask(study)
    assert remaining(study, 4) == 0
    ask(study)
    assert remaining(study, 4) == 0


@WITH_PROXY
def test_two_workers_share_a_total(storage: str, tmp_path: Path) -> None:
    body = """
study = start()
wait_for_all(2)
while remaining(study, 12):
    sweep(study)
    time.sleep(0.01)
    try:
        trial = ask(study, 12)
    except AllBegun:
        continue
    assert finish(study, trial, 70.0 + trial.number, 500.0, -0.1, {"pid": os.getpid()})
"""
    folder = barrier(tmp_path)
    outputs(2, body, storage, folder)
    trials = start(storage).trials
    assert len(trials) == 12
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert len({t.user_attrs["pid"] for t in trials}) == 2


def test_enqueue_checks_names_and_values(storage: str) -> None:
    study = start(storage)
    for params, expected in [
        ({"width": 7, "depth": 0}, "width = 7"),
        ({"width": -1, "depth": 0}, "width = -1"),
        ({"width": 1.5, "depth": 0}, "width = 1.5"),
        ({"width": 1}, "depth"),
        ({"width": 1, "depth": 0, "heads": 1}, "heads"),
    ]:
        with pytest.raises(ValueError, match=expected):
            enqueue(study, params, {}, CHOICES)
    assert study.trials == []
    assert enqueue(study, {"width": 6, "depth": 0}, {"published": "levit_128s"}, CHOICES)
    assert not enqueue(study, {"width": 6, "depth": 0}, {}, CHOICES)
    trial = ask(study)
    assert trial.params == {"width": 6, "depth": 0}
    assert trial.user_attrs["published"] == "levit_128s"
    assert not enqueue(study, {"width": 6, "depth": 0}, {}, CHOICES)
    finish(study, trial, 70.0, 500.0, -0.1, {})
    assert not enqueue(start(storage), {"width": 6, "depth": 0}, {}, CHOICES)
    sampled = ask(study)
    assert not enqueue(study, sampled.params, {}, CHOICES)
