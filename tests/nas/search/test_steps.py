"""The two steps of a trial: what is measured is trained here, or by another worker that needs no device."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler

from nas.errors import DiskFull, TrainingError, UserError
from nas.intervals import Interval
from nas.measure.budget import Limits
from nas.measure.runtime import Settings
from nas.quality.candidate import Candidate
from nas.quality.tier import Estimate
from nas.search import trial as search_trial
from nas.search import trial_training
from nas.search.latency import TrialLatency
from nas.search.log import SearchLog
from nas.search.propose import Measured
from nas.search.trial import TrialRunner
from nas.search.trial_training import Stage, TrainStep
from nas.study import trials as layer
from nas.study.trials import DEATHS, MEASURED, claim, in_training, open_study, sweep, waiting_for_training
from search_spaces import get_arch

BUDGET_MS = 2.0
NETWORK = Candidate(get_arch("efficientvit_m0").at(64), name="efficientvit_m0@64")


class Steps:
    """A study, and what its two steps do. held: what holds a lock, in order of its being taken."""

    def __init__(self, study: optuna.Study) -> None:
        self.study, self.held, self.told = study, [], []
        self.faults: list[BaseException] = []
        self.ms = 1.0
        self.log = SearchLog("now")
        trainer = SimpleNamespace(alone=lambda: self.holding("gpu"))
        self.tier = SimpleNamespace(
            name="train", trained=True, trainer=trainer, estimate=self.train, predict=self.judge, surrogate=None
        )
        self.request = SimpleNamespace(
            settings=Settings(), budget_ms=BUDGET_MS, limits=Limits(), folder=Path(), trials=1000
        )

    @contextmanager
    def holding(self, what: str) -> Any:
        self.held.append(what)
        try:
            yield
        finally:
            self.held.remove(what)

    def train(self, candidate: Candidate, counts: Any) -> Estimate:
        self.told.append(("train", candidate.name, tuple(self.held)))
        if self.faults:
            raise self.faults.pop(0)
        return self.judge(candidate, counts)

    def judge(self, *_: Any) -> Estimate:
        return Estimate(50.0, Interval(48.0, 52.0), 49.0)

    def measure(self, hands_over: bool) -> None:
        runner = TrialRunner(self.request, self.study, self.tier, hands_over=hands_over)
        runner._known = lambda digest: self.latency()
        runner.trial(self.log)

    def latency(self) -> TrialLatency:
        self.told.append(("measure", "", tuple(self.held)))
        return TrialLatency.read({"latency_ms": self.ms, "throughput": 800.0, "source": "measured"})

    def claim(self) -> bool:
        return TrainStep(self.request, self.study, self.tier, Stage(lambda *_: None)).claimed(self.log)

    @property
    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study.trials]


def suggest(trial: optuna.Trial, *_: Any) -> Candidate:
    trial.suggest_int("width", 0, 1)
    return NETWORK


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    found = Steps(open_study("s", tmp_path / "j", {"a": 1}, RandomSampler(seed=0)))
    monkeypatch.setattr(search_trial, "device_lock", lambda device: found.holding("device"))
    monkeypatch.setattr(search_trial, "suggest", suggest)
    return found


def test_each_step_holds_only_what_it_uses(steps: Steps) -> None:
    steps.measure(hands_over=False)
    assert steps.told == [("measure", "", ("device",)), ("train", NETWORK.name, ("gpu",))]
    assert steps.states == ["COMPLETE"]


def test_what_is_handed_over_is_trained_by_who_claims_it(steps: Steps) -> None:
    steps.measure(hands_over=True)
    assert steps.states == ["RUNNING"]
    assert [trial.number for trial in waiting_for_training(steps.study)] == [0]
    (measured,) = Measured.all_of(steps.study)
    assert (measured.latency_ms, measured.digest, measured.feasible) == (1.0, NETWORK.key, True), "proposals see it"
    assert steps.claim()
    assert steps.told == [("measure", "", ("device",)), ("train", NETWORK.name, ("gpu",))]
    (trial,) = steps.study.trials
    assert (trial.state.name, trial.values, trial.user_attrs["latency_ms"]) == ("COMPLETE", [49.0, 800.0], 1.0)
    assert trial.constraints == {"latency": -0.5}
    assert not steps.claim()


def test_a_network_over_the_budget_has_no_second_step(steps: Steps) -> None:
    steps.ms = 3.0
    steps.measure(hands_over=True)
    assert steps.states == ["COMPLETE"]
    assert [what for what, *_ in steps.told] == ["measure"]


@pytest.mark.parametrize("ends", [KeyboardInterrupt(), DiskFull(".", error=OSError(28, "No space left on device"))])
def test_a_training_that_is_interrupted_waits_and_is_not_measured_again(steps: Steps, ends: BaseException) -> None:
    steps.faults = [ends]
    with pytest.raises(type(ends)):
        steps.measure(hands_over=False)
    assert steps.log.notes == ["trial 0 is measured and waits for its training: the same command goes on with it"]
    assert [trial.number for trial in waiting_for_training(steps.study)] == [0]
    assert steps.claim()
    assert steps.states == ["COMPLETE"]
    assert [what for what, *_ in steps.told] == ["measure", "train", "train"]


def test_a_training_that_fails_is_a_failed_trial(steps: Steps) -> None:
    steps.measure(hands_over=True)
    steps.faults = [TrainingError("the loss is no longer finite")]
    assert steps.claim()
    assert steps.states == ["FAIL"]
    assert in_training(steps.study) == []
    assert Measured.all_of(steps.study) == []


def two_workers(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.measure(hands_over=True)
    monkeypatch.setattr(trial_training, "workers", lambda study, does: 2)


def test_what_one_worker_has_no_memory_for_waits_for_another(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    two_workers(steps, monkeypatch)
    worker = TrainStep(steps.request, steps.study, steps.tier, Stage(lambda *_: None))
    steps.faults = [MemoryError()]
    assert worker.claimed(steps.log)
    assert [trial.number for trial in waiting_for_training(steps.study)] == [0]
    assert steps.log.notes == ["trial 0 cannot be trained here, and waits for another worker: MemoryError"]
    assert not worker.claimed(steps.log), "not again"
    assert steps.claim(), "another worker"
    assert steps.states == ["COMPLETE"]


def test_a_worker_whose_gpu_is_lost_ends(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    two_workers(steps, monkeypatch)
    steps.measure(hands_over=True)
    worker = TrainStep(steps.request, steps.study, steps.tier, Stage(lambda *_: None))
    steps.faults = [RuntimeError("CUDA error: unspecified launch failure") for _ in range(2)]
    assert worker.claimed(steps.log)
    with pytest.raises(UserError, match="trains no more, which others may: RuntimeError: CUDA error"):
        worker.claimed(steps.log)
    assert [trial.number for trial in waiting_for_training(steps.study)] == [0, 1]


def test_what_no_worker_can_train_is_failed_in_the_end(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    two_workers(steps, monkeypatch)
    steps.faults = [MemoryError() for _ in range(DEATHS)]
    for _ in range(DEATHS):
        assert steps.claim()
    assert steps.states == ["FAIL"]
    assert steps.study.trials[0].user_attrs["error"] == "MemoryError"


@pytest.mark.parametrize("others", [False, True])
def test_a_network_that_cannot_be_read_here_ends_no_search(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    """It is of another version of timm."""
    steps.measure(hands_over=True)
    monkeypatch.setattr(trial_training, "workers", lambda study, does: 1 + others)
    (trial,) = steps.study.trials
    document = trial.user_attrs[MEASURED]
    document["candidate"]["network"] = {"timm": "nosuchnet", "num_classes": 2, "resolution": 64}
    steps.study._storage.set_trial_user_attr(trial._trial_id, MEASURED, document)
    assert Measured.all_of(steps.study) == []
    assert steps.claim()
    assert steps.states == ["RUNNING" if others else "FAIL"]


def test_a_claim_whose_answer_was_lost_is_made_again(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.measure(hands_over=True)
    monkeypatch.setattr(layer, "_kept", lambda trial: trial)
    layer._mine.clear()
    assert claim(steps.study).number == 0
    assert claim(steps.study) is None
    sweep(steps.study)
    monkeypatch.undo()
    assert claim(steps.study).number == 0, "the first answer was lost"
    assert sweep(steps.study) == []
    assert claim(steps.study) is None, "it is at work"
