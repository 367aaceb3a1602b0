"""Search workers that are killed, and what must hold of a study afterwards.

Workers are forks of one process that has imported torch and Optuna, so that they start in milliseconds. They run
`nas.search.loop.search` with a stand-in for exporting and measuring; locks, temporary folders, leases and the storage
are real.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psutil
import torch  # noqa: F401  imported before the forks
from optuna.trial import FrozenTrial, TrialState

from nas.measure.runtime import Settings
from nas.measure.samples import Measurement
from nas.search import loop
from nas.search import trial as search_trial
from nas.search.request import SearchRequest
from nas.study import journal, leases
from nas.study import trials as study_trials
from nas.study.storage import open_storage

STUDY = "chaos"
LATENCY_S = 0.02
OPEN_STUDY = study_trials.open_study
GRACE_S = 10
"""The journal's lock of a killed worker; long enough for a live one on a busy machine."""
PR_SET_CHILD_SUBREAPER = 36


class Exporter:
    """Stands in for `nas.export.artifact.Exporter`: a file that holds no network."""

    running = ()

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, network: Any, settings: Settings, stem: Path) -> Path:
        stem.write_bytes(bytes(1000))
        return stem


class Measurer(Exporter):
    """Stands in for `nas.measure.protocol.Measurer`: takes LATENCY_S, says 1 ms."""

    def prepare(self) -> None:
        pass

    def measure(self, path: Path, *_: Any, **__: Any) -> Measurement:
        path.read_bytes()
        time.sleep(LATENCY_S)
        return Measurement([[1.0, 1.0]] * 6, [[1.0, 1.0]] * 6)


def options(out: Path, storage: str | None, trials: int) -> SearchRequest:
    settings = Settings(threads=1)
    return SearchRequest(
        2.0, settings, ("shvit",), trials, None, STUDY, out, storage, "random", None, 10, resolution=64, cache=False
    )


@dataclass(frozen=True)
class Machine:
    """Another machine that a worker pretends to be on."""

    host: str
    clock_s: float = 0.0
    """Its clock's lead over this machine's."""

    def pretend(self) -> None:
        """In the worker's process. The machine has a device of its own."""
        locks = Path(os.environ["VITNAS_LOCKS"], self.host)
        locks.mkdir(exist_ok=True)
        os.environ["VITNAS_LOCKS"] = str(locks)
        leases.host = lambda: self.host
        leases.time = SimpleNamespace(time=lambda: time.time() + self.clock_s, monotonic=time.monotonic)


