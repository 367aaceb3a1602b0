"""A remote device, on a real sshd: what it measures, and what becomes of it when something goes wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from optuna.samplers import RandomSampler

import nas
from nas import machine, process
from nas.errors import UserError
from nas.intervals import Interval
from nas.lock import ProcessLock, in_turn
from nas.measure import device as measure_device
from nas.measure import remote
from nas.measure.budget import Limits
from nas.measure.device import (
    check_settings,
    compare,
    default_threads,
    device_kind,
    device_label,
    device_lock,
    open_measurer,
)
from nas.measure.hardware import describe, fingerprint
from nas.measure.remote import LinkLost, RemoteMeasurer
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError
from nas.process import Worker, WorkerError
from nas.quality.candidate import Candidate
from nas.quality.tier import Estimate
from nas.search import trial
from nas.search.latency import TrialLatency
from nas.search.log import SearchLog
from nas.search.trial import TrialRunner
from nas.study.trials import open_study
from search_spaces import get_arch

DEVICE = "ssh://board"
SETTINGS = Settings(device=DEVICE)
WORKERS = "nas.measure.worker"
LOCK = "vitnas-cpu.lock"
HOPELESS_MS = 1e-6  # a budget that 3 rounds settle


@pytest.fixture
def server(ssh_server, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """The sshd that DEVICE is on, this Python there; at the end nothing may be left running or lying there."""
    monkeypatch.setenv("VITNAS_SSH", ssh_server.client)
    monkeypatch.setenv("VITNAS_REMOTE_PYTHON", sys.executable)
    yield ssh_server
    remote.disconnect()
    wait(lambda: not ssh_server.processes() and {path.name for path in ssh_server.tmp.glob("vitnas*")} <= {LOCK})


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def network(path: Path, size: int = 8, batch_size: int = 1) -> Path:
    """One convolution."""
    weights = np.random.default_rng(size).standard_normal((16, 3, 3, 3), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch_size, 3, size, size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def files_on(server) -> list[Path]:
    return list(server.tmp.glob("vitnas-agent-*/files/*"))


# --- measuring ---


def test_measures_on_the_other_machine(server, tmp_path: Path) -> None:
    check_settings(SETTINGS)
    reference, slower = network(tmp_path / "reference.onnx"), network(tmp_path / "slower.onnx", 256)
    batch = network(tmp_path / "batch.onnx", batch_size=4)
    with device_lock(DEVICE), open_measurer(SETTINGS, reference, tmp_path) as measurer:
        measurer.prepare()
        pinned = [machine.usable_cpus()[:1]] * 2
        wait(lambda: [worker.cpu_affinity() for worker in server.processes(WORKERS)] == pinned)
        [connection] = server.connections()  # one for all of it
        assert all(connection in worker.parents() for worker in server.processes(WORKERS))
        same, other = measurer.measure(reference), measurer.measure(slower, timeout_s=30)
        assert same.n == sum(map(len, same.reference_rounds_ms)) > 20
        fastest = [min(map(min, rounds)) for rounds in (same.rounds_ms, same.reference_rounds_ms, other.rounds_ms)]
        assert 0.2 < fastest[0] / fastest[1] < 5  # other programs can only add
        assert fastest[2] > 5 * fastest[1]
        assert other.wall_s > other.load_s > 0
        assert measurer.measure(batch, HOPELESS_MS, batch_size=4).n >= 9
        with pytest.raises(MeasureError, match="start with batch size 1"):
            measurer.measure(batch)
        assert len(measurer.measure(slower, HOPELESS_MS).rounds_ms) == 3
        assert [path.suffix for path in files_on(server)] == [".onnx"]  # the reference
    wait(lambda: not server.processes(WORKERS))
    assert not files_on(server)
    assert server.connections() == [connection]


def test_compares_on_the_other_machine(server, tmp_path: Path) -> None:
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(network(tmp_path / "a.onnx").read_bytes()[:100])
    paths = {
        "a": tmp_path / "a.onnx",
        "again": tmp_path / "a.onnx",
        "batch": network(tmp_path / "b.onnx", batch_size=2),
        "torn": torn,
    }
    settings = dict.fromkeys(paths, SETTINGS) | {"batch": Settings(device=DEVICE, batch_size=2)}
    rounds = []
    with device_lock(DEVICE):
        results = compare(paths, settings, 3, lambda *done: rounds.append(done))
    assert rounds == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert list(results) == list(paths)
    assert [len(results[name].rounds_ms) for name in ("a", "again", "batch")] == [3, 3, 3]
    assert isinstance(results["torn"], MeasureError)
    assert "Protobuf parsing failed" in str(results["torn"])
    assert not files_on(server)


def test_a_file_of_several_pieces_arrives_whole(server, tmp_path: Path) -> None:
    content = os.urandom(2 * remote.PIECE + 1)
    (tmp_path / "large.bin").write_bytes(content)
    (tmp_path / "empty.json").write_bytes(b"")
    connection = remote.machine_of(DEVICE).connection()
    with connection.files([tmp_path / "large.bin", tmp_path / "empty.json"]):
        assert {path.suffix: path.read_bytes() for path in files_on(server)} == {".bin": content, ".json": b""}
        with connection.files([tmp_path / "large.bin"]):
            pass
        assert len(files_on(server)) == 2
    assert not files_on(server)


def test_the_other_machine_describes_itself(server) -> None:
    """It is this one, so it has to say the same; but it is a remote device only to us."""
    here, there = Settings(), describe(SETTINGS)
    assert fingerprint(SETTINGS) == fingerprint(here)
    assert there["device"] == "cpu"
    assert there["host"] == DEVICE
    assert set(there) == {*describe(here), "host"}
    assert default_threads(DEVICE) == machine.default_threads()


def test_through_a_jump_host(server) -> None:
    assert default_threads("ssh://behind") == machine.default_threads()
    assert any("ssh -F" in " ".join(p.cmdline()) and "-W" in p.cmdline() for p in psutil.Process().children(True))


def test_a_login_shell_that_prints(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = script(tmp_path / "python", f'printf "welcome\\nno line end"; exec {shlex.quote(sys.executable)} "$@"')
    monkeypatch.setenv("VITNAS_REMOTE_PYTHON", str(shell))
    assert default_threads(DEVICE) == machine.default_threads()


def test_takes_turns_with_whoever_measures_there(server, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(measure_device, "PATIENCE_S", 0.1)
    theirs = ProcessLock(LOCK)
    later, tell = threading.Timer(0.5, theirs.release), measure_device.tell_once
    monkeypatch.setattr(measure_device, "tell_once", lambda line: (tell(line), later.start()))
    with device_lock(DEVICE):
        assert not theirs.acquire(0)
    assert theirs.acquire(0)
    with device_lock(DEVICE):
        later.join()
        assert theirs._file is None
        assert not theirs.acquire(0)
    assert capsys.readouterr().err == f"waiting for another vitnas process that measures on {DEVICE}\n"


def test_a_trial_holds_the_board_while_it_is_measured_and_this_machine_while_it_trains(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = ProcessLock(LOCK)
    monkeypatch.setenv("VITNAS_LOCKS", str(tmp_path))  # those of this machine; the board's stay where they were
    here, seen = ProcessLock(LOCK), []

    def look(when: str) -> None:
        seen.append((when, *(each.acquire(0) for each in (board, here))))
        board.release()
        here.release()

    def latency(_: str) -> TrialLatency:
        look("measures")
        return TrialLatency.read({"latency_ms": 1.0, "throughput": 1.0})

    def train(*_: object) -> Estimate:
        for _ in in_turn([1]):
            look("trains")
        return Estimate.within(50.0, 1.0, Interval(48.0, 52.0))

    monkeypatch.setattr(trial, "suggest", lambda *_: Candidate(get_arch("shvit_s1")))
    trainer = SimpleNamespace(alone=nullcontext)
    tier = SimpleNamespace(name="train", trained=True, estimate=train, predict=train, trainer=trainer)
    request = SimpleNamespace(settings=SETTINGS, budget_ms=2.0, limits=Limits(), folder=tmp_path, trials=9)
    runner = TrialRunner(request, open_study("s", tmp_path / "j", {"a": 1}, RandomSampler()), tier)
    monkeypatch.setattr(runner, "_known", latency)
    runner.trial(SearchLog("now"))
    assert seen == [("measures", False, True), ("trains", True, False)]


# --- a connection that ends ---


def test_a_lost_link_is_a_failed_measurement_and_the_next_one_works(server, tmp_path: Path, monkeypatch) -> None:
    reference, slow = network(tmp_path / "reference.onnx"), network(tmp_path / "slow.onnx", 1024)
    theirs = ProcessLock(LOCK)
    with device_lock(DEVICE), open_measurer(SETTINGS, reference, tmp_path) as measurer:
        first = server.processes()
        [worker] = server.processes(WORKERS)
        agent, asked = worker.parent(), worker.num_ctx_switches()

        def cut() -> None:
            """While the networks take turns; the agent is stopped, so it cannot end them before."""
            wait(lambda: len(files_on(server)) == 2 and worker.num_ctx_switches() != asked)
            agent.suspend()
            server.cut()
            agent.resume()

        cutter = threading.Thread(target=cut)
        cutter.start()
        with pytest.raises(LinkLost, match=r"the connection to board was lost: exited with 255: .*closed") as error:
            measurer.measure(slow)
        cutter.join()
        assert "\n" not in str(error.value)
        psutil.wait_procs(first, 60)
        assert not any(process.is_running() for process in first)
        assert theirs.acquire(0)
        theirs.release()
        assert len(measurer.measure(reference, HOPELESS_MS).rounds_ms) == 3
        assert not theirs.acquire(0)  # the lock is held again
        server.cut()
        measurer.prepare()
        wait(lambda: not server.processes())
        assert (
            len(measurer.measure(reference, HOPELESS_MS).rounds_ms) == 3
        )  # lost while nothing was asked: nobody's trial fails


def test_a_comparison_begins_again(server, tmp_path: Path) -> None:
    rounds, total = [], 60  # of 30 ms or more: the agent is far from the last when it is cut off

    def progress(done: int, _: int) -> None:
        rounds.append(done)
        if rounds == [0, 1]:
            server.cut()

    results = compare({"a": network(tmp_path / "a.onnx", 256)}, SETTINGS, total, progress)
    assert rounds[-total - 1 :] == list(range(total + 1))
    assert rounds[:2] == [0, 1]
    assert len(rounds) > total + 2
    assert len(results["a"].rounds_ms) == total


def test_a_machine_that_does_not_come_back(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RECONNECT_S", (0, 0.1, 0.1))
    reference = network(tmp_path / "reference.onnx")
    with device_lock(DEVICE), open_measurer(SETTINGS, reference, tmp_path) as measurer:
        server.cut()
        wait(lambda: not remote.machine_of(DEVICE)._connection.alive)
        monkeypatch.setenv("VITNAS_SSH", f"{server.client} -p 1")
        with pytest.raises(
            UserError, match=r"3 tries did not bring it back: no connection to board: .*refused"
        ) as error:
            measurer.measure(reference)
        assert "\n" not in str(error.value)


def test_nothing_outlives_a_killed_search(server, tmp_path: Path) -> None:
    network(tmp_path / "slow.onnx", 1024)
    code = f"""
        from pathlib import Path
        from nas.measure.device import compare, device_lock; from nas.measure.runtime import Settings
        with device_lock({DEVICE!r}):
            compare(dict.fromkeys("ab", Path({str(tmp_path / "slow.onnx")!r})), Settings(device={DEVICE!r}), 1000)
    """
    search = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(Path(nas.__file__).parents[1])},
    )
    wait(lambda: len(server.processes(WORKERS)) == 2)
    time.sleep(0.5)
    assert search.poll() is None
    os.kill(search.pid, signal.SIGKILL)
    search.wait()  # the fixture looks for what is left


def child_with(silence_s: float) -> Callable[[dict], tuple[list[str], bytes]]:
    code = f"from nas import process; process.SILENCE_S = {silence_s}; process._enter()"
    return lambda start: ([sys.executable, "-c", code, json.dumps(start | {"parent": os.getpid()})], b"")


HEARING = """
    import queue, select
    from nas.process import serve

    limits, whole = queue.Queue(), select.select

    def counted(read, write, failed, limit_s):
        limits.put(limit_s)  # the silence begins anew
        return whole(read, write, failed, limit_s)

    select.select = counted
    serve({"hear": lambda: {"limits_s": [limits.get(timeout=50) for _ in range(5)]}})
