"""The command line in this process; a real PostgreSQL server for the tests that need one, or a skip that says why."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PASSWORD = "s3cret/word"
INITDB = ["--auth=scram-sha-256", "--no-locale", "--encoding=UTF8", "--no-sync"]
POSTGRES = ["-h", "127.0.0.1", "-k", "", "-F"]  # no Unix socket, no fsync


def _binaries() -> Path | None:
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), default=None)


def _unprivileged() -> dict[str, object]:
    """Arguments of subprocess that drop root, which initdb and postgres refuse to run as."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a temporary server on localhost, without a database name; it asks for its password."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here (Debian: apt install postgresql): not tested on one")
    psycopg = pytest.importorskip("psycopg", reason="psycopg is missing: PostgreSQL not tested")
    drop = _unprivileged()
    home = Path(tempfile.mkdtemp(prefix="vitnas-postgres-"))
    data, secret, log = home / "data", home / "password", home / "log"
    secret.write_text(PASSWORD)
    if drop:
        os.chown(home, drop["user"], drop["group"])
        os.chown(secret, drop["user"], drop["group"])
    server = None
    try:
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "vitnas", "--pwfile", secret, *INITDB],
            check=True,
            capture_output=True,
            cwd=home,
            **drop,
        )
        port = _free_port()
        with log.open("wb") as output:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-p", str(port), *POSTGRES],
                stdout=output,
                stderr=output,
                cwd=home,
                **drop,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(
                    host="127.0.0.1", port=port, user="vitnas", password=PASSWORD, dbname="postgres"
                ).close()
                break
            except psycopg.OperationalError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the PostgreSQL server did not start:\n{log.read_text()}")
                time.sleep(0.05)
        yield f"postgresql://vitnas:{PASSWORD.replace('/', '%2F')}@127.0.0.1:{port}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGQUIT)  # without a checkpoint: the data goes too
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: str, request: pytest.FixtureRequest) -> str:
    """URL of a fresh, empty database."""
    import psycopg

    name = f"test_{time.time_ns()}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres_server}/{name}"


@pytest.fixture(params=["journal", "postgres"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh storage of each kind that several processes may share."""
    if request.param == "journal":
        return str(tmp_path / "study.journal")
    return request.getfixturevalue("postgres_url")


class Cli:
    """The command in this process: call it with its words for (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *words: str) -> tuple[int, str, str]:
        from nas import cli

        self._monkeypatch.setattr(sys, "argv", ["vitnas", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = self._capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    @staticmethod
    def refused(result: tuple[int, str, str], *words: str) -> None:
        """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
        code, out, err = result
        assert code == 2, (code, out, err)
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        for word in words:
            assert word in err, (word, err)


@pytest.fixture
def vitnas(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes every file from then on break off half written."""
    whole = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        whole(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda: monkeypatch.setattr(Path, "write_bytes", full_disk)
