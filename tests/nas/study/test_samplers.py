"""Samplers by name, and what `auto` does at its switch point."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest

import nas
from nas.errors import UserError
from nas.study import samplers
from nas.study.samplers import SAMPLERS, make_sampler
from nas.study.trials import enqueue, fail, finish, open_study

CHOICES = {f"p{i}": range(7) for i in range(4)}


def run(study: optuna.Study, trials: int) -> None:
    """Quality grows with p0 and p1, cost with p0, p1 and p2; p3 is noise to both."""
    for _ in range(trials):
        trial = study.ask()
        p = {name: trial.suggest_int(name, 0, 6) for name in CHOICES}
        if trial.number % 10 == 7:
            fail(study, trial, "export")
            continue
        cost = 1 + p["p0"] + p["p1"] + 2 * p["p2"]
        finish(study, trial, p["p0"] * 2.0 + p["p1"], 100.0 / cost, cost / 8 - 1, {})


def start(tmp_path: Path, name: str, seed: int = 1) -> optuna.Study:
    return open_study(name, tmp_path / f"{name}.journal", {}, make_sampler(name, seed))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_a_constrained_study_quietly(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)  # other tests' garbage
        study = start(tmp_path, name)
        enqueue(study, dict.fromkeys(CHOICES, 0), {}, CHOICES)
        run(study, 14)
    assert [str(w.message) for w in caught] == []
    assert len(study.trials) == 14
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", SAMPLERS)
def test_trials_without_parameters_take_none_from_the_others(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samplers, "POPULATION", 4)
    study = start(tmp_path, name)
    for _ in range(12):
        study.enqueue_trial({}, {"given": True})
        finish(study, study.ask(), 50.0, 1.0, 0.0, {})
        run(study, 1)
    assert capfd.readouterr() == ("", ""), "Optuna tells where parameters are sampled independently"
    if name != "random":
        space = study.sampler.infer_relative_search_space(study, study.ask())
        assert space.keys() == CHOICES.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seed_same_search(tmp_path: Path, name: str) -> None:
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        study = start(tmp_path / folder, name, seed=5)
        run(study, 13)
        found.append([t.params for t in study.trials])
    assert found[0] == found[1]


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(UserError, match=r"unknown sampler 'ngsa2': did you mean nsga2\?"):
        make_sampler("ngsa2", None)
    with pytest.raises(UserError, match="choose from auto, gp, tpe, nsga2, random"):
        make_sampler("x", None)


def record(sampler: Any, seen: list[int]) -> None:
    sample = sampler.sample_relative

    def sample_relative(study: Any, trial: Any, space: Any) -> dict[str, Any]:
        seen.append(trial.number)
        return sample(study, trial, space)

    sampler.sample_relative = sample_relative


def test_auto_switches_and_hands_its_best_trials_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "GP_TRIALS", 18)
    monkeypatch.setattr(samplers, "POPULATION", 8)
    study = start(tmp_path, "auto")
    asked: dict[str, list[int]] = {"GPSampler": [], "NSGA2": []}
    for inner in (study.sampler._gp, study.sampler._nsga2):
        record(inner, asked[type(inner).__name__])
    run(study, 24)
    assert asked == {"GPSampler": list(range(18)), "NSGA2": list(range(18, 24))}

    # The first parents are the best so far, not a random first generation.
    nsga2 = study.sampler._nsga2
    parents = nsga2.get_parent_population(study, nsga2.get_trial_generation(study, study.trials[18]))
    assert len(parents) == 8
    assert max(t.number for t in parents) < 18
    feasible = {t.number for t in study.trials[:18] if t.constraints.get("latency", 1) <= 0}
    assert feasible
    assert len(feasible & {t.number for t in parents}) == min(8, len(feasible))


def test_enqueued_trials_become_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "POPULATION", 4)
    study = start(tmp_path, "nsga2")
    for value in range(4):
        enqueue(study, dict.fromkeys(CHOICES, value), {}, CHOICES)
    run(study, 5)
    parents = study.sampler.get_parent_population(study, 1)
    assert {t.number for t in parents} == {0, 1, 2, 3}


def test_module_is_cheap_to_import() -> None:
    code = (
        "import sys, nas.study.samplers, nas.study.trials, nas.search.dashboard\n"
        "print({'optuna', 'torch', 'numpy', 'sqlalchemy', 'scipy', 'bottle'} & {*sys.modules})"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(nas.__file__).parents[1])},
    )
    assert out.stdout.strip() == "set()"
