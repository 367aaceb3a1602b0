"""The processes that a search starts to train, with stand-in devices: which there are, and how each may end."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.samplers import RandomSampler

from nas.errors import UserError
from nas.measure.runtime import Settings
from nas.quality.candidate import Candidate
from nas.quality.plan import TrainingPlan
from nas.search import workers as layer
from nas.search.request import SearchRequest
from nas.search.tasks import Task, Tasks, What
from nas.search.workers import STARTS, Crew, chosen_devices
from nas.study.jobs import MEASURES, TRAINS, workers
from nas.study.trials import open_study
from nas.training.device import CPU, TrainingDevice
from search_spaces import get_arch

GPUS = [TrainingDevice("cuda:0", "GPU-a"), TrainingDevice("cuda:1", "GPU-b")]
REQUEST = SearchRequest(2.0, Settings(), ("shvit",), study="s", quality="train", plan=TrainingPlan("images"))


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study("s", tmp_path / "j", {"a": 1}, RandomSampler())


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(layer, "MODULE", "crew_worker")
    monkeypatch.setenv("CREW_FOLDER", str(tmp_path))
    return []


@pytest.fixture
def crew(said: list[str], study: optuna.Study) -> Iterator[Callable[..., Crew]]:
    """Starts one on devices that do as their names say."""
    with ExitStack() as stack:

        def started(*names: str) -> Crew:
            devices = [TrainingDevice(f"cuda:{i}", name) for i, name in enumerate(names)]
            found = Crew(REQUEST, devices, said.append, lambda *told: said.append(" ".join(map(str, told))), stack)
            stack.callback(found.close)
            found.start(study)
            return found

        yield started


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_they_say_is_said_and_they_end_with_the_search(
    crew: Callable[..., Crew], said: list[str], study: optuna.Study, tmp_path: Path
) -> None:
    found = crew("a", "b")
    wait(lambda: {"a waits", "b waits"} <= set(said))
    assert said[0] == "processes of this search train on cuda:0, cuda:1, while this one measures"
    assert said.count("training 0 3") == 2
    assert (workers(study, MEASURES), workers(study, TRAINS)) == (1, 0), "each says by itself that it trains"
    pids = [worker.pid for worker in found._workers.values()]
    found.check()
    found.close()
    assert {path.name for path in tmp_path.glob("*.aside")} == {"a.aside", "b.aside"}, "each put its training aside"
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not [line for line in said if "ended" in line or "another" in line]


def test_one_that_dies_is_told_and_another_is_started(crew: Callable[..., Crew], said: list[str]) -> None:
    found = crew("dies-once")
    wait(lambda: "dies-once waits" in said)
    (line,) = (each for each in said if "another is started" in each)
    assert line.startswith("the process that trains on cuda:0: killed by signal 9")
    found.check()


@pytest.mark.parametrize(("name", "starts"), [("dies", STARTS), ("refuses", 1)])
def test_where_none_is_left_the_search_says_why(
    crew: Callable[..., Crew], said: list[str], tmp_path: Path, name: str, starts: int
) -> None:
    found = crew(name)
    for thread in threading.enumerate():
        if thread.name == "worker cuda:0":
            thread.join(120)
    with pytest.raises(UserError, match="nothing trains any more: the process that trains on cuda:0: "):
        found.check()
    assert (tmp_path / name).read_text() == str(starts)
    assert said[-1].endswith("it is not started again")


def test_they_train_until_a_full_training_is_made_together(study: optuna.Study) -> None:
    ended, network = [], Candidate(get_arch("efficientvit_m0").at(64))
    tasks = Tasks(study, lambda task: task.seed, False, print, take_over=lambda: ended.append("the crew"))
    tasks.post([Task(What.COMPLETE, network, 1)])
    assert not ended
    assert tasks.result(Task(What.FINAL, network, 1, seed=7)) == 7, "made by this process"
    assert ended == ["the crew"]


@pytest.mark.parametrize(
    ("here", "changes", "expected"),
    [
        ([CPU], {}, []),
        (GPUS[:1], {}, []),
        (GPUS, {}, GPUS),
        ([CPU], {"settings": Settings(device="ssh://board")}, [CPU]),
        (GPUS, {"settings": Settings(device="ssh://board"), "workers": 0}, []),
        (GPUS, {"workers": 1}, GPUS[:1]),
        (GPUS, {"only": "measure"}, []),
        (GPUS, {"quality": "supernet"}, []),
        (GPUS, {"plan": None, "quality": "prior"}, []),
    ],
)
def test_each_training_device_gets_one_where_that_helps(
    monkeypatch: pytest.MonkeyPatch, here: list[TrainingDevice], changes: dict[str, object], expected: object
) -> None:
    monkeypatch.setattr("nas.training.device.training_devices", lambda names: here)
    assert chosen_devices(dataclasses.replace(REQUEST, **changes)) == expected
    with pytest.raises(UserError, match="--workers is 3: one a training device, and there is"):
        chosen_devices(dataclasses.replace(REQUEST, workers=3))
