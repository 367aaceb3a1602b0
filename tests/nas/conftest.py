"""The command line in this process; real PostgreSQL and ssh servers for the tests that need them, or a skip that says
why."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import pwd
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import quick
import typer.main
from postgres import Server, Unavailable, free_port


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A temporary server on localhost that asks for its password."""
    try:
        server = Server()
    except Unavailable as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: Server) -> str:
    """URL of a fresh, empty database."""
    return postgres_server.new_database()


@pytest.fixture(scope="session", autouse=True)
def _own_locks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """These tests wait for no other vitnas of this machine."""
    os.environ["VITNAS_LOCKS"] = str(tmp_path_factory.mktemp("locks"))


@contextlib.contextmanager
def proxy_of(storage: str | Path, port: int = 0) -> Iterator[str]:
    """The URL of a proxy that serves a storage in a thread of this process."""
    pytest.importorskip("grpc", reason="grpcio is missing: proxies not tested")
    from nas.study.serve import serve_until

    started: queue.SimpleQueue[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

    async def serve() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        await serve_until(ended, storage, "127.0.0.1", port, lambda port: started.put((port, loop, ended)))

    thread = threading.Thread(target=asyncio.run, args=[serve()], daemon=True)
    thread.start()
    listens, loop, ended = started.get(timeout=60)
    try:
        yield f"grpc://127.0.0.1:{listens}"
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(60)


@pytest.fixture
def proxied() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`proxy_of`."""
    return proxy_of


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Files are not waited for until the disk has them: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _brief_looks() -> Iterator[None]:
    """Nothing here depends on what other processes do: how busy the machine is, is seen in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        quick.brief_looks(patch)
        yield


@pytest.fixture
def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture(params=["journal", "postgres", pytest.param("grpc", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh storage of each kind that several processes may share; by default a proxy where a test asks for it."""
    if request.param == "journal":
        yield str(tmp_path / "study.journal")
    elif request.param == "grpc":
        with proxy_of(tmp_path / "study.journal") as url:
            yield url
    else:
        yield request.getfixturevalue("postgres_url")


SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey {home}/host
AuthorizedKeysFile {home}/user.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
SetEnv TMPDIR={home}/tmp VITNAS_LOCKS={locks}
"""
SSH = """
Host board behind
    Port {port}
Host behind
    ProxyJump board
Host down
    Port {closed}
Host *
    HostName 127.0.0.1
    HostKeyAlias board
    User {user}
    IdentityFile {home}/user
    IdentitiesOnly yes
    UserKnownHostsFile {home}/known_hosts
    StrictHostKeyChecking yes
"""


@dataclass
class SshServer:
    """A running sshd. Hosts of its clients: board, behind (through board), down. tmp: its users' TMPDIR."""

    pid: int
    port: int
    client: str
    tmp: Path

    def processes(self, of: str = "") -> list[psutil.Process]:
        """What runs in its users' sessions, and what is left of them, with `of` in the command; without forks."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == str(self.tmp) and of in " ".join(process.cmdline()):
                    parent = process.parent()
                    if parent is None or parent.cmdline() != process.cmdline():
                        found.append(process)
            except psutil.Error:
                pass
        return found

    def connections(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children()

    def cut(self) -> None:
        """Ends every connection as a dead network would, but at once."""
        for process in self.connections():
            process.kill()


@pytest.fixture(scope="session")
def ssh_server() -> Iterator[SshServer]:
    """A temporary server on localhost, with keys of its own."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no OpenSSH server and client here (Debian: apt install openssh-server): not tested on one")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it
    home = Path(tempfile.mkdtemp(prefix="vitnas-sshd-"))
    (home / "tmp").mkdir()
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", home / key]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    port, user = free_port(), pwd.getpwuid(os.geteuid()).pw_name
    (home / "sshd_config").write_text(SSHD.format(port=port, home=home, locks=os.environ["VITNAS_LOCKS"]))
    (home / "config").write_text(SSH.format(port=port, closed=free_port(), home=home, user=user))
    (home / "known_hosts").write_text(f"board {(home / 'host.pub').read_text()}")
    with (home / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", home / "sshd_config"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"sshd did not start:\n{(home / 'log').read_text()}")
            time.sleep(0.02)
        yield SshServer(server.pid, port, f"ssh -F {home}/config", home / "tmp")
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(home, ignore_errors=True)


_command = functools.cache(typer.main.get_command)


class Cli:
    """The command in this process: call it with its words for (exit code, stdout, stderr). Its verbs and options are
    read once for all calls."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *words: str) -> tuple[int, str, str]:
        from nas.cli import app

        self._monkeypatch.setattr(typer.main, "get_command", _command)
        self._monkeypatch.setattr(sys, "argv", ["vitnas", *words])
        with pytest.raises(SystemExit) as stop:
            app.main()
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


@pytest.fixture(autouse=True)
def _warnings_on_stderr() -> Iterator[None]:
    """As without pytest, whose own handlers stand in the way. What -q and -v have set ends with the test, and what the
    tests of the documentation have set, which parse such commands, before it."""
    log = logging.getLogger("nas")
    log.handlers[:] = [logging.lastResort]
    log.setLevel(logging.NOTSET)
    yield
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    quick.few_rounds(monkeypatch)
    quick.brief_slices(monkeypatch)
    quick.blank_plots(monkeypatch)


@pytest.fixture
def small_shvit(monkeypatch: pytest.MonkeyPatch) -> None:
    quick.small_shvit(monkeypatch)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exports are kept for `exports_here`."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def exports_here(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.exports_here(monkeypatch, exports)


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes every file from then on break off half written."""
    whole = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        whole(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda: monkeypatch.setattr(Path, "write_bytes", full_disk)
