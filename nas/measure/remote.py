"""A device of another machine, `ssh://[user@]host[:port][/cuda]`: measured by an agent there, over plain OpenSSH.

There has to be Python 3.11 and the runtime; vitnas' own modules are sent along. One connection per machine serves all
that is asked of it here. It ends with this process, and with it everything that was started on the other machine. A
connection that is lost in the middle of a measurement is a `LinkLost`; whatever is asked next connects again.

VITNAS_SSH: the ssh command, for options of its own ("ssh -F config"). VITNAS_REMOTE_PYTHON: the Python of the other
machine, python3 by default; a path is absolute or starts in the user's home ("venv/bin/python").
"""

import atexit
import base64
import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import re
import shlex
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import nas
from nas.errors import DiskFull, UserError
from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.samples import MAX_ROUNDS, PRECISION, MeasureError, Measurement
from nas.process import ENTER, Worker, WorkerError

T = TypeVar("T")
_log = logging.getLogger(__name__)

SCHEME = "ssh://"
DEVICE = re.compile(
    r"ssh://((?P<user>[\w.+][\w.+-]*)@)?(?P<host>[\w.][\w.-]*|\[[\w:.%]+\])(:(?P<port>\d{1,5}))?(/(?P<kind>cpu|cuda)?)?",
    re.ASCII,
)
AGENT = "nas.measure.agent"
PACKAGES = ("nas", "search_spaces")  # what is sent of vitnas
SSH_OPTIONS = shlex.split(  # no question, no terminal; not the master of the user's own connections, as it is killed
    "-T -o BatchMode=yes -o ControlMaster=no -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3"
)
SSH_FAILED, NO_COMMAND, TOO_OLD = 255, (126, 127), 65  # exit codes: ssh's, the shell's, ours
CONNECT_S = 60  # until the agent greets
ASK_S = 60  # importing a runtime, on a slow board
GRACE_S = 30  # beyond the agent's own limit
PIECE = 1 << 20  # bytes of a file in one request
PIECE_S = 300
TRIES = 3  # of what can be done again
RECONNECT_S = (0, 1, 2, 5, 10, 20, 40)  # pauses before the tries of a lost connection

# One line each, for any shell and any Python: the first reads and runs the second.
GREET = (
    f"import sys;sys.version_info<(3,11)and(sys.stderr.write(sys.version.split()[0]),sys.exit({TOO_OLD}));"
    'exec(open(0,"rb",0,closefd=False).readline())'
)
UNPACK = """
import io, json, os, shutil, signal, subprocess, sys, tempfile, time, zipfile

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: sys.exit(1))
folder = tempfile.mkdtemp(prefix="vitnas-agent-")
try:
    pieces = []
    while size:
        pieces.append(os.read(0, min(size, 1 << 16)))
        size -= len(pieces[-1])
        if not pieces[-1]:
            sys.exit("the connection ended early")
    zipfile.ZipFile(io.BytesIO(b"".join(pieces))).extractall(folder)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-c", enter, json.dumps(dict(start, parent=os.getpid()))]
    agent = subprocess.Popen(command, cwd=folder, env=dict(os.environ, PYTHONPATH=path))
    try:
        code = agent.wait()
    finally:
        agent.kill()
finally:
    for _ in range(50):  # a process that is being killed may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.1)
sys.exit(code if code >= 0 else 128 - code)
"""


class LinkLost(MeasureError):
    """The connection to the other machine ended before the answer came."""


class Unreachable(UserError):
    """ssh did not get through."""


@dataclass(frozen=True)
class SshHost:
    """The machine that ssh connects to."""

    user: str | None
    host: str
    port: int | None

    def __str__(self) -> str:
        return f"{self.login}:{self.port}" if self.port else self.login

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    def ssh(self, *options: str) -> list[str]:
        """The words of the ssh command up to what it is to run."""
        port = ["-p", str(self.port)] if self.port else []
        return [*_words("VITNAS_SSH", "ssh"), *options, *port, "--", self.login]


def is_remote(device: str) -> bool:
    return device.startswith(SCHEME)


