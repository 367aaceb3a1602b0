"""Child processes spoken to in JSON lines, the CPUs and memory they may use (POSIX).

A `Worker` is the parent's end: it starts `python -m module`, sends one request at a time and blocks on
the answer. `serve` is the child's end. Whatever the child does (raise, crash, hang, print, answer with
garbage, run out of memory), the parent gets an answer or a `WorkerError` with a one-line reason, and
neither the child nor what it starts outlives the parent, not even while it is stopped. The child may be
on another machine, at the end of an ssh connection; that machine has nothing but this module's imports,
so they are of the standard library.
"""

import contextlib
import ctypes
import json
import os
import queue
import re
import resource
import runpy
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from nas.errors import DiskFull, disk_errors, fullest, is_full
from nas.files import FULL_BELOW, temporary_folder

START_S = 60  # a Python interpreter on a loaded machine
EXIT_S = 5  # from a closed pipe to the end of its process
BEAT_S = 10  # a distant child hears from its parent this often,
SILENCE_S = 60  # and ends where it has not for so long
REASON_LENGTH = 500
LONGEST = 1 << 30  # bytes of an answer
TOLD_S, TOLD_AGAIN_S = 10, 60  # of waiting for an answer
ENTER = "from nas.process import _enter; _enter()"
GREETING = b'{"result": {}}'
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
"""glibc 2.35 and newer then ask for huge pages where Linux gives them to who asks (its default)."""
MARK = "VITNAS_HUGE_PAGES"
"""In the environment where this program has set them, not the user."""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What native code puts before a reason: ONNX Runtime's codes and file, a place in C++ and its function.
NATIVE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : (?:Load model from .*? failed: ?)?|"
    r"/\S+\.(?:cc|cpp|cu|h):\d+ (?:[^()]*\([^()]*\)(?: const)? )?"
)


class WorkerError(RuntimeError):
    """A request that was not answered: one line that says why."""


def here(start: dict[str, Any]) -> tuple[list[str], bytes]:
    """The command that starts a child on this machine, and what it reads before the first request: nothing."""
    return [sys.executable, "-P", "-c", ENTER, json.dumps(start | {"parent": os.getpid()})], b""


def start_again_in_huge_pages() -> None:
    """Run this process's command anew, with its memory in huge pages where that can be had (Linux and glibc).

    A training goes over more memory than the processor's translation buffer covers: in huge pages EfficientViT-M1 at
    64 px trains 1.1 times as fast (docs/results/training.md). What the user has set in GLIBC_TUNABLES stays.
    """
    with contextlib.suppress(OSError):
        if sys.executable and TUNABLES not in os.environ and "[madvise]" in THP.read_text():
            ours = {TUNABLES: HUGE_PAGES, MARK: "1"}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ours)


def _environment(trains: bool) -> dict[str, str]:
    """That of a child; one that measures has memory as users' processes have it."""
    own = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    if not trains and MARK in own:
        del own[MARK]
        own.pop(TUNABLES, None)
    return own


