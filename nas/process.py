"""Child processes spoken to in JSON lines, and the CPUs they may use (POSIX).

A `Worker` is the parent's end: it starts `python -m module`, sends one request at a time and blocks on
the answer. `serve` is the child's end. Whatever the child does (raise, crash, hang, print, run out of
memory), the parent gets an answer or a `WorkerError` with a one-line reason, and the child never
outlives the parent, not even while it is stopped.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Self

START_S = 60  # a Python interpreter on a loaded machine
EXIT_S = 5  # from a closed pipe to the end of its process
REASON_LENGTH = 500
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(RuntimeError):
    """A request that was not answered: one line that says why."""


class Worker:
    """A child process that runs `python -m module` and answers requests (see `serve`).

    cpus: the CPUs the child and its threads are pinned to (where the system can pin).
    log: file for what the child prints and for its tracebacks; by default they are dropped with it.

    The child runs in a session of its own, so the terminal's Ctrl-C does not reach it. On Linux the
    kernel kills it when the thread that created the Worker ends: create it in a thread that stays.
    An exception in the child leaves it usable; after a crash, a time-out or an interrupted call it is
    gone and every further call raises the same WorkerError.
    """

    def __init__(self, module: str, cpus: list[int] | None = None, log: Path | None = None):
        self._ended: str | None = None  # why no call can succeed any more
        self._ready = False
        self._received = b""
        self._printed = log.open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115
        start = {"module": module, "cpus": cpus, "parent": os.getpid()}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                "from nas.process import _enter; _enter()",
                json.dumps(start),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            start_new_session=True,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._ended is None and self._process.poll() is None

    def call(self, method: str, timeout_s: float, **args) -> dict:
        """Runs a method of the child and returns its answer; WorkerError says why there is none."""
        self.send(method, **args)
        return self.receive(timeout_s)

    def send(self, method: str, **args) -> None:
        """First half of `call`: the child works while the caller does something else."""
        if self._ended:
            raise WorkerError(self._ended)
        try:
            self._process.stdin.write(_line({"method": method, "args": args}))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() knows why

    def receive(self, timeout_s: float) -> dict:
        """Second half of `call`."""
        self._await_ready(timeout_s)
        answer = self._read(timeout_s)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def pause(self) -> None:
        """Stops the child (SIGSTOP) until `resume`; nothing to do for a dead one."""
        with contextlib.suppress(WorkerError):
            self._await_ready(START_S)  # before that it could outlive the parent
            self._process.send_signal(signal.SIGSTOP)
            if self.alive and hasattr(os, "waitid"):  # a busy machine stops it some time later
                os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kills the child."""
        self._end("closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _await_ready(self, timeout_s: float) -> None:
        """Reads the greeting the child sends once it is bound to its parent."""
        if not self._ready:
            self._read(timeout_s)
            self._ready = True

    def _read(self, timeout_s: float) -> dict:
        """Blocks until one whole line has come."""
        if self._ended:
            raise WorkerError(self._ended)
        deadline = time.monotonic() + timeout_s
        try:
            while b"\n" not in self._received:
                if not self._selector.select(max(0, deadline - time.monotonic())):
                    raise WorkerError(self._end(f"no answer in {timeout_s:.3g} s"))
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise WorkerError(self._end(self._why_it_ended()))
                self._received += data
        except KeyboardInterrupt:
            self._end("interrupted")  # its answer would be taken for the next one's
            raise
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)

    def _why_it_ended(self) -> str:
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe and kept running"
        self._printed.seek(max(0, self._printed.seek(0, os.SEEK_END) - 10 * REASON_LENGTH))
        lines = self._printed.read().decode(errors="replace").split("\n")
        last = next((": " + _one_line(line) for line in reversed(lines) if line.strip()), "")
        if code >= 0:
            return f"exited with {code}{last}"
        hint = "; often means out of memory" if code == -signal.SIGKILL else ""
        return f"killed by signal {-code} ({signal.Signals(-code).name}{hint}){last}"

    def _end(self, reason: str) -> str:
        """Kills the child if it still lives; further calls raise with the first reason given."""
        if self._ended is None:
            self._ended = reason
            self._process.kill()
            self._process.wait()
            self._selector.close()
            self._process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # flushes
                self._process.stdin.close()
            self._printed.close()
        return reason


def serve(methods: dict[str, Callable[..., dict | None]]) -> None:
    """Child side: answers the parent's requests, one at a time, until the parent is gone.

    A method gets the request's arguments by name and returns something JSON can carry; what it raises
    becomes the reason of the parent's WorkerError. Methods may print: it goes to the worker's log.
    """
    for line in _requests:
        request = json.loads(line)
        try:
            answer = _line({"result": methods[request["method"]](**request["args"]) or {}})
        except Exception as error:
            traceback.print_exc()
            answer = _line({"error": _one_line(f"{type(error).__name__}: {error}")})
        _answers.write(answer)
        _answers.flush()


_requests: BinaryIO
_answers: BinaryIO


def _enter() -> None:
    """What a child does first: before this, its module's imports could print into the protocol."""
    global _requests, _answers
    start = json.loads(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # some containers forbid it
            Path("/proc/self/oom_score_adj").write_text("1000")  # kill this process, not the search
    if os.getppid() != start["parent"]:
        sys.exit("the parent died")
    if start["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, start["cpus"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an expected answer
    _requests = os.fdopen(os.dup(0), "rb")
    _answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    _answers.write(_line({"result": {}}))
    _answers.flush()
    runpy.run_module(start["module"], run_name="__main__", alter_sys=True)


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."


def usable_cpus() -> list[int]:
    """The CPUs this process may use, one per physical core first, then their hyper-threads."""
    cores = _cores()
    return [core[0] for core in cores] + [cpu for core in cores for cpu in core[1:]]


def physical_cores() -> int:
    """Physical cores this process may use by its affinity."""
    return len(_cores())


def default_threads() -> int:
    """Physical cores this process may use by its affinity and by its cgroups' CPU quota, at least 1."""
    return max(1, math.floor(min(physical_cores(), _cpu_quota())))


def _cores() -> list[list[int]]:
    """The usable CPUs, grouped by physical core."""
    if not hasattr(os, "sched_getaffinity"):
        import psutil

        return [[cpu] for cpu in range(psutil.cpu_count(logical=False) or os.cpu_count() or 1)]
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def _cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs granted by the tightest quota among this process's cgroups; infinity where none is read."""
    granted = [math.inf]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers
        group = mount / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(mount):
                granted.append(_folder_quota(folder))
    return min(granted)


def _folder_quota(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():  # cgroup 2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
        else:  # cgroup 1: -1 is none
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else math.inf
    except OSError:
        return math.inf
