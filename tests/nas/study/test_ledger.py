"""What a process keeps of a study agrees with a plain look at all of its trials."""

from __future__ import annotations

import random
from pathlib import Path

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from nas.study import trials
from nas.study.ledger import ledger_of
from nas.study.trials import ask, fail, finish, open_study, remaining, sweep


def start(storage: str | Path) -> optuna.Study:
    return open_study("s", storage, {}, RandomSampler())


def a_step(study: optuna.Study, running: list[optuna.Trial], rng: random.Random) -> None:
    """Of some worker: a trial begins, is told, fails, is interrupted, or loses its worker."""
    if not running or rng.random() < 0.4:
        trial = ask(study)
        trial.suggest_int("width", 0, 6)
        running.append(trial)
        return
    trial = running.pop(rng.randrange(len(running)))
    match rng.randrange(5):
        case 0:
            finish(study, trial, rng.random(), 500.0, -0.1, {"n": trial.number})
        case 1:
            fail(study, trial, "it broke")
        case 2:
            fail(study, trial, "interrupted", retry=True)
        case 3:
            trial.set_user_attr("lease", {**trial.user_attrs["lease"], "started": -100})
            sweep(study)
        case 4:  # killed before it enqueues the retry, as the next sweep does
            trials._tell_fail(study, trial, "interrupted", retry=True)


def numbers(found: list[FrozenTrial]) -> list[int]:
    return [trial.number for trial in found]


@pytest.mark.parametrize("seed", range(3))
def test_a_ledger_agrees_with_a_look_at_every_trial(tmp_path: Path, seed: int) -> None:
    rng, running = random.Random(seed), []
    ours, others = start(tmp_path / "j"), start(tmp_path / "j")
    for _ in range(40):
        for _ in range(rng.randrange(4)):  # this process looks now and then
            a_step(others, running, rng)
        now, every = ledger_of(ours), start(tmp_path / "j").trials
        ended = [trial for trial in every if trial.state.is_finished()]
        retried = {trial.user_attrs.get("retry_of") for trial in every}
        again = [trial for trial in ended if trial.user_attrs.get("retry")]
        assert numbers(now.running) == numbers([t for t in every if t.state == TrialState.RUNNING])
        assert numbers(now.waiting) == numbers([t for t in every if t.state == TrialState.WAITING])
        assert sorted(now.owed) == [trial.number for trial in again if trial.number not in retried]
        assert now.read(FrozenTrial.__str__) == [*map(str, ended)]
        counted = [t for t in every if t.state != TrialState.WAITING and not t.user_attrs.get("retry")]
        assert remaining(ours, 1000) == 1000 - len(counted)
    assert len(again) > 3


def test_a_trial_is_read_once(tmp_path: Path) -> None:
    study, asked = start(tmp_path / "j"), []

    def width(trial: FrozenTrial) -> int:
        asked.append(trial.number)
        return int(trial.params["width"])

    for n in range(3):
        trial = ask(study)
        trial.suggest_int("width", n, n)
        assert ledger_of(study).read(width) == [*range(n)]
        finish(study, trial, 1.0, 1.0, -0.1, {})
    assert ledger_of(study).read(width) == [0, 1, 2]
    assert asked == [0, 1, 2]
