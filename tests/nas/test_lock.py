"""A device has one who measures at a time, for all users and folders of this machine; what computes gives way to it."""

import errno
import os
import stat
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from nas import lock
from nas.data import batches
from nas.intervals import Interval
from nas.lock import DeviceLock, ProcessLock, in_turn, training_alone
from nas.measure import device
from nas.measure.budget import Limits
from nas.measure.device import device_lock
from nas.quality.candidate import Candidate
from nas.quality.tier import Estimate
from nas.search.latency import TrialLatency
from nas.search.trial import TrialRunner
from nas.search.trial_training import TrainStep
from search_spaces import get_arch

PATIENT_S = 60


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VITNAS_LOCKS", str(tmp_path))
    told: set[str] = set()
    monkeypatch.setattr(lock, "told", told)
    monkeypatch.setattr(device, "told", told)
    return tmp_path


def test_all_users_and_temporary_folders_share_the_locks(tmp_path, monkeypatch):
    monkeypatch.delenv("VITNAS_LOCKS")
    usual = lock.folder()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(lock.tempfile, "tempdir", None)
    assert lock.folder() == usual
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir(mode=0o755)
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(lock, "SHARED_FOLDERS", (str(tmp_path / "missing"), str(own), str(shared)))
    assert lock.folder() == shared


def test_one_holder_or_several_that_share():
    first, second, other = ProcessLock("cpu"), ProcessLock("cpu"), ProcessLock("cuda")
    assert first.acquire(0)
    assert other.acquire(0)
    assert not second.acquire(0)
    assert not second.acquire(0, shared=True)
    first.release()
    assert first.acquire(0, shared=True)
    assert second.acquire(0, shared=True)
    assert not ProcessLock("cpu").acquire(0)


def test_another_user_s_lock_is_opened_and_not_created(folder, monkeypatch):
    before = os.umask(0o077)
    try:
        assert ProcessLock("cpu").acquire(0)
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "cpu").stat().st_mode) == 0o644
    flags = []
    opened = os.open

    def record(path, how, *mode):
        flags.append(how)
        return opened(path, how, *mode)

    monkeypatch.setattr(os, "open", record)
    assert not ProcessLock("cpu").acquire(0)
    assert flags
    assert not any(how & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) for how in flags)


def test_a_link_in_the_lock_s_place_is_told_and_not_followed(folder, capsys):
    (folder / "cpu").symlink_to(folder / "elsewhere")
    assert ProcessLock("cpu").acquire(0)
    assert not (folder / "elsewhere").exists()
    assert capsys.readouterr().err.count("cannot be locked") == 1


