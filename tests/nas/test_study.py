"""The study layer on a journal file and on a real PostgreSQL, with processes that are killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

import nas
from nas import study as layer
from nas.errors import UserError
from nas.study import enqueue, fail, finish, finished, lease, mask_url, open_study, remaining, sweep

META = {"budget_ms": 2.0, "runtime": "onnxruntime", "hardware": {"cpu": "Zen 3", "threads": 1}}
CHOICES = {"width": range(7), "depth": range(7)}

PROLOGUE = f"""
import os, sys, time
from optuna.samplers import RandomSampler
from pathlib import Path
from nas.study import enqueue, fail, finish, finished, lease, open_study, remaining, sweep
storage = sys.argv[1]
META, CHOICES = {META!r}, {CHOICES!r}
def start():
    return open_study("s", storage, META, RandomSampler())
def ask(study, seconds=60):
    trial = study.ask()
    lease(trial, seconds)
    for name, permitted in CHOICES.items():
        trial.suggest_int(name, permitted[0], permitted[-1])
    return trial
def wait_for_all(n, what="go"):
    folder = Path(sys.argv[2], what)
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < n:
        pass
"""


def start(storage: str | Path, **changes: Any) -> optuna.Study:
    return open_study("s", storage, {**META, **changes}, RandomSampler())


def ask(study: optuna.Study, leased: bool = True) -> optuna.Trial:
    trial = study.ask()
    if leased:
        lease(trial, 60)
    for name, permitted in CHOICES.items():
        trial.suggest_int(name, permitted[0], permitted[-1])
    return trial


def process(body: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + body, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(nas.__file__).parents[1])},
    )


def outputs(processes: list[subprocess.Popen[str]]) -> list[list[str]]:
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
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------- opening


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


def test_tuples_and_lists_are_the_same_to_a_resumed_study(tmp_path: Path) -> None:
    start(tmp_path / "j", families=("levit", "shvit"))
    start(tmp_path / "j", families=["levit", "shvit"])


def test_foreign_study_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    foreign = optuna.create_study(study_name="s", storage=layer.open_storage(path))
    foreign.tell(foreign.ask(), 1.0)
    with pytest.raises(UserError, match="not made by vitnas"):
        start(path)
    assert "vitnas" not in optuna.load_study(study_name="s", storage=foreign._storage).user_attrs


def test_processes_create_and_enqueue_at_the_same_moment(storage: str, tmp_path: Path) -> None:
    body = """