class Workers:
    """The forks that search one study together. log: what they say. looked_at: the storage where the parent looks."""

    def __init__(self, out: Path, storage: str | None = None, looked_at: str | None = None) -> None:
        self.looked_at = looked_at or storage or out / STUDY / "study.journal"
        self.out, self.storage, self.log = out, storage, out / "log"
        self.pids: list[int] = []
        self.killed: dict[int, datetime] = {}
        search_trial.Exporter, search_trial.open_measurer = Exporter, Measurer
        journal.JOURNAL_LOCK_GRACE_S = GRACE_S
        described = {"busy_share": None}
        loop.write_hardware = lambda *_: described
        study_trials.open_study = self._opened(OPEN_STUDY)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:  # fills the caches that forks share
            loop.search(options(Path(folder), None, 2), lambda _: None, lambda _: None)

    def start(self, trials: int, machine: Machine | None = None) -> int:
        """Start a search, on this machine or as if on another; its process id."""
        return self.fork(lambda: loop.search(options(self.out, self.storage, trials), lambda _: None, print), machine)

    def fork(self, work: Callable[[], object], machine: Machine | None = None) -> int:
        """Start a worker; its process id."""
        pid = os.fork()
        if pid:
            self.pids.append(pid)
            return pid
        if machine:
            machine.pretend()
        code = 1
        try:
            log = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _opened(self, open_study: Callable[..., optuna.Study]) -> Callable[..., optuna.Study]:
        def opened(*args: Any) -> optuna.Study:
            found = open_study(*args)
            (self.out / f"{os.getpid()} has opened").touch()
            return found

        return opened

    def wait_until_open(self) -> None:
        """Until every worker has opened the study: one whose server is away then is refused at once."""
        deadline = time.monotonic() + 60
        while not all((self.out / f"{pid} has opened").exists() for pid in self.pids):
            if time.monotonic() > deadline:
                raise TimeoutError("the workers do not start")
            time.sleep(0.01)

    def kill(self, pid: int) -> bool:
        """Whether it was still alive."""
        self.pids.remove(pid)
        self.killed[pid] = datetime.now()
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def quitters(self) -> list[int]:
        """Exit codes of those that ended by themselves."""
        codes = []
        for pid in list(self.pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.pids.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
        return codes

    def finish(self, timeout_s: float = 300) -> list[int]:
        """Exit codes of all once they have ended."""
        deadline, codes = time.monotonic() + timeout_s, []
        while self.pids and time.monotonic() < deadline:
            codes += self.quitters()
            time.sleep(0.05)
        for pid in list(self.pids):
            self.kill(pid)
            codes.append(-signal.SIGKILL)
        return codes

    def trials(self, study: str = STUDY) -> list[FrozenTrial]:
        return trials_of(self.looked_at, study)


def trials_of(storage: str | Path, study: str = STUDY) -> list[FrozenTrial]:
    """The study's trials now; of a connection that was had for it, nothing is left for forks to share."""
    opened = open_storage(storage, read_only=True)
    try:
        return optuna.load_study(study_name=study, storage=opened).get_trials(deepcopy=False)
    finally:
        if "://" in str(storage):
            opened.engine.dispose()


class Witness:
    """Remembers every trial that was once complete."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}

    def see(self, trials: Sequence[FrozenTrial]) -> None:
        for trial in trials:
            if trial.state == TrialState.COMPLETE:
                self._seen.setdefault(trial.number, _content(trial))

    def faults(self, trials: Sequence[FrozenTrial]) -> dict[str, int]:
        """What is wrong with a study whose last worker has ended, in numbers."""
        now = {t.number: _content(t) for t in trials if t.state == TrialState.COMPLETE}
        retries = Counter(t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs)
        first = [t for t in trials if "retry_of" not in t.user_attrs]
        published = Counter(t.user_attrs["name"] for t in first if "name" in t.user_attrs)
        numbers = Counter(t.number for t in trials)
        owed = [t for t in trials if t.state == TrialState.FAIL and t.user_attrs.get("retry") and t.params]
        return {
            "finished trials lost": sum(now.get(number) != content for number, content in self._seen.items()),
            "left RUNNING": sum(t.state == TrialState.RUNNING for t in trials),
            "duplicates": sum(sum(each.values()) - len(each) for each in (retries, published, numbers)),
            "retries forgotten": sum(t.number not in retries for t in owed),
        }

    @property
    def count(self) -> int:
        return len(self._seen)


def taken_for_dead(trials: Sequence[FrozenTrial], killed: Mapping[int, datetime]) -> int:
    """Trials that were failed as those of dead workers while theirs lived. killed: when, by process id."""
    failed = [t for t in trials if t.user_attrs.get("error") == "worker died" and t.user_attrs.get("lease")]
    return sum(t.datetime_complete < killed.get(t.user_attrs["lease"]["pid"], datetime.max) for t in failed)


def _content(trial: FrozenTrial) -> str:
    return json.dumps([trial.values, trial.params, trial.user_attrs.get("detail")], sort_keys=True)


@contextmanager
def laboratory() -> Iterator[Path]:
    """A folder for runs, with a TMPDIR of its own; orphans of killed workers become this process's children."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    folder = Path(tempfile.mkdtemp(prefix="vitnas-chaos-"))
    for name in ("tmp", "locks", "cache"):
        (folder / name).mkdir()
    before = os.environ.copy()
    os.environ |= {"TMPDIR": f"{folder}/tmp", "VITNAS_LOCKS": f"{folder}/locks", "VITNAS_CACHE": f"{folder}/cache"}
    tempfile.tempdir = None
    try:
        yield folder
    finally:
        for process in survivors(0):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None


def survivors(wait_s: float = 15, known: Sequence[int] = ()) -> list[psutil.Process]:
    """Processes below this one that do not end within a time."""
    deadline = time.monotonic() + wait_s
    while True:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    if process.ppid() == os.getpid() and process.pid not in known:
                        os.waitpid(process.pid, os.WNOHANG)
                elif process.pid not in known:
                    found.append(process)
            except (psutil.NoSuchProcess, ChildProcessError):
                continue
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.1)


KEPT_BY_LIBRARIES = (".ses", "torchinductor_")
"""In TMPDIR, one of each: ONNX Runtime's session file and PyTorch's cache."""


def leftovers(laboratory: Path, run: Path) -> list[str]:
    """Temporary files and folders in TMPDIR and in a run's folder."""
    ours = [path for path in (laboratory / "tmp").iterdir() if not path.name.startswith(KEPT_BY_LIBRARIES)]
    found = [*ours, *(run / "tmp").glob("*"), *run.rglob("*.draft*"), *run.rglob("*.partial")]
    return [str(path.relative_to(laboratory)) for path in found]


def verdict(name: str, faults: dict[str, int], told: str, log: Callable[[], str] = lambda: "") -> bool:
    """Print the figures of a part; whether all is well."""
    good = not any(faults.values())
    print(f"{name}: {told}; " + ", ".join(f"{n} {what}" for what, n in faults.items()), flush=True)
    if not good:
        print(log(), file=sys.stderr)
    return good


def moment(longest_s: float) -> None:
    """Let a random time pass."""
    time.sleep(random.uniform(0, longest_s))