def parse(device: str) -> tuple[SshHost, str]:
    """The target and the kind of device there, "cpu" or "cuda"; UserError where it is not of the module's form."""
    match = DEVICE.fullmatch(device)
    if match is None:
        login, at, _ = device.removeprefix(SCHEME).rpartition("@")
        if at and ":" in login:
            raise UserError("device ssh://...: leave out the password, set up a key and give ssh://user@host")
        raise UserError(f"device {device!r} is not of the form ssh://[user@]host[:port][/cuda]")
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"device {device!r}: port {port} is not one of 1 to 65535")
    return SshHost(match["user"], match["host"].strip("[]"), port), match["kind"] or "cpu"


class Connection:
    """One ssh process and the agent at its other end; raises UserError, or Unreachable, where there is none."""

    def __init__(self, target: SshHost):
        self.target = target
        self._sent: set[str] = set()
        try:
            self._worker = Worker(AGENT, via=self._command)
        except OSError as error:
            raise UserError(f"{target.ssh()[0]} cannot be run ({error.strerror}): install an OpenSSH client") from None
        try:
            self._worker.call("default_threads", CONNECT_S)
        except WorkerError as error:
            self.close()
            raise self._no_agent(str(error)) from None

    @property
    def alive(self) -> bool:
        return self._worker.alive

    def close(self) -> None:
        self._worker.close()

    def call(self, method: str, limit_s: float, told: Callable[..., None] | None = None, **args: Any) -> Any:
        """What the agent's method returns. Raises LinkLost, and the method's own UserError or MeasureError."""
        try:
            self._worker.send(method, **args)
            answer = self._worker.receive(limit_s, told)
        except DiskFull as error:
            raise DiskFull(".", told=f"{self.target}: {error}") from None
        except WorkerError as error:
            if self.alive:
                raise MeasureError(f"{self.target}: {error}") from None
            raise LinkLost(f"the connection to {self.target} was lost: {error}") from None
        if "refused" in answer:
            raise UserError(f"{self.target}: {answer['refused']}")
        if "failed" in answer:
            raise MeasureError(answer["failed"])
        return answer["value"]

    @contextlib.contextmanager
    def files(self, paths: Iterable[Path]) -> Iterator[list[str]]:
        """Names of copies on the other machine, there until the context ends; equal contents are sent once."""
        sent, names = [], []
        try:
            for path in paths:
                with path.open("rb") as file:
                    name = hashlib.file_digest(file, "sha256").hexdigest() + path.suffix
                    if name not in self._sent:
                        self._sent.add(name)
                        sent.append(name)
                        self._send(file, name)
                names.append(name)
            yield names
        finally:
            self._sent.difference_update(sent)
            with contextlib.suppress(MeasureError):
                if self.alive:
                    self.call("drop", ASK_S, names=sent)

    def _send(self, file: BinaryIO, name: str) -> None:
        file.seek(0)
        self.call("put", PIECE_S, name=name, data="")
        while data := file.read(PIECE):
            self.call("put", PIECE_S, name=name, data=base64.b64encode(data).decode())

    def _command(self, start: dict[str, Any]) -> tuple[list[str], bytes]:
        modules = _packed()
        given = {"size": len(modules), "start": start, "enter": ENTER}
        opening = f"exec({UNPACK!r}, {given!r})\n".encode() + modules
        return [*self.target.ssh(*SSH_OPTIONS), shlex.join([*_python(), "-c", GREET])], opening

    def _no_agent(self, reason: str) -> UserError:
        code, words, python = self._worker.exit_code, self._worker.last_words, shlex.join(_python())
        if code == SSH_FAILED:
            return Unreachable(
                f"no connection to {self.target}: {words or reason}; "
                f"this has to work, without a password: {shlex.join(self.target.ssh())} true"
            )
        other = "VITNAS_REMOTE_PYTHON names another (venv/bin/python)"
        if code in NO_COMMAND:
            return UserError(f"{self.target} has no {python}: install Python 3.11 or newer there; {other}")
        if code == TOO_OLD:
            return UserError(f"{self.target}: {python} is Python {words}, 3.11 or newer is needed; {other}")
        return UserError(f"{self.target}: {python} {reason}; {other}")


