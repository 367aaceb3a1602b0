"""A PostgreSQL server of one's own on localhost, as a user other than root, to stop and to start again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PASSWORD = "s3cret/word"
INITDB = ["--auth=scram-sha-256", "--no-locale", "--encoding=UTF8", "--no-sync"]
POSTGRES = ["-h", "127.0.0.1", "-k", "", "-F"]  # no Unix socket, no fsync
PATIENCE_S = 30


class Unavailable(Exception):
    """This machine has no PostgreSQL, or no driver for it."""


class Server:
    """Its data is made at once, in a folder of its own; use it as a context. url: without a database's name.

    connections: how many it takes at a time.
    """

    def __init__(self, connections: int = 100) -> None:
        try:
            import psycopg
        except ImportError:
            raise Unavailable("psycopg is missing: PostgreSQL not tested") from None
        self._connect, self._no_connection = psycopg.connect, psycopg.OperationalError
        self._binaries = _binaries()
        self._drop = _unprivileged()
        self._home = Path(tempfile.mkdtemp(prefix="vitnas-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._options = [*POSTGRES, "-c", f"max_connections={connections}"]
        self.port = free_port()
        self.url = f"postgresql://vitnas:{PASSWORD.replace('/', '%2F')}@127.0.0.1:{self.port}"
        secret = self._home / "password"
        secret.write_text(PASSWORD)
        if self._drop:
            os.chown(self._home, self._drop["user"], self._drop["group"])
            os.chown(secret, self._drop["user"], self._drop["group"])
        words = [self._binaries / "initdb", "-D", self._home / "data", "-U", "vitnas", "--pwfile", secret, *INITDB]
        subprocess.run(words, check=True, capture_output=True, cwd=self._home, **self._drop)

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def running(self) -> bool:
        return self._process is not None

    def pids(self) -> list[int]:
        """Its processes."""
        if self._process is None:
            return []
        below = psutil.Process(self._process.pid).children(recursive=True)
        return [self._process.pid, *(process.pid for process in below)]

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = [self._binaries / "postgres", "-D", self._home / "data", "-p", str(self.port), *self._options]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self._home, **self._drop)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._connect(f"{self.url}/postgres").close()
                return
            except self._no_connection:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._home / "log").read_text()
                    raise RuntimeError(f"the PostgreSQL server did not start:\n{log}") from None
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop it as a crash would: at once, every connection cut."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def new_database(self) -> str:
        """The URL of a fresh, empty database."""
        name = f"test_{time.time_ns()}"
        self.execute(f"CREATE DATABASE {name}")
        return f"{self.url}/{name}"

    def execute(self, statement: str) -> None:
        with self._connect(f"{self.url}/postgres", autocommit=True) as connection:
            connection.execute(statement)

    @contextmanager
    def full(self) -> Iterator[int]:
        """Cut every connection and take all that the server has to give, so that nobody gets one; yields how many."""
        taken = [self._connect(f"{self.url}/postgres", autocommit=True)]
        try:
            others = "backend_type = 'client backend' AND pid <> ALL(%s)"
            for _ in range(2):
                taken[0].execute(
                    f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {others}",
                    [[connection.info.backend_pid for connection in taken]],
                )
                with suppress(self._no_connection):
                    while True:
                        taken.append(self._connect(f"{self.url}/postgres"))
            yield len(taken)
        finally:
            for connection in taken:
                connection.close()

    def cut(self) -> None:
        """End every client's connection, and with it its transaction and its locks."""
        self.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _binaries() -> Path:
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    found = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), default=None)
    if found is None:
        raise Unavailable("no PostgreSQL here (Debian: apt install postgresql): not tested on one")
    return found


def _unprivileged() -> dict[str, object]:
    """Arguments of subprocess that drop root, which initdb and postgres refuse to run as."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
