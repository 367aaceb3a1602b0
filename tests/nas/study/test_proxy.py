"""Storages behind `vitnas storage serve`: its lock, its end and return, and what it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from forked import Forked
from optuna.exceptions import StorageInternalError
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from postgres import Server

import nas
from nas.errors import UserError
from nas.study import patient
from nas.study.database import EXCLUSIVE_SQL
from nas.study.exclusive import exclusive, open_proxy
from nas.study.storage import alone, open_storage
from nas.study.trials import ask, enqueue, finish, open_study, remaining, sweep

pytest.importorskip("grpc", reason="grpcio is missing: proxies not tested")
Proxied = Callable[..., contextlib.AbstractContextManager[str]]
HOLDER = """
import sys, time
from pathlib import Path
from nas.study.storage import alone, open_storage
def decide():
    Path(sys.argv[2]).touch()
    time.sleep(60)
alone(open_storage(sys.argv[1]), decide)
"""


def start(storage: str | Path) -> optuna.Study:
    return open_study("s", storage, {}, RandomSampler())


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        threading.Event().wait(0.01)
    pytest.fail(f"{path} does not come")


@pytest.fixture
def served(proxied: Proxied, tmp_path: Path) -> Iterator[str]:
    with proxied(tmp_path / "study.journal") as url:
        yield url


# ---------------------------------------------------------------------------------- the lock


@pytest.mark.parametrize("beside", [False, True], ids=["through the proxy", "on the journal itself"])
def test_decisions_of_two_processes_exclude_each_other_and_a_killed_one_ends(
    served: str, tmp_path: Path, beside: bool
) -> None:
    other = open_storage(tmp_path / "study.journal" if beside else served)
    holder = Forked(HOLDER, served, str(tmp_path / "held"))
    wait_for(tmp_path / "held")
    decided = threading.Event()
    waiter = threading.Thread(target=alone, args=(other, decided.set), daemon=True)
    waiter.start()
    assert not decided.wait(0.3)
    holder.kill()
    assert decided.wait(30)
    waiter.join()


def test_a_call_of_a_turn_that_is_over_is_refused(served: str) -> None:
    study = start(served)
    proxy = study._storage._storage
    with proxy.hold():
        proxy.set_study_user_attr(study._study_id, "key", 1)
        token = proxy._turn.token
    with exclusive(served):
        proxy._turn.token = token
        with pytest.raises(StorageInternalError, match="the turn to decide was lost") as error:
            proxy.set_study_user_attr(study._study_id, "key", 2)
    proxy._turn.token = None
    assert patient.is_lost(error.value)
    assert study.user_attrs["key"] == 1


def test_a_lock_that_is_not_given_up_is_one_line(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.study import serve

    monkeypatch.setattr(serve, "EXCLUSIVE_TIMEOUT_S", 0.05)
    with exclusive(served), pytest.raises(UserError, match="another process keeps the study's storage locked"):
        alone(open_storage(served), lambda: None)
    alone(open_storage(served), lambda: None)


def test_optunas_own_server_has_no_lock(tmp_path: Path) -> None:
    from optuna.storages._grpc.server import make_server

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = make_server(open_storage(tmp_path / "j"), "127.0.0.1", port)
    server.start()
    with pytest.raises(UserError, match="has no lock: start it with `vitnas storage serve`"):
        start(f"grpc://127.0.0.1:{port}")
    server.stop(None)


# ------------------------------------------------------------------- a proxy that goes away


def test_every_call_of_a_search_outlasts_an_outage(
    proxied: Proxied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, said = contextlib.ExitStack(), []
    url = stack.enter_context(proxied(tmp_path / "j"))
    port = int(url.rpartition(":")[2])

    def tell(line: str) -> None:
        said.append(line)
        if "is away" in line:
            stack.enter_context(proxied(tmp_path / "j", port))

    monkeypatch.setattr(patient, "tell", tell)
    monkeypatch.setattr(patient, "PAUSES_S", (0.01, 0.1))
    study = start(url)
    called: dict[str, Any] = {}

    def away(name: str, call: Callable[[], Any]) -> Any:
        stack.close()
        called[name] = call()
        return called[name]

    with stack:
        away("remaining", lambda: remaining(study, 3))
        away("enqueue", lambda: enqueue(study, {"width": 5}, {}, {"width": range(7)}))
        trial = away("ask", lambda: ask(study))
        away("suggest", lambda: trial.suggest_int("width", 0, 6))
        away("finish", lambda: finish(study, trial, 70.0, 500.0, -0.1, {"latency_ms": 1.0}))
        dead = ask(study)
        dead.suggest_int("width", 0, 6)
        dead.set_user_attr("lease", {**dead.user_attrs["lease"], "started": -100})
        away("sweep", lambda: sweep(study))
        assert called["suggest"] == 5
        assert called["finish"] is True
        assert called["sweep"] == [1]
        assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert len(said) == 12
    assert all(re.match(f"the storage proxy {url} is away ", line) for line in said[::2])
    assert all(re.fullmatch(r"the storage proxy is back after \d+ s", line) for line in said[1::2])


def test_decision_is_taken_again_if_the_proxy_goes_in_it(
    proxied: Proxied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "PAUSES_S", (0.01, 0.1))
    stack = contextlib.ExitStack()
    url = stack.enter_context(proxied(tmp_path / "j"))
    study, attempts = start(url), []

    def decide() -> int:
        attempts.append(len(study.user_attrs))
        study.set_user_attr(f"attempt {len(attempts)}", 0)
        if len(attempts) == 1:
            stack.close()
            stack.enter_context(proxied(tmp_path / "j", int(url.rpartition(":")[2])))
            study.set_user_attr("without the lock", 0)
        return len(attempts)

    with stack:
        assert alone(study._storage, decide) == 2
        assert set(study.user_attrs) == {"vitnas", "attempt 1", "attempt 2"}
    assert attempts == [1, 2]


def test_a_database_lost_behind_the_proxy_is_waited_for(
    proxied: Proxied, postgres_server: Server, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def tell(line: str) -> None:
        said.append(line)
        if not postgres_server.running:
            postgres_server.start()

    monkeypatch.setattr(patient, "tell", tell)
    monkeypatch.setattr(patient, "PAUSES_S", (0.01, 0.1))
    taken = ["SET lock_timeout = '50ms'", EXCLUSIVE_SQL["postgresql"][1]]
    with proxied(postgres_url) as url:
        study = start(url)
        postgres_server.stop()
        trial = ask(study)
        postgres_server.stop()
        trial.suggest_int("width", 0, 6)
        assert finish(start(postgres_url), trial, 70.0, 500.0, -0.1, {})
        monkeypatch.setitem(EXCLUSIVE_SQL, "postgresql", taken)
        with (  # those on the database itself take turns with the proxy's
            exclusive(postgres_url),
            pytest.raises(StorageInternalError, match="lock timeout"),
            open_proxy(url).hold(),
        ):
            pytest.fail("two decide")
    assert len(said) == 4
    assert not [line for line in said if "\n" in line or re.search("s3cret|word", line)]


# ---------------------------------------------------------------------------- the command


def test_serve_tells_its_address_and_ends_cleanly(tmp_path: Path, vitnas: Any) -> None:
    command = [sys.executable, "-m", "nas.cli", "storage", "serve", str(tmp_path / "j"), "--port", "0", "--json"]
    environ = {**os.environ, "PYTHONPATH": str(Path(nas.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as server:
        told = json.loads(server.stdout.readline())
        assert told["storage"] == str(tmp_path / "j")
        assert open_storage(told["address"]).get_all_studies() == []
        port = told["address"].rpartition(":")[2]
        database = f"sqlite:///{tmp_path / 'k.db'}"
        vitnas.refused(vitnas("storage", "serve", database, "--port", port), "in use", "--port")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stderr.read() == ""
    assert not (tmp_path / "k.db").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("grpc://u:hunter2@host",), "grpc://u:***@host is a proxy already"),
        (("postgresql://u:hunter2@127.0.0.1:9/db", "--port", "0"), "refused"),
        (("here/is/no/folder",), "No such file or directory"),
        (("j", "--port", "70000"), "--port is 70000"),
        (("j", "--host", ""), "--host is empty"),
        (("",), "the URL is empty"),
        (("j", "--host", "no-such-host.invalid"), "no-such-host.invalid"),
    ],
)
def test_bad_input_is_one_line(
    vitnas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = vitnas("storage", "serve", *words)
    vitnas.refused(result, told)
    assert "hunter2" not in result[2]


def test_the_environment_may_name_the_storage(vitnas: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITNAS_STORAGE", "postgresql://me:secret@127.0.0.1:1/none")
    result = vitnas("storage", "serve")
    vitnas.refused(result, "postgresql://me:***@127.0.0.1:1/none")  # type: ignore[attr-defined]
    assert "secret" not in result[2]


@pytest.mark.parametrize("module", ["grpc", "google.protobuf"])
def test_missing_packages_are_named(vitnas: Any, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    vitnas.refused(vitnas("storage", "serve", "j"), "no driver for vitnas storage serve", "pip install '.[grpc]'")
    with pytest.raises(UserError, match=r"no driver for grpc://host: .*pip install '\.\[grpc\]'$"):
        open_storage("grpc://host")


def test_help_has_an_example(vitnas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = vitnas("storage", "serve", "-h")
    assert code == 0
    assert "Example:  vitnas storage serve" in out
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("host", "warns"), [("127.0.0.1", False), ("::1", False), ("10.0.0.5", True), ("0.0.0.0", True)]
)
def test_an_address_that_others_reach_is_told(
    vitnas: Any, monkeypatch: pytest.MonkeyPatch, host: str, warns: bool
) -> None:
    from nas.study import serve

    monkeypatch.setattr(serve, "serve", lambda url, host, port, started: started(port))
    code, out, err = vitnas("storage", "serve", "postgresql://u:hunter2@h/d", "--host", host)
    assert code == 0
    assert out.startswith("postgresql://u:***@h/d is served at grpc://")
    assert ("no login and no encryption" in err) == warns