class Machine:
    """Another machine: its connection, made when it is needed, and the devices that are locked there."""

    def __init__(self, target: SshHost):
        self._target = target
        self._connection: Connection | None = None
        self._locks: set[str] = set()

    def connection(self) -> Connection:
        """The live one, or a new one: UserError where there is none to be had, after several tries if there was one."""
        if self._connection is None:
            self._connection = Connection(self._target)
        elif not self._connection.alive:
            self._connection.close()
            self._connection = self._again()
        return self._connection

    def retried(self, action: Callable[[Connection], T]) -> T:
        """What the action returns; it is done again on a new connection where one is lost, UserError after TRIES."""
        tries = 0
        while True:
            try:
                return action(self.connection())
            except LinkLost as error:
                tries += 1
                if tries == TRIES:
                    raise UserError(f"{error}; tried {TRIES} times") from None

    def retried_for_user(self, action: Callable[[Connection], T]) -> T:
        """As `retried`, but a measurement that fails is a UserError as well."""
        try:
            return self.retried(action)
        except MeasureError as error:
            raise UserError(str(error)) from None

    def ask(self, method: str, limit_s: float = ASK_S, **args: Any) -> Any:
        return self.retried_for_user(lambda connection: connection.call(method, limit_s, **args))

    def acquire(self, kind: str, timeout_s: float) -> bool:
        held: bool = self.ask("acquire", timeout_s + GRACE_S, kind=kind, timeout_s=timeout_s)
        if held:
            self._locks.add(kind)
        return held

    def release(self, kind: str) -> None:
        self._locks.discard(kind)
        with contextlib.suppress(MeasureError):  # a lost connection has released it
            if self._connection and self._connection.alive:
                self._connection.call("release", ASK_S, kind=kind)

    def close(self) -> None:
        if self._connection:
            self._connection.close()

    def _again(self) -> Connection:
        for tries, pause_s in enumerate(RECONNECT_S):
            if tries == 1:
                _log.warning("the connection to %s was lost; trying for a while", self._target)
            time.sleep(pause_s)
            try:
                connection = Connection(self._target)
                for kind in self._locks:
                    if not connection.call("acquire", ASK_S, kind=kind, timeout_s=0):
                        _log.warning("%s: another vitnas process measures there now: waiting", self._target)
                        while not connection.call("acquire", ASK_S, kind=kind, timeout_s=GRACE_S):
                            pass
            except (Unreachable, LinkLost) as error:
                last = error
            else:
                return connection
        raise UserError(f"the connection was lost, {len(RECONNECT_S)} tries did not bring it back: {last}")


_machines: dict[SshHost, Machine] = {}


def machine_of(device: str) -> Machine:
    """The machine of a device; all its devices share one."""
    target, _ = parse(device)
    return _machines.setdefault(target, Machine(target))


@atexit.register
def disconnect() -> None:
    """Ends every connection."""
    for machine in _machines.values():
        machine.close()
    _machines.clear()


def there(settings: Settings) -> dict[str, Any]:
    """The settings as the agent takes them."""
    _, kind = parse(settings.device)
    return dataclasses.asdict(settings) | {"device": kind}


class DistantLock:
    """As `nas.lock.DeviceLock`, on the machine of a device; it is let go when the connection ends."""

    def __init__(self, device: str):
        self._machine, self._kind = machine_of(device), parse(device)[1]

    def acquire(self, timeout_s: float) -> bool:
        return self._machine.acquire(self._kind, timeout_s)

    def release(self) -> None:
        self._machine.release(self._kind)


