"""What a display shows between trials."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial

from nas.measure.budget import Verdict
from nas.search.log import SearchLog
from nas.search.loop import state_of
from nas.search.rows import choose, rows_of
from nas.study.trials import open_study


@pytest.mark.parametrize("seed", range(3))
def test_the_best_so_far_is_the_one_that_is_chosen(tmp_path: Path, seed: int) -> None:
    rng, request, verdicts = random.Random(seed), SimpleNamespace(trials=100), set()
    study = open_study("s", tmp_path / "j", {}, RandomSampler())
    for _ in range(25):
        ms, half = rng.uniform(1.5, 2.2), rng.choice([0.01, 0.3])
        detail = {
            "digest": "d",
            "latency_ms": ms,
            "latency_p95_ms": ms,
            "latency_ci_low_ms": ms - half,
            "latency_ci_high_ms": ms + half,
            **{"samples": 12, "rounds": 6, "reference_ms": 1.0, "reference_drift": 0.0, "throughput": 1000 / ms},
            "source": "measured",
            "training": {},
        }
        attrs = {"budget_ms": 2.0, "feasible": int(ms <= 2.0), "latency_ms": ms, "params_m": rng.random()}
        values = [float(rng.randrange(60, 64)), 1000 / ms]
        study.add_trial(create_trial(values=values, user_attrs={**attrs, "detail": detail}))
        if rng.random() < 0.2:
            study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"error": "it broke"}))
        now, feasible = state_of(study, request, SearchLog("")), [row for row in rows_of(study) if row.feasible]
        assert now.best == choose(feasible)
        assert (now.feasible, now.done) == (len(feasible), len(study.trials))
        verdicts |= {row.verdict for row in feasible}
    assert verdicts == {Verdict.FITS, Verdict.UNSURE}
