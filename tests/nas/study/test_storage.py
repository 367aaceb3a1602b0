"""Where studies are kept: journals that are torn, locked, damaged or full, databases that fail, passwords."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from postgres import Server
from sqlalchemy.exc import OperationalError, PendingRollbackError, SQLAlchemyError

import nas
from nas.errors import UserError
from nas.study import database as study_database
from nas.study import errors, journal
from nas.study import patient as study_patient
from nas.study import storage as layer
from nas.study.trials import ask as next_trial
from nas.study.trials import enqueue, finish, lease, open_study, remaining, sweep
from nas.text import mask_url

PROLOGUE = """
import os, random, resource, signal, sys, time
from nas.study import journal
from nas.errors import UserError
from nas.study.trials import finish, lease, open_study
from optuna.samplers import RandomSampler
path = sys.argv[1]
def start():
    return open_study("s", path, {}, RandomSampler())
def ask(study):
    trial = study.ask()
    lease(trial, 60)
    trial.suggest_int("width", 0, 6)
    return trial
"""


def start(storage: str | Path) -> optuna.Study:
    return open_study("s", storage, {}, RandomSampler())


def ask(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    lease(trial, 60)
    trial.suggest_int("width", 0, 6)
    return trial


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [t for t in study.trials if t.state.is_finished()]


def python(body: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + body, path],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(nas.__file__).parents[1])},
    )


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("postgresql://u:pw@h:1/db", "postgresql://u:***@h:1/db"),
        ("postgresql+psycopg://u:p@s/s:w@h/db", "postgresql+psycopg://u:***@h/db"),
        (
            "postgresql://u@h/db?password=pw&sslmode=off",
            "postgresql://u@h/db?password=***&sslmode=off",
        ),
        ("postgresql://u@h/db?sslpassword=pw", "postgresql://u@h/db?sslpassword=***"),
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
        ("sqlite://st/x.db", "names the host 'st': for a file write sqlite:///st/x.db"),
        ("://hunter2", "should look like"),
        ("sqlite://", "needs a file"),
        ("grpc://127.0.0.1:9", "cannot use the storage grpc://127.0.0.1:9: nothing answers there: Connection refused"),
        ("grpc://no-such-host.invalid", "no-such-host.invalid"),
        ("grpc://u:hunter2@host:13000", "should look like grpc://HOST:13000"),
        ("grpc://host:port", "should look like"),
        ("grpc://host/study", "should look like"),
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
    assert time.monotonic() - begun < 60


def test_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_database, "CONNECT_TIMEOUT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(UserError, match="timeout"):
            start(f"postgresql://u:pw@127.0.0.1:{silent.getsockname()[1]}/db")
        assert time.monotonic() - begun < 60


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"no driver for postgresql://u:\*\*\*@h/db: .*pip install '\.\[postgresql\]'$"):
        study_database.sql_url("postgresql://u:pw@h/db")


@pytest.mark.parametrize("read_only", [False, True])
def test_tables_of_an_older_optuna_name_the_upgrade(tmp_path: Path, read_only: bool) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    layer.open_storage(url)
    with sqlite3.connect(tmp_path / "old.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    with pytest.raises(UserError, match=re.escape(f"optuna storage upgrade --storage {url}`")):
        layer.open_storage(url, read_only=read_only)


def test_postgresql_means_psycopg_3() -> None:
    assert study_database.sql_url("postgresql://u:pw@h/db").drivername == "postgresql+psycopg"


def test_wrong_password_is_not_repeated(postgres_url: str) -> None:
    wrong = postgres_url.replace("s3cret%2Fword", "hunter%2F2")
    with pytest.raises(UserError, match="authentication failed") as error:
        start(wrong)
    assert not re.search("hunter", one_line(error))


def test_password_in_a_drivers_own_words_is_hidden() -> None:
    url = "postgresql://u:hunter%2F2@h/db?password=pass%3Dword"
    with pytest.raises(UserError) as error, errors.storage_errors(url):
        raise SQLAlchemyError("no entry for hunter/2, hunter%2F2, pass=word\nmore")
    assert one_line(error) == (
        "cannot use the storage postgresql://u:***@h/db?password=***: no entry for ***, ***, ***"
    )


def test_server_that_stays_away_is_one_line(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    study = start(postgres_url)
    monkeypatch.setattr(study_patient, "PATIENCE_S", 0)
    name = postgres_url.rpartition("/")[2]
    with psycopg.connect(postgres_url.rpartition("/")[0] + "/postgres", autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    with (
        pytest.raises(UserError, match=f'"{name}" does not exist'),
        errors.storage_errors(postgres_url),
    ):
        study.ask()


def test_sqlite_works(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = start(url)
    finish(study, ask(study), 70.0, 500.0, -0.1, {})
    assert len(finished(start(url))) == 1


# ---------------------------------------------------------------- a database that goes away


@pytest.fixture
def outage(postgres_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The server is stopped as the test says and started as soon as it is said to be away; what was said."""
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if "is away" in line:
            postgres_server.start()

    monkeypatch.setattr(study_patient, "tell", tell)
    monkeypatch.setattr(study_patient, "PAUSES_S", (0.01, 0.1))
    yield said
    if not postgres_server.running:
        postgres_server.start()