class RemoteMeasurer:
    """As `nas.measure.protocol.Measurer`, whose logs stay on the other machine."""

    def __init__(self, settings: Settings, reference: Path, workdir: Path):
        self._settings = settings
        self._reference = reference
        self._machine = machine_of(settings.device)
        self._connection: Connection | None = None
        self._stack = contextlib.ExitStack()  # of this connection
        self._id = f"measurer-{id(self)}"

    def __enter__(self) -> Self:
        try:
            self._machine.retried(self._open)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> None:
        with contextlib.suppress(LinkLost):  # measure() connects again
            if self._connection and self._connection.alive:
                self._connection.call("prepare", ASK_S, measurer=self._id)

    def measure(
        self,
        path: Path,
        budget_ms: float | None = None,
        timeout_s: float | None = None,
        pause: Sequence[Worker] = (),
        batch_size: int | None = None,
        precision: float = PRECISION,
        computed_in: str | None = None,
    ) -> Measurement:
        """As there, but raises LinkLost too, and UserError where a lost connection does not come back.

        pause: not stopped, as they run elsewhere. timeout_s does not count the file's way; load_s and wall_s do.
        """
        timeout_s = timeout_s or RUNTIMES[self._settings.runtime].patience_s
        started = time.monotonic()
        connection = self._machine.connection()
        if connection is not self._connection:
            self._open(connection)
        with connection.files([path]) as [name]:
            limits: dict[str, Any] = {"budget_ms": budget_ms, "timeout_s": timeout_s, "batch_size": batch_size}
            limits |= {"precision": precision, "computed_in": computed_in}
            fields = connection.call("measure", timeout_s + GRACE_S, measurer=self._id, name=name, **limits)
        result = Measurement.from_dict(fields)
        wall_s = time.monotonic() - started
        result.load_s += wall_s - result.wall_s
        result.wall_s = wall_s
        return result

    def _open(self, connection: Connection) -> None:
        self._stack.close()
        [reference] = self._stack.enter_context(connection.files([self._reference]))
        settings = there(self._settings)
        limit_s = RUNTIMES[self._settings.runtime].patience_s + GRACE_S
        connection.call("open", limit_s, measurer=self._id, settings=settings, reference=reference)
        self._stack.callback(self._close, connection)
        self._connection = connection

    def _close(self, connection: Connection) -> None:
        with contextlib.suppress(MeasureError):
            if connection.alive:
                connection.call("close", ASK_S, measurer=self._id)


def compare(
    paths: Mapping[str, Path],
    settings: Settings | Mapping[str, Settings],
    rounds: int = MAX_ROUNDS,
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float | None = None,
    waiting: Callable[[str, float, float], None] = lambda *_: None,
) -> dict[str, Measurement | MeasureError]:
    """As `nas.measure.protocol.compare`, but Ctrl-C loses the rounds made.

    It begins again where the connection is lost, UserError at the third time.
    """
    own = settings if isinstance(settings, Mapping) else dict.fromkeys(paths, settings)
    if not paths:
        return {}
    per_round_s = sum(timeout_s or RUNTIMES[own[name].runtime].patience_s for name in paths) + GRACE_S

    def told(*what: Any) -> None:
        if what[0] == "waiting":
            waiting(*what[1:])
        elif progress:
            progress(*what)

    def attempt(connection: Connection) -> dict[str, Measurement | MeasureError]:
        with connection.files(paths.values()) as names:
            answers = connection.call(
                "compare",
                per_round_s,
                told,
                names=dict(zip(paths, names, strict=True)),
                settings={name: there(own[name]) for name in paths},
                rounds=rounds,
                timeout_s=timeout_s,
            )
        return {
            name: MeasureError(answer["failed"]) if "failed" in answer else Measurement.from_dict(answer["value"])
            for name, answer in answers.items()
        }

    return machine_of(next(iter(own.values())).device).retried_for_user(attempt)


def _python() -> list[str]:
    first, *words = _words("VITNAS_REMOTE_PYTHON", "python3")
    return [re.sub("^~/", "./", first), *words]  # the quoted ~ would stay one; ssh starts at home


def _words(variable: str, otherwise: str) -> list[str]:
    """The command that a variable of the environment names, word by word.

    Raises:
        UserError: a quotation in it does not end.
    """
    try:
        return shlex.split(os.environ.get(variable, "")) or [otherwise]
    except ValueError as error:
        raise UserError(f"{variable} is no command ({str(error).lower()}): write it as in a shell") from None


def _packed() -> bytes:
    """A zip of our own modules."""
    root = Path(nas.__file__).parents[1]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for package in PACKAGES:
            for module in sorted((root / package).rglob("*.py")):
                archive.write(module, module.relative_to(root))
    return file.getvalue()