def test_a_file_system_without_locks_costs_a_line(monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with device_lock("cpu"):
        assert list(in_turn("ab")) == ["a", "b"]
    with device_lock("cpu"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == sorted(set(lines))
    assert all("cannot be locked (Operation not supported)" in line for line in lines)


def test_a_lock_whose_file_was_removed_is_taken_on_the_new_one(folder):
    first, second = ProcessLock("cpu"), ProcessLock("cpu")
    assert first.acquire(0)
    (folder / "cpu").unlink()
    assert second.acquire(0)
    first.release()
    assert not first.acquire(0)


class Training(threading.Thread):
    """Three batches in turn; each is told and ends when it may. Its locks are another process's to this test's."""

    def __init__(self):
        super().__init__(daemon=True)
        self.begun = [threading.Event() for _ in range(3)]
        self.may_end = [threading.Event() for _ in range(3)]
        self.start()

    def run(self):
        for i in in_turn(range(3)):
            self.begun[i].set()
            self.may_end[i].wait(PATIENT_S)


def test_a_timing_waits_for_a_batch_and_a_training_for_a_timing():
    training, measuring = Training(), DeviceLock("cpu")
    assert training.begun[0].wait(PATIENT_S)
    assert not measuring.acquire(0)  # but it is at the gate
    training.may_end[0].set()
    assert measuring.acquire(PATIENT_S)
    assert not training.begun[1].is_set()
    measuring.release()
    assert training.begun[1].wait(PATIENT_S)
    for event in training.may_end:
        event.set()
    training.join(PATIENT_S)
    assert measuring.acquire(0)  # nothing computes any more
    measuring.release()


def test_trainings_run_beside_each_other():
    first, second = in_turn("ab"), lock._Turn()
    assert next(first) == "a"
    with second:
        second.give_way()
        assert second._held
    assert list(first) == ["b"]


def test_a_training_that_waits_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE_S", 0)
    measuring = DeviceLock("cuda")
    assert measuring.acquire(0)
    told = threading.Event()
    tell_once = lock.tell_once
    monkeypatch.setattr(lock, "tell_once", lambda line: (tell_once(line), told.set()))
    training = Training()
    assert told.wait(PATIENT_S)
    assert not training.begun[0].is_set()
    measuring.release()
    for event in training.may_end:
        event.set()
    training.join(PATIENT_S)
    assert capsys.readouterr().err == "waiting for another vitnas process that measures on this machine\n"


def test_who_measures_has_its_turn_and_gives_up_its_share():
    items = in_turn("abc")
    assert next(items) == "a"
    with device_lock("cpu"):
        assert next(items) == "b"
    assert list(items) == ["c"]
    assert DeviceLock("cpu").acquire(0)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_that_train_together_the_first_waits_but_not_for_ever(rank, monkeypatch, capsys):
    for name, value in (("PATIENCE_S", 0), ("TOGETHER_S", 0)):
        monkeypatch.setattr(lock, name, value)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    measuring = DeviceLock("cpu")
    assert measuring.acquire(0)
    assert list(in_turn("ab")) == ["a", "b"]
    measuring.release()
    told = capsys.readouterr().err
    assert ("training goes on beside it" in told) == (rank == "0")


def test_a_rank_without_others_waits_as_any_training(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over from a shell's environment
    test_a_timing_waits_for_a_batch_and_a_training_for_a_timing()


def test_who_waits_to_measure_does_not_poll(monkeypatch):
    """Who polls comes too late for ever beside one that measures, lets go and measures again."""
    asked = []

    def acquire(self, timeout_s):
        asked.append(timeout_s)
        return len(asked) > 1

    monkeypatch.setattr(DeviceLock, "acquire", acquire)
    with device_lock("cpu"):
        pass
    assert asked == [lock.PATIENCE_S, float("inf")]


def test_a_pass_over_images_takes_turns(monkeypatch):
    turns = []

    def recorded(items):
        for item in items:
            turns.append(item)
            yield item

    monkeypatch.setattr(batches, "in_turn", recorded)
    import torch

    class Rows(torch.utils.data.Dataset):
        files = None

        def __len__(self):
            return 4

        def __getitem__(self, key):
            return torch.zeros(3, 8, 8), 0

    assert len(list(batches.loader(Rows(), 2, shuffle=False, seed=0))) == len(turns) == 2


@pytest.mark.parametrize("latency", [1.0, 3.0])
def test_a_search_leaves_the_device_before_it_trains(latency, monkeypatch):
    left = []
    estimate = Estimate.within(1.0, 1.0, Interval(0.0, 2.0))

    def train(candidate, counts):
        left.append("trained")
        return estimate

    runner = object.__new__(TrialRunner)
    runner.request, runner.study = SimpleNamespace(budget_ms=2.0, limits=Limits()), None
    trainer = SimpleNamespace(alone=nullcontext)
    runner.tier = SimpleNamespace(name="train", trained=True, estimate=train, predict=train, trainer=trainer)
    runner.training = TrainStep(runner.request, None, runner.tier, None)
    told = TrialLatency.read({"latency_ms": latency, "throughput": 1.0})
    monkeypatch.setattr(runner, "_known", lambda digest: told)
    monkeypatch.setattr("nas.study.trials.finish", lambda *_, **__: True)
    clock = SimpleNamespace(lap=lambda name: None)
    trial = SimpleNamespace(set_user_attr=lambda *_: None)
    assert runner._measure_and_tell(trial, Candidate(get_arch("shvit_s1")), clock, lambda: left.append("left"))
    assert left == ["left", "trained"], "over the budget too: shared weights may have to be trained first"


def test_trainings_on_a_gpu_take_turns_and_keep_no_measurement_waiting(capsys, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.05)
    began, end = threading.Event(), threading.Event()

    def another_process():
        taken = ProcessLock("vitnas-train-GPU-a.lock")
        assert taken.acquire(0)
        began.set()
        end.wait(PATIENT_S)
        taken.release()

    other = threading.Thread(target=another_process)
    other.start()
    assert began.wait(PATIENT_S)
    with training_alone("GPU-b"), device_lock("cpu"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(lock, "tell_once", lambda line: (end.set(), told.append(line)))
    told = []
    with training_alone("GPU-a"), training_alone("GPU-a"):
        assert not ProcessLock("vitnas-train-GPU-a.lock").acquire(0)
        other.join()
    assert told == ["waiting for another vitnas process that trains on GPU-a"]
    assert ProcessLock("vitnas-train-GPU-a.lock").acquire(0)