"""


def test_an_agent_ends_when_it_hears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "child.py").write_text(textwrap.dedent(HEARING))
    monkeypatch.setattr(process, "BEAT_S", 0.05)
    with Worker("child", via=child_with(60)) as worker:
        assert worker.call("hear", 60) == {"limits_s": [60] * 5}
    monkeypatch.setattr(process, "BEAT_S", 100)
    with Worker("child", via=child_with(0.5)) as worker, pytest.raises(WorkerError, match="exited with 0"):
        worker.call("hear", 60)


def test_ctrl_c_while_a_file_is_sent() -> None:
    """Nothing reads it, so the write blocks; what goes on afterwards must not begin with half a request."""
    once_it_writes = "head -c 1 >/dev/null; kill -INT $PPID; exec sleep 100"
    before = psutil.Process().children()
    with pytest.raises(KeyboardInterrupt):
        Worker("any", via=lambda start: (["sh", "-c", once_it_writes], bytes(1 << 20)))
    assert psutil.Process().children() == before


# --- what is refused ---


def script(path: Path, line: str) -> Path:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def refused(*words: str, device: str = DEVICE) -> None:
    with pytest.raises(UserError) as error:
        check_settings(Settings(device=device))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_hosts_that_cannot_be_reached(server, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("no connection to down: ", "Connection refused", f"{server.client} -- down true", device="ssh://down")
    refused("no connection to nobody@board: ", "Permission denied", device="ssh://nobody@board")
    refused("no connection to board:1: ", f"{server.client} -p 1 -- board true", device="ssh://board:1")
    monkeypatch.setenv("VITNAS_SSH", f"{server.client} -o HostName=nowhere.invalid")
    refused("no connection to board: ", "resolve hostname")
    monkeypatch.setenv("VITNAS_SSH", f"{server.client} -o HostKeyAlias=other")
    refused("no connection to board: ", "Host key verification failed")
    monkeypatch.setenv("VITNAS_SSH", "no_such_ssh")
    refused("no_such_ssh cannot be run", "install an OpenSSH client")


def test_hosts_without_a_fitting_python(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITNAS_REMOTE_PYTHON", "no_such_python")
    refused("board has no no_such_python: install Python 3.11", "VITNAS_REMOTE_PYTHON")
    older = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (default)'; exec(sys.argv[2])"
    old = script(tmp_path / "old", f'exec {shlex.quote(sys.executable)} -c "{older}" "$@"')
    monkeypatch.setenv("VITNAS_REMOTE_PYTHON", str(old))
    refused(f"board: {old} is Python 3.9.2, 3.11 or newer is needed")
    monkeypatch.setenv("VITNAS_REMOTE_PYTHON", str(script(tmp_path / "broken", "echo of no use >&2; exit 3")))
    refused("exited with 3: of no use")
    monkeypatch.setenv("VITNAS_REMOTE_PYTHON", f"no_such_python; touch {tmp_path}/injected; true")
    refused("board has no")
    assert not (tmp_path / "injected").exists()


@pytest.mark.parametrize("variable", ["VITNAS_SSH", "VITNAS_REMOTE_PYTHON"])
def test_commands_that_are_none(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, " ")
    assert (remote.SshHost(None, "board", None).ssh()[0], remote._python()) == ("ssh", ["python3"])
    monkeypatch.setenv(variable, "it 'does not end")
    refused(f"{variable} is no command (no closing quotation): write it as in a shell")


def test_modules_from_before_zip_files_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in remote.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        os.utime(tmp_path / package / "__init__.py", (0, 0))  # as of a reproducible build
    monkeypatch.setattr(nas, "__file__", str(tmp_path / "nas" / "__init__.py"))
    with zipfile.ZipFile(io.BytesIO(remote._packed())) as sent:
        assert sent.namelist() == [f"{package}/__init__.py" for package in remote.PACKAGES]


def test_a_host_without_the_runtime(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python has nothing but the standard library, which is enough for the agent to say so."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setenv("VITNAS_REMOTE_PYTHON", str(tmp_path / "bare/bin/python"))
    assert default_threads(DEVICE) == machine.default_threads()
    refused("board: onnxruntime is not installed: pip install onnxruntime")


def test_settings_the_other_machine_cannot_do(server) -> None:
    with pytest.raises(UserError, match="board: threads is 10000: give 1 to"):
        check_settings(Settings(device=DEVICE, threads=10_000))
    with pytest.raises(UserError, match="board: unknown runtime 'xyz'"):
        check_settings(Settings("xyz", DEVICE))


def test_a_reference_that_cannot_be_measured(server, tmp_path: Path) -> None:
    torn = tmp_path / "torn.onnx"
    torn.write_text("not a network")
    with pytest.raises(MeasureError, match=r"reference model: .*Protobuf"):
        open_measurer(SETTINGS, torn, tmp_path).__enter__()
    assert not files_on(server)


@pytest.mark.parametrize(
    ("device", "target", "kind", "label"),
    [
        ("ssh://board", remote.SshHost(None, "board", None), "cpu", "board"),
        (
            "ssh://me@Board.local:2222/cuda",
            remote.SshHost("me", "Board.local", 2222),
            "cuda",
            "me@Board.local-2222-cuda",
        ),
        ("ssh://me@[::1]/cpu", remote.SshHost("me", "::1", None), "cpu", "me@-1-cpu"),
        ("ssh://10.0.0.7/", remote.SshHost(None, "10.0.0.7", None), "cpu", "10.0.0.7"),
    ],
)
def test_devices(device: str, target: remote.SshHost, kind: str, label: str) -> None:
    assert remote.parse(device) == (target, kind)
    assert (device_kind(device), device_label(device)) == (kind, label)


@pytest.mark.parametrize(
    "device",
    [
        "ssh://",
        "ssh://-oProxyCommand=touch",
        "ssh://-l@board",
        "ssh://me@-board",
        "ssh://board;true",
        "ssh://me and@board",
        "ssh://board/tpu",
        "ssh://board:0",
        "ssh://board:99999",
        "ssh://board:x",
        "ssh://board\n",
        "ssh://$(true)@board",
    ],
)
def test_devices_that_are_none(device: str) -> None:
    refused("ssh://", device=device)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(UserError, match="leave out the password, set up a key") as error:
        check_settings(Settings(device="ssh://me:s3cret@board"))
    assert "s3cret" not in str(error.value)


def test_this_machine_needs_no_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITNAS_SSH", "no_such_ssh")
    assert (device_kind("cpu"), device_label("cpu"), default_threads("cpu")) == (
        "cpu",
        "cpu",
        machine.default_threads(),
    )
    assert not isinstance(open_measurer(Settings(), tmp_path / "x.onnx", tmp_path), RemoteMeasurer)
    check_settings(Settings())


@pytest.mark.usefixtures("few_rounds", "small_shvit", "exports_here")
def test_a_search_there_tries_again_what_a_lost_link_cost(server, vitnas, tmp_path: Path, monkeypatch) -> None:
    whole, cut = TrialRunner._timed, []

    def once_cut(*args):
        if not cut:
            cut.append(server.cut())
            raise LinkLost("the connection was lost")
        return whole(*args)

    monkeypatch.setattr(TrialRunner, "_timed", once_cut)
    words = ("--latency-budget", "90ms", "--family", "shvit", "--resolution", "64", "--threads", "1", "--trials", "1")
    code, out, err = vitnas("search", "--device", DEVICE, *words, "--out", str(tmp_path), "--study", "s", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["settings"]["device"] == found["hardware"]["host"] == DEVICE
    assert json.loads((tmp_path / "s" / "hardware.json").read_text())["host"] == DEVICE
    states = [(row["state"], row["source"]) for row in csv.DictReader((tmp_path / "s" / "trials.csv").open())]
    assert states == [("failed", ""), ("complete", "measured")]
    assert any("tried again" in note for note in found["notes"])
    assert found["winner"]["latency_ms"] < 90
