"""Programs in processes of their own that begin with torch, timm and optuna imported.

Each is forked off a server that has done nothing but these imports, which take longer than what most programs do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["onnx", "scipy.stats", "matplotlib.figure", "nas.cli.app", "nas.study.trials", "nas.training.run"]
)


class Forked:
    """A running `python -c program words`, as subprocess.Popen has it: what it prints goes to files."""

    def __init__(self, program: str, *words: str, env: dict[str, str] | None = None, session: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vitnas-forked-")
        self._printed = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._process = SERVER.Process(
            target=_run, args=(program, words, dict(os.environ if env is None else env), self._printed, session)
        )
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it has printed, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        out, err = (path.read_text() for path in self._printed)
        return out, err


def _run(program: str, words: tuple[str, ...], env: dict[str, str], printed: list[Path], session: bool) -> None:
    if session:
        os.setsid()
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.fsync = lambda _: None  # no test cuts the power
    sys.argv = ["-c", *words]
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a forked process ends without
