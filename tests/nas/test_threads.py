"""Training threads: as many as there are CPUs that nobody else uses, looked at again while it goes on."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch

import nas.threads
from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.errors import UserError
from nas.threads import adapt, training_threads

Times = namedtuple("Times", "user system idle iowait guest")


class Machine:
    """Four CPUs. others: how many of them other processes use; own: how many this one does; slept: times looked."""

    def __init__(self) -> None:
        self.now, self.others, self.own, self.slept = 0.0, 0.0, 0.0, 0
        self.cpus = [0.0] * 4
        self._own = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.now += seconds
        self._own += seconds * self.own
        for cpu in range(4):
            self.cpus[cpu] += seconds * min(1.0, max(0.0, self.others + self.own - cpu))

    def cpu_times(self, percpu: bool) -> list[Times]:
        return [Times(busy, 0.0, self.now - busy, 0.0, busy) for busy in self.cpus]

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self._own


@pytest.fixture
def machine(monkeypatch) -> Machine:
    made = Machine()
    before = torch.get_num_threads()
    monkeypatch.setattr(psutil, "cpu_times", made.cpu_times)
    monkeypatch.setattr(nas.threads, "time", made)
    monkeypatch.setattr(nas.threads, "usable_cpus", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(nas.threads, "default_threads", lambda: 4)
    torch.set_num_threads(4)
    yield made
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("others", "own", "threads", "why"),
    [
        (0.0, 0.0, 4, "on 4 threads: 4 of 4 CPUs are free"),
        (0.2, 0.0, 4, "on 4 threads: 4 of 4 CPUs are free"),
        (0.0, 2.0, 4, "on 4 threads: 4 of 4 CPUs are free"),
        (1.0, 0.0, 3, "on 3 threads: other processes keep 1 of 4 CPUs busy"),
        (1.0, 3.0, 3, "on 3 threads: other processes keep 1 of 4 CPUs busy"),
        (2.6, 0.0, 1, "on 1 thread: other processes keep 3 of 4 CPUs busy"),
        (4.0, 0.0, 1, "on 1 thread: other processes keep 4 of 4 CPUs busy"),
    ],
)
def test_as_many_as_cpus_are_free(machine, others, own, threads, why):
    """What this process itself computes, with threads that still spin, counts for nobody."""
    said = []
    machine.others, machine.own = others, own
    with training_threads(None, said.append, "cpu"):
        assert (torch.get_num_threads(), said) == (4, [])
        adapt()
        assert torch.get_num_threads() == threads
        assert said == [f"trains {why}; --train-threads N sets it"]
    assert torch.get_num_threads() == 4


def test_a_machine_that_becomes_busy_later(machine):
    """Looked at again now and then, not before each batch; only a change is told."""
    said = []
    with training_threads(None, said.append, "cpu"):
        for others, threads in ((0.0, 4), (2.0, 2), (2.0, 2), (0.0, 4)):
            machine.others = others
            machine.now += nas.threads.AGAIN_S + 1
            machine.slept = 0
            for _ in range(10):
                adapt()
            assert (torch.get_num_threads(), machine.slept) == (threads, 1)
    assert [line.split(":")[0] for line in said] == [f"trains on {n} threads" for n in (4, 2, 4)]


@pytest.mark.parametrize(("quota", "threads"), [(2, 2), (1, 1)])
def test_no_more_than_a_quota_allows(machine, monkeypatch, quota, threads):
    monkeypatch.setattr(nas.threads, "default_threads", lambda: quota)
    with training_threads(None, lambda line: None, "cpu"):
        adapt()
        assert torch.get_num_threads() == threads


def test_a_number_that_was_given_stays(machine):
    machine.others, said = 4.0, []
    with training_threads(2, said.append, "cpu"):
        adapt()
        machine.now += nas.threads.AGAIN_S + 1
        adapt()
        assert (torch.get_num_threads(), said, machine.slept) == (2, [], 0)
    for wrong in (0, 5):
        with pytest.raises(UserError, match=f"--train-threads is {wrong}: give 1 to 4"), training_threads(wrong, print):
            pass


@pytest.mark.parametrize("world", ["1", "2"])
def test_beside_a_gpu_and_under_torchrun_nothing_changes(machine, monkeypatch, world):
    machine.others, said = 4.0, []
    monkeypatch.setenv("WORLD_SIZE", world)
    with training_threads(None, said.append, "cuda" if world == "1" else "cpu"):
        adapt()
        assert (torch.get_num_threads(), said) == (4, [])


def test_every_pass_over_images_adapts(machine):
    """Whatever trains, scores or judges takes its images from a loader; without a command it changes nothing."""
    machine.others = 3.0
    batches = loader(open_data(None, 32, None, 0).val, 16, shuffle=False, seed=0)
    next(iter(batches))
    assert torch.get_num_threads() == 4
    with training_threads(None, lambda line: None, "cpu"):
        next(iter(batches))
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("verb", [("search", "--latency-budget", "1ms", "--data", "x"), ("train", "levit_128s")])
def test_a_wrong_number_is_one_line(vitnas, verb):
    vitnas.refused(vitnas(*verb, "--train-threads", "0"))