class Worker:
    """A child process that runs `python -m module` and answers requests (see `serve`).

    cpus: the CPUs the child and its threads are pinned to (where the system can pin).
    log: file for what the child prints and for its tracebacks; by default they are dropped with it.
    via: makes the command, and what is written to it first, of a start document for `_enter`; with any other than
    `here` the child is on another machine. It then ends at the end of its input or after SILENCE_S without a byte,
    and gets a blank line every BEAT_S; `pause`, `resume` and `pid` are those of the command and of no use.
    waiting: called with the seconds waited for an answer and the most there are, after TOLD_S and every TOLD_AGAIN_S.
    trains: keeps this process's huge pages.

    The child runs in a session of its own, so the terminal's Ctrl-C does not reach it. On Linux the
    kernel kills it when the thread that created the Worker ends: create it in a thread that stays.
    What it has started goes with it, as long as it stays in its process group. An exception in the
    child leaves it usable; after a crash, a time-out, an answer that is none or an interrupted call it
    is gone and every further call raises the same WorkerError.

    Raises WorkerError where no process can be started here, OSError where `via`'s command cannot be.
    """

    def __init__(
        self,
        module: str,
        cpus: list[int] | None = None,
        log: Path | None = None,
        via: Callable[[dict[str, Any]], tuple[list[str], bytes]] = here,
        waiting: Callable[[float, float], None] | None = None,
        trains: bool = False,
    ):
        distant = via is not here
        command, opening = via({"module": module, "cpus": cpus, "distant": distant})
        self.last_words = ""  # the last line the child printed, once it has ended by itself
        self._ended: str | None = None  # why no call can succeed any more
        self._waiting = waiting or (lambda *_: None)
        self._ready = False
        self._received = b""
        with disk_errors(log.parent if log else temporary_folder()):
            self._printed = log.open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115
        self._selector = selectors.DefaultSelector()
        self._life: int | None = None  # a file descriptor that is ready once the child has ended
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                env=_environment(trains),
                start_new_session=True,
            )
        except OSError as error:
            self._printed.close()
            self._selector.close()
            if distant:
                raise
            raise WorkerError(f"no process can be started: {error.strerror}") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        try:
            self._selector.register(self._output, selectors.EVENT_READ)
            with contextlib.suppress(AttributeError, OSError):  # only Linux has it
                self._life = os.pidfd_open(self.pid)
                self._selector.register(self._life, selectors.EVENT_READ)
            if distant:
                self._write(opening)
                threading.Thread(target=self._beat, daemon=True).start()
        except BaseException:
            self._end("interrupted")
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    @property
    def alive(self) -> bool:
        if self._ended is not None:
            return False
        if not hasattr(os, "waitid"):
            return self._process.poll() is None
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # its number stays its own
        except ChildProcessError:  # SIGCHLD is ignored: the system has forgotten it
            return False
        return ended is None

    def call(self, method: str, timeout_s: float, **args: Any) -> dict[str, Any]:
        """Runs a method of the child and returns its answer; WorkerError says why there is none."""
        try:
            self.send(method, **args)
            return self.receive(timeout_s)
        except KeyboardInterrupt:
            self._end("interrupted")  # also between the two
            raise

    def send(self, method: str, **args: Any) -> None:
        """First half of `call`: the child works while the caller does something else."""
        if self._ended:
            raise WorkerError(self._ended)
        self._write(_line({"method": method, "args": args}))

    def receive(self, timeout_s: float, told: Callable[..., None] | None = None) -> dict[str, Any]:
        """Second half of `call`. told: called with what the method tells meanwhile (`tell`); timeout_s starts again.

        Raises DiskFull where that is what the method met.
        """
        try:
            self._await_ready(timeout_s)
            while "told" in (answer := self._answer(timeout_s)):
                if told:
                    told(*answer["told"])
        except WorkerError:
            raise
        except BaseException:
            self._end("interrupted")  # its answer would be taken for the next one's
            raise
        if "full" in answer:
            raise DiskFull(".", told=answer["full"])
        if "error" in answer:
            raise WorkerError(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def pause(self) -> None:
        """Stops the child (SIGSTOP) until `resume`; nothing to do for a dead one."""
        with contextlib.suppress(WorkerError):
            self._await_ready(START_S)  # before that it could outlive the parent
            self._signal(signal.SIGSTOP)
            if self.alive and hasattr(os, "waitid"):  # a busy machine stops it some time later
                os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kills the child and what it has started."""
        self._end("closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _write(self, data: bytes) -> None:
        try:
            self._input.write(data)
            self._input.flush()
        except BrokenPipeError:
            pass  # receive() knows why
        except KeyboardInterrupt:
            self._end("interrupted")  # the next request would go on from half of this one
            raise

    def _beat(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # its end
            while self._ended is None:
                self._input.write(b"\n")
                self._input.flush()
                time.sleep(BEAT_S)

    def _await_ready(self, timeout_s: float) -> None:
        """Reads the greeting the child sends once it is bound to its parent, and what a login shell printed before."""
        deadline = time.monotonic() + timeout_s
        while not self._ready:
            self._ready = self._read(timeout_s, deadline).endswith(GREETING)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        line = self._read(timeout_s, time.monotonic() + timeout_s)
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(line)
            kinds = {"result": dict, "error": str, "full": str, "told": list}
            if isinstance(answer, dict) and len(answer) == 1:
                [(key, value)] = answer.items()
                if isinstance(value, kinds.get(key, ())):
                    return answer
        raise WorkerError(self._end(f"answered with what is no answer: {line[:100].decode(errors='replace')!r}"))

    def _read(self, timeout_s: float, deadline: float) -> bytes:
        """Blocks until one whole line has come, until the deadline; timeout_s is told."""
        if self._ended:
            raise WorkerError(self._ended)
        source, begun, told_at = self._output.fileno(), time.monotonic(), TOLD_S
        while b"\n" not in self._received:
            waited = time.monotonic() - begun
            left = deadline - begun - waited
            ready = [key.fd for key, _ in self._selector.select(max(0, min(left, told_at - waited)))]
            if not ready and left > told_at - waited:
                self._waiting(told_at, deadline - begun)
                told_at += TOLD_AGAIN_S
                continue
            if left < 0 or not ready:
                raise WorkerError(self._end(f"no answer in {timeout_s:.3g} s"))
            data = os.read(source, 1 << 16) if source in ready else b""  # of a dead child another may hold the pipe
            if not data:
                raise WorkerError(self._end(self._why_it_ended()))
            self._received += data
            if len(self._received) > LONGEST:
                raise WorkerError(self._end(f"an answer of more than {LONGEST >> 20} MB"))
        line, self._received = self._received.split(b"\n", 1)
        return line

    def _why_it_ended(self) -> str:
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe and kept running"
        self._printed.seek(max(0, self._printed.seek(0, os.SEEK_END) - 10 * REASON_LENGTH))
        lines = self._printed.read().decode(errors="replace").split("\n")
        self.last_words = next((_one_line(line) for line in reversed(lines) if line.strip()), "")
        disk = os.fstatvfs(self._printed.fileno())
        if not self.last_words and disk.f_bavail * disk.f_frsize < FULL_BELOW:
            self.last_words = "No space left on device for what it prints"
        last = f": {self.last_words}" if self.last_words else ""
        if code >= 0:
            return f"exited with {code}{last}"
        hint = "; often means out of memory" if code == -signal.SIGKILL else ""
        return f"killed by signal {-code} ({signal.Signals(-code).name}{hint}){last}"

    def _end(self, reason: str) -> str:
        """Kills the child if it still lives, and its group; further calls raise with the first reason given."""
        if self._ended is None:
            self._ended = reason
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
                self._process.wait(EXIT_S)
            self._selector.close()
            if self._life is not None:
                os.close(self._life)
            self._output.close()
            with contextlib.suppress(BrokenPipeError):  # flushes
                self._input.close()
            self._printed.close()
        return reason


def serve(methods: dict[str, Callable[..., dict[str, Any] | None]]) -> None:
    """Child side: answers the parent's requests, one at a time, until the parent is gone.

    A method gets the request's arguments by name and returns something JSON can carry; what it raises
    becomes the reason of the parent's WorkerError. Methods may print: it goes to the worker's log.
    """
    for line in _requests:
        request = json.loads(line)
        try:
            answer = _line({"result": methods[request["method"]](**request["args"]) or {}})
        except Exception as error:
            with contextlib.suppress(OSError):  # its disk may be full
                traceback.print_exc()
            if is_full(error):
                answer = _line({"full": str(_disk_full(error, request["args"]))})
            else:
                answer = _line({"error": _one_line(f"{type(error).__name__}: {error}")})
        _answer(answer)


def _disk_full(error: Exception, args: dict[str, Any]) -> DiskFull:
    """What a method met; its arguments are paths, among others, and it may have printed."""
    if isinstance(error, DiskFull):
        return error
    paths = [Path(value).absolute() for value in args.values() if isinstance(value, str) and os.sep in value]
    folders = [path.parent for path in paths if path.parent.is_dir()]
    named = getattr(error, "filename", None)
    return DiskFull(Path(named).parent if named else fullest(*folders, temporary_folder()), error=error)


def tell(*values: Any) -> None:
    """Child side, within a method: something JSON can carry, for the parent to know before the answer."""
    _answer(_line({"told": values}))


_requests: Iterable[bytes]
_answers: BinaryIO


def _answer(line: bytes) -> None:
    _answers.write(line)
    _answers.flush()


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _enter() -> None:
    """What a child does first: before this, its module's imports could print into the protocol."""
    global _requests, _answers
    start = json.loads(sys.argv[1])
    die_with_parent()
    if sys.platform == "linux":
        if os.getpgid(0) == os.getpid() and start["parent"] != 1:  # the end of process 1 ends all others
            _guard(os.getpid())
        with contextlib.suppress(OSError):  # some containers forbid it
            Path("/proc/self/oom_score_adj").write_text("1000")  # kill this process, not the search
    if os.getppid() != start["parent"]:
        sys.exit("the parent died")
    if start["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, start["cpus"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an expected answer
    requests = os.dup(0)
    _requests = _watched(requests) if start["distant"] else os.fdopen(requests, "rb")
    _answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    _answer(GREETING + b"\n")
    runpy.run_module(start["module"], run_name="__main__", alter_sys=True)


def _guard(group: int) -> None:
    """Forks a process that kills the rest of this one's group once this one has ended, however that came."""
    if os.fork():
        return
    os.setpgid(0, 0)
    os.closerange(0, 64)  # its end must be seen
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() == group:
        signal.sigwait({signal.SIGUSR1})
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def _watched(source: int) -> Iterator[bytes]:
    """Lines of a file descriptor, but for blank ones; its end, or SILENCE_S without a byte, ends this process.

    A thread reads, so that this also happens in the middle of a request.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def watch() -> None:
        pieces: list[bytes] = []
        while select.select([source], [], [], SILENCE_S)[0] and (data := os.read(source, 1 << 16)):
            *ends, rest = data.split(b"\n")
            for end in ends:
                lines.put(b"".join([*pieces, end]))
                pieces = []
            pieces.append(rest)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    return filter(None, iter(lines.get, None))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _one_line(text: str) -> str:
    text = NATIVE.sub("", " ".join(text.split()))
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."