wait_for_all(4)
study = start()
print(study._study_id)
wait_for_all(4, "created")
for n in range(20):
    print(enqueue(study, {"width": n % 7, "depth": n // 7}, {}, CHOICES))
"""
    folder = barrier(tmp_path)
    results = outputs([process(body, storage, folder) for _ in range(4)])
    assert len({ids for ids, *_ in results}) == 1
    assert sum(out.count("True") for out in results) == 20
    study = start(storage)
    assert optuna.get_all_study_names(study._storage) == ["s"]
    assert study.user_attrs == {"vitnas": META}
    enqueued = [t.system_attrs["fixed_params"] for t in study.trials]
    assert len({tuple(params.items()) for params in enqueued}) == len(enqueued) == 20


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("postgresql://u:pw@h:1/db", "postgresql://u:***@h:1/db"),
        ("postgresql+psycopg://u:p@s/s:w@h/db", "postgresql+psycopg://u:***@h/db"),
        (
            "postgresql://u@h/db?password=pw&sslmode=off",
            "postgresql://u@h/db?password=***&sslmode=off",
        ),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("runs/a:b@c/study.journal", "runs/a:b@c/study.journal"),
    ],
)
def test_mask_url(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:hunter2@127.0.0.1:9/db", "refused"),
        ("postgresql://u@127.0.0.1:9/db?password=hunter2", "refused"),
        ("postgresql://u:hunter2@no-such-host.invalid/db", "no-such-host.invalid"),
        ("postgresql://u:hunter2@host:port/db", "should look like"),
        ("postgresql://u:hun@ter2@host/db", "should look like"),
        ("postgresql://u:hun@ter2:hunter2@host/db", "should look like"),
        ("postgre://u:hunter2@host/db", "unknown database 'postgre'"),
        ("postgresql+nodriver://u:hunter2@host/db", "no driver"),
        ("://hunter2", "should look like"),
        ("sqlite://", "needs a file"),
        ("sqlite:////no-such/folder/study.db", "cannot use /no-such/folder/study.db: No such file"),
    ],
)
def test_bad_url_is_one_line_without_the_password(url: str, expected: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        start(url)
    message = one_line(error)
    assert expected in message
    assert url.startswith("://") or not re.search("hunter2|ter2|hun@", message)
    assert time.monotonic() - begun < 10


def test_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "CONNECT_TIMEOUT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(UserError, match="timeout"):
            start(f"postgresql://u:pw@127.0.0.1:{silent.getsockname()[1]}/db")
        assert time.monotonic() - begun < 8


def test_postgresql_means_psycopg_3() -> None:
    assert layer._sql_url("postgresql://u:pw@h/db").drivername == "postgresql+psycopg"


def test_wrong_password_is_not_repeated(postgres_url: str) -> None:
    wrong = postgres_url.replace("s3cret%2Fword", "hunter%2F2")
    with pytest.raises(UserError, match="authentication failed") as error:
        start(wrong)
    assert not re.search("hunter", one_line(error))


def test_password_in_a_drivers_own_words_is_hidden() -> None:
    url = "postgresql://u:hunter%2F2@h/db?password=pass%3Dword"
    with pytest.raises(UserError) as error, layer.storage_errors(url):
        raise SQLAlchemyError("no entry for hunter/2, hunter%2F2, pass=word\nmore")
    assert one_line(error) == (
        "cannot use the storage postgresql://u:***@h/db?password=***: no entry for ***, ***, ***"
    )


def test_server_that_goes_away_is_one_line(postgres_url: str) -> None:
    import psycopg

    study = start(postgres_url)
    name = postgres_url.rpartition("/")[2]
    with psycopg.connect(postgres_url.rpartition("/")[0] + "/postgres", autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    with (
        pytest.raises(UserError, match=f'"{name}" does not exist'),
        layer.storage_errors(postgres_url),
    ):
        study.ask()


def test_sqlite_works(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = start(url)
    finish(study, ask(study), 70.0, 500.0, -0.1, {})
    assert len(finished(start(url))) == 1


# ---------------------------------------------------------------------- the journal file


@pytest.mark.parametrize("content", [b"just a note", b"a note\n", b"SQLite format 3\x00" + bytes(100), b"[1]\n[2]\n"])
def test_file_that_is_no_journal_is_left_as_it_was(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an Optuna journal"):
        start(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b'{"op_code": broken\n', b'{"op_code":99}\n', b'{"op_code":4}\n'])
def test_damaged_journal_is_one_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j"
    start(path)
    whole = path.read_bytes()
    path.write_bytes(whole + line + whole)
    with pytest.raises(UserError, match="damaged") as error:
        start(path)
    one_line(error)
    assert path.read_bytes() == whole + line + whole


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".", "is not a file"),
        ("file/j", "Not a directory"),
        ("missing/j", "No such file or directory"),
        ("sealed/j", "Permission denied"),
        ("sealed/hidden/j", "Permission denied"),
    ],
)
def test_unusable_path_is_one_line(tmp_path: Path, path: str, expected: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "sealed").mkdir(0o000)
    root = os.geteuid() == 0
    if root:  # whom no permission stops
        os.chown(tmp_path, 65534, -1)
        os.chmod(tmp_path.parent, 0o755)
        os.chmod(tmp_path.parent.parent, 0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=expected) as error:
            start(tmp_path / path)
        one_line(error)
    finally:
        if root:
            os.seteuid(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "sealed"]


def test_torn_last_line_is_cut_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "j"
    study = start(path)
    for _ in range(3):
        finish(study, ask(study), 70.0, 500.0, -0.1, {})
    before = study.trials
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:25])
    study = start(path)
    assert path.read_bytes() == whole
    assert [r.getMessage() for r in caplog.records if r.name == "nas.study"] == [
        f"{path}: cut 25 bytes of an unfinished last line"
    ]
    assert study.trials == before
    finish(study, ask(study), 71.0, 500.0, -0.1, {})
    assert len(finished(start(path))) == 4


def test_live_worker_survives_a_line_torn_by_another(tmp_path: Path) -> None:
    path = tmp_path / "j"
    live = start(path)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"killed whi')
    finish(live, ask(live), 70.0, 500.0, -0.1, {})
    assert len(finished(start(path))) == 1


def test_torn_very_first_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"op_c')
    finish(study := start(path), ask(study), 70.0, 500.0, -0.1, {})
    assert len(finished(start(path))) == 1


def test_lock_of_a_killed_process_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "j"
    path.parent.mkdir()
    start(path)
    killed = process(
        "import nas.study as s\ns._JournalLock(Path(storage)).acquire()\nos.kill(os.getpid(), 9)",
        path,
    )
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    assert Path(f"{path}.lock").exists()
    shutil.move(path.parent, tmp_path / "moved")
    monkeypatch.setattr(layer, "JOURNAL_LOCK_GRACE_S", 3)
    begun = time.monotonic()
    start(tmp_path / "moved" / "j")
    assert 2 < time.monotonic() - begun < 15


def test_interrupts_leave_memory_and_file_in_step(tmp_path: Path) -> None:
    """Ctrl-C at some hundred random moments while trials are stored: no lock stays, no trial is misfiled."""
    body = """
import random, signal
from nas import study as layer
layer.JOURNAL_LOCK_GRACE_S = 3
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
study, interrupts, longest = start(), 0, 0.0
end = time.monotonic() + 4
while time.monotonic() < end:
    begun = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.006))
        trial = ask(study)
        finish(study, trial, 70.0, 500.0, -0.1, {"number": trial.number})
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
    longest = max(longest, time.monotonic() - begun)
signal.setitimer(signal.ITIMER_REAL, 0)
assert longest < 3, longest
assert start().trials == study.trials
assert all(t.user_attrs.get("number", t.number) == t.number for t in study.trials)
print(interrupts)
"""
    (out,) = outputs([process(body, tmp_path / "j")])
    assert int(out[0]) > 50
    assert not (tmp_path / "j.lock").exists()


def test_full_disk_keeps_finished_trials(tmp_path: Path) -> None:
    path = tmp_path / "j"
    body = """
import resource
from nas.errors import UserError
study = start()
try:
    for n in range(1000):
        finish(study, ask(study), n, 1.0, -0.1, {})
        if n == 4:
            size = os.path.getsize(storage) + 2500
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
except UserError as error:
    print(n, error)
"""
    (out,) = outputs([process(body, path)])
    assert 5 <= int(out[0]) < 20
    assert " ".join(out[1:]).startswith(f"disk full while writing {path}: finished trials are kept")
    assert not path.read_bytes().endswith(b"\n")
    study = start(path)
    done = finished(study)
    assert [t.values[0] for t in done] == list(range(int(out[0])))
    running = [t for t in study.trials if t.state == TrialState.RUNNING]
    assert sweep(study) == [t.number for t in running]
    finish(study, ask(study), 1.0, 1.0, -0.1, {})
    states = {t.state for t in start(path).trials}
    assert states <= {TrialState.COMPLETE, TrialState.FAIL}


# ------------------------------------------------------------------------- running a trial


def test_killed_worker_is_swept_and_its_parameters_run_again(storage: str, tmp_path: Path) -> None:
    study = start(storage)
    finish(study, ask(study), 70.0, 500.0, -0.1, {})
    body = """
study = start()
trial = ask(study, 9999)
trial.set_constraint("latency", 5.0)
print(trial.number, flush=True)
time.sleep(60)
"""
    killed = process(body, storage)
    number = int(killed.stdout.readline())
    assert sweep(study) == []  # it is alive
    killed.kill()
    time.sleep(0.2)  # not waited for: a zombie, as under an init that reaps nothing
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


def test_who_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = start(tmp_path / "j")
    alive = ask(study)
    put_lease(study, alive, expires=0)
    reused_pid = ask(study)
    put_lease(study, reused_pid, started=reused_pid.user_attrs["lease"]["started"] - 100)
    elsewhere = ask(study)
    put_lease(study, elsewhere, host="elsewhere", pid=dead_pid())
    expired = ask(study)
    put_lease(study, expired, host="elsewhere", pid=os.getpid(), expires=time.time() - 1)
    unleased = ask(study, leased=False)
    assert sweep(study) == [reused_pid.number, expired.number]
    monkeypatch.setattr(layer, "UNLEASED_S", 0.0)
    assert sweep(study) == [unleased.number]
    states = {t.number: t.state for t in study.trials}
    assert states[alive.number] == states[elsewhere.number] == TrialState.RUNNING


def test_trial_without_parameters_yet_is_failed_but_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = start(tmp_path / "j")
    study.ask()
    monkeypatch.setattr(layer, "UNLEASED_S", 0.0)
    assert sweep(study) == [0]
    assert len(study.trials) == 1


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
    results = outputs([process(body, storage, folder) for _ in range(3)])
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
    assert [t.number for t in finished(study)] == [0, 1]
    interrupted = ask(study)
    assert remaining(study, 4) == 0
    fail(study, interrupted, "interrupted", retry=True)
    assert remaining(study, 4) == 1
    ask(study)
    assert remaining(study, 4) == 0
    ask(study)
    assert remaining(study, 4) == 0


def test_two_workers_share_a_total(storage: str, tmp_path: Path) -> None:
    body = """
study = start()
wait_for_all(2)
while remaining(study, 12):
    sweep(study)
    trial = ask(study)
    time.sleep(0.01)
    assert finish(study, trial, 70.0 + trial.number, 500.0, -0.1, {"pid": os.getpid()})
"""
    folder = barrier(tmp_path)
    outputs([process(body, storage, folder) for _ in range(2)])
    trials = start(storage).trials
    assert 12 <= len(trials) <= 13
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