def test_every_call_of_a_search_outlasts_an_outage(
    postgres_server: Server, postgres_url: str, outage: list[str]
) -> None:
    study = start(postgres_url)
    called: dict[str, Any] = {}

    def away(name: str, call: Callable[[], Any]) -> Any:
        postgres_server.stop()
        called[name] = call()
        assert postgres_server.running, name
        return called[name]

    away("remaining", lambda: remaining(study, 3))
    away("enqueue", lambda: enqueue(study, {"width": 5}, {}, {"width": range(7)}))
    trial = away("ask", lambda: next_trial(study))
    away("suggest", lambda: trial.suggest_int("width", 0, 6))
    away("set", lambda: study.set_user_attr("key", "value"))
    away("finish", lambda: finish(study, trial, 70.0, 500.0, -0.1, {"latency_ms": 1.0}))
    dead = next_trial(study)
    dead.suggest_int("width", 0, 6)
    dead.set_user_attr("lease", {**dead.user_attrs["lease"], "started": -100})
    away("sweep", lambda: sweep(study))
    assert called["suggest"] == 5
    assert called["finish"] is True
    assert called["sweep"] == [1]
    states = [t.state for t in start(postgres_url).trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    away_lines, back_lines = outage[::2], outage[1::2]
    assert len(away_lines) == len(back_lines) == 7
    for line in away_lines:
        assert line.startswith("the database postgresql://vitnas:***@127.0.0.1:")
        assert line.endswith("it is waited for, 10 minutes at most")
        assert "\n" not in line
        assert not re.search("s3cret|word", line)
    assert all(re.fullmatch(r"the database is back after \d+ s", line) for line in back_lines)


class Lost(Exception):
    """What a driver raises for a connection that is gone."""


def no_answer() -> OperationalError:
    return OperationalError("COMMIT", {}, Lost("server closed the connection unexpectedly"))


@pytest.fixture
def unanswered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> optuna.Study:
    """A study in a database whose server does what it is told, but whose first answer to a tell is lost."""
    url = f"sqlite:///{tmp_path}/study.db"
    study = start(url)
    study._storage = patient = study_patient.PatientStorage(study._storage, url)
    monkeypatch.setattr(study_patient, "PAUSES_S", (0.0, 0.0))
    store, answers = patient._storage.set_trial_state_values, iter([False])

    def set_trial_state_values(*args: Any) -> bool:
        told = store(*args)
        if next(answers, True):
            return told
        raise no_answer()

    monkeypatch.setattr(patient._storage, "set_trial_state_values", set_trial_state_values)
    return study


def test_result_whose_answer_is_lost_is_stored_once(
    unanswered: optuna.Study, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = unanswered.ask()
    assert finish(unanswered, trial, 70.0, 500.0, -0.1, {}) is True
    assert [t.values for t in unanswered.trials] == [[70.0, 500.0]]
    assert capsys.readouterr().err.count("\n") == 2


def test_trial_that_another_worker_failed_meanwhile_is_no_result(
    unanswered: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = unanswered.ask()
    other = start(f"sqlite:///{tmp_path}/study.db")

    def swept(*_: Any) -> bool:
        monkeypatch.undo()
        other.tell(trial.number, state=TrialState.FAIL)
        raise no_answer()

    monkeypatch.setattr(unanswered._storage._storage, "set_trial_state_values", swept)
    assert finish(unanswered, trial, 70.0, 500.0, -0.1, {}) is False


def test_server_lost_within_a_read_is_waited_for(
    unanswered: optuna.Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna then asks once more on the same, broken connection."""
    read, answers = unanswered._storage._storage.get_all_trials, iter([False])

    def get_all_trials(*args: Any, **kwargs: Any) -> list[optuna.trial.FrozenTrial]:
        if next(answers, True):
            return read(*args, **kwargs)
        raise StorageInternalError("commit") from PendingRollbackError("Can't reconnect until ... is rolled back")

    monkeypatch.setattr(unanswered._storage._storage, "get_all_trials", get_all_trials)
    assert unanswered.get_trials() == []
    assert "is back" in capsys.readouterr().err


def test_ctrl_c_ends_the_wait_and_those_that_follow(unanswered: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise no_answer()

    pauses: list[float] = []

    def pressed(pause: float) -> None:
        pauses.append(pause)
        raise KeyboardInterrupt

    monkeypatch.setattr(unanswered._storage._storage, "get_all_trials", gone)
    monkeypatch.setattr(study_patient, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pressed))
    with pytest.raises(KeyboardInterrupt):
        unanswered.get_trials()
    with pytest.raises(OperationalError):
        unanswered.get_trials()
    assert len(pauses) == 1


def test_what_a_server_says_of_a_statement_is_not_waited_for(postgres_url: str) -> None:
    study = start(postgres_url)
    with study._storage._backend.engine.connect() as connection:
        connection.exec_driver_sql("DROP TABLE trials CASCADE")
        connection.commit()
    with pytest.raises(StorageInternalError):
        study.get_trials()


@pytest.mark.parametrize("cut_in", ["enqueue_trial", "ask"])
def test_decision_is_taken_again_if_the_lock_is_lost_in_it(
    postgres_server: Server, postgres_url: str, monkeypatch: pytest.MonkeyPatch, cut_in: str
) -> None:
    """Only the connection that holds the lock is cut. Another worker decides then: nothing is enqueued twice."""
    study = start(postgres_url)
    monkeypatch.setattr(study_patient, "PAUSES_S", (0.0, 0.1))
    dead = next_trial(study)
    dead.suggest_int("width", 0, 6)
    dead.set_user_attr("lease", {**dead.user_attrs["lease"], "started": -100})
    whole, other = getattr(study, cut_in), start(postgres_url)

    def cut(*args: Any) -> Any:
        monkeypatch.setattr(study, cut_in, whole)
        result = whole(*args) if cut_in == "ask" else None
        postgres_server.cut()
        sweep(other)
        return result or whole(*args)

    monkeypatch.setattr(study, cut_in, cut)
    if cut_in == "ask":
        trial = next_trial(study)
        assert "lease" in study.trials[trial.number].user_attrs
    else:
        assert sweep(study) == [0]
    sweep(study)
    trials = start(postgres_url).trials
    assert [t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs] == [0]
    running = [t.number for t in trials if t.state == TrialState.RUNNING]
    assert running == ([trial.number] if cut_in == "ask" else [])


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
        for parent in tmp_path.parents[:-2]:  # pytest's own, below /tmp
            os.chmod(parent, parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=expected) as error:
            start(tmp_path / path)
        one_line(error)
    finally:
        if root:
            os.seteuid(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "sealed"]


def test_torn_last_line_is_cut_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "j"
    study = start(path)
    for _ in range(3):
        finish(study, ask(study), 70.0, 500.0, -0.1, {})
    before = study.trials
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:25])
    study = start(path)
    assert path.read_bytes() == whole
    assert capsys.readouterr().err.splitlines() == [f"{path}: cut 25 bytes of an unfinished last line"]
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


@pytest.mark.filterwarnings("ignore:The value of `grace_period` might be too small")
def test_lock_of_a_killed_process_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "j"
    path.parent.mkdir()
    start(path)
    killed = python("start()._storage._backend.lock.acquire()\nos.kill(os.getpid(), 9)", path)
    assert killed.returncode == -9, killed.stderr
    assert Path(f"{path}.lock").exists()
    shutil.move(path.parent, tmp_path / "moved")
    monkeypatch.setattr(journal, "JOURNAL_LOCK_GRACE_S", 1)
    begun = time.monotonic()
    start(tmp_path / "moved" / "j")
    assert 1 < time.monotonic() - begun < 60


def test_interrupts_leave_memory_and_file_in_step(tmp_path: Path) -> None:
    """Ctrl-C at some hundred random moments while trials are stored: no lock stays, no trial is misfiled."""
    body = """
journal.JOURNAL_LOCK_GRACE_S = 60
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
study, interrupts, longest = start(), 0, 0.0
while interrupts < 300:
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
assert longest < 60, longest
assert start().trials == study.trials
assert all(t.user_attrs.get("number", t.number) == t.number for t in study.trials)
"""
    done = python(body, tmp_path / "j")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "j.lock").exists()


def test_full_disk_keeps_finished_trials(tmp_path: Path) -> None:
    path = tmp_path / "j"
    body = """
study = start()
try:
    for n in range(1000):
        finish(study, ask(study), n, 1.0, -0.1, {})
        if n == 4:
            size = os.path.getsize(path) + 2500
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
except UserError as error:
    print(n, error)
"""
    done = python(body, path)
    assert done.returncode == 0, done.stderr
    number, message = done.stdout.split(maxsplit=1)
    assert 5 <= int(number) < 20
    assert message.startswith(f"the size allowed for a file (ulimit -f) is too small in {tmp_path} (")
    assert not path.read_bytes().endswith(b"\n")
    study = start(path)
    assert [t.values[0] for t in finished(study)] == list(range(int(number)))
    running = [t for t in study.trials if t.state == TrialState.RUNNING]
    assert sweep(study) == [t.number for t in running]
    finish(study, ask(study), 1.0, 1.0, -0.1, {})
    states = {t.state for t in start(path).trials}
    assert states <= {TrialState.COMPLETE, TrialState.FAIL}
