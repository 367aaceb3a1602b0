"""Where studies are kept: journals that are torn, locked, damaged or full, databases that fail, passwords."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

import nas
from nas import storage as layer
from nas.errors import UserError
from nas.storage import mask_url
from nas.study import finish, lease, open_study, sweep

PROLOGUE = """
import os, random, resource, signal, sys, time
from nas import storage as layer
from nas.errors import UserError
from nas.study import finish, lease, open_study
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
        timeout=60,
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
    assert [r.getMessage() for r in caplog.records if r.name == "nas.storage"] == [
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


@pytest.mark.filterwarnings("ignore:The value of `grace_period` might be too small")
def test_lock_of_a_killed_process_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "j"
    path.parent.mkdir()
    start(path)
    killed = python("start()._storage._backend.lock.acquire()\nos.kill(os.getpid(), 9)", path)
    assert killed.returncode == -9, killed.stderr
    assert Path(f"{path}.lock").exists()
    shutil.move(path.parent, tmp_path / "moved")
    monkeypatch.setattr(layer, "JOURNAL_LOCK_GRACE_S", 1)
    begun = time.monotonic()
    start(tmp_path / "moved" / "j")
    assert 1 < time.monotonic() - begun < 15


def test_interrupts_leave_memory_and_file_in_step(tmp_path: Path) -> None:
    """Ctrl-C at some hundred random moments while trials are stored: no lock stays, no trial is misfiled."""
    body = """
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
    done = python(body, tmp_path / "j")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
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
