"""Does a latency predictor pay? Searches with and without one, same seeds, same wall time, in turns.

    python tests/benchmarks/bench_predictor.py [--seconds 120] [--seeds 0 1] [--budget 2ms] [--sampler auto]

The predictor (scikit-learn's gradient boosting of log latency on stages, parameters, MACs and family) learns from the
cache of latencies that a first random search fills. Its held-out error is by 5-fold cross-validation. A candidate
whose prediction is over the budget by more than twice that error is not exported but told as failed; nothing is ever
scored by a prediction. It pays if more candidates that meet the budget are measured in the same time.
"""

import argparse
import contextlib
import json
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import KFold, cross_val_predict

import nas.search
import nas.search.loop
import nas.search.trial
from nas.measure.cache import default_path
from nas.measure.runtime import Settings
from nas.measure.samples import Measurement
from nas.search.loop import search
from nas.search.request import SearchRequest
from nas.units import parse_budget
from search_spaces import Arch, table
from search_spaces.registry import FAMILIES

STAGES = 4


class SkippedError(ValueError):
    """A candidate that was not exported."""


def features(arch: Arch) -> list[float]:
    counts = table(arch)
    found = [list(FAMILIES).index(arch.family), arch.resolution, np.log(counts.macs()), np.log(counts.params())]
    for i in range(STAGES):
        stages = arch.summary()
        found += (
            [float(v) for v in stages[i].model_dump().values()]
            if i < len(stages)
            else [np.nan] * len(stages[0].model_dump())
        )
    return found


class Predictor:
    """Log latency of an Arch in ms; error: the 80% quantile of its held-out absolute errors."""

    def __init__(self, rows: list[tuple[Arch, float]]) -> None:
        x = np.array([features(arch) for arch, _ in rows])
        y = np.log([ms for _, ms in rows])
        self._model = HistGradientBoostingRegressor(categorical_features=[0], random_state=0, min_samples_leaf=5)
        held_out = cross_val_predict(self._model, x, y, cv=KFold(5, shuffle=True, random_state=0))
        off = abs(held_out - y)
        self.error = float(np.quantile(off, 0.8))
        print(
            f"predictor: {len(rows)} networks; held-out error of latency: median {np.expm1(np.median(off)):.0%}, "
            f"80% within {np.expm1(self.error):.0%}, 95% within {np.expm1(np.quantile(off, 0.95)):.0%}"
        )
        self._model.fit(x, y)

    def __call__(self, arch: Arch) -> float:
        return float(self._model.predict([features(arch)])[0])


def cached() -> list[tuple[Arch, float]]:
    with contextlib.closing(sqlite3.connect(default_path())) as rows:
        found = rows.execute("SELECT arch, result FROM latency").fetchall()
    return [(Arch.from_json(arch), Measurement.from_dict(json.loads(result)).p50_ms) for arch, result in found]


def run(args: argparse.Namespace, seed: int, sampler: str, predictor: Predictor | None, name: str) -> dict[str, Any]:
    """One search; suggestions are filtered by the predictor."""
    budget = parse_budget(args.budget)
    plain = nas.search.trial.suggest

    def filtered(trial: optuna.Trial, options: SearchRequest) -> Arch:
        arch = plain(trial, options)
        if predictor is not None and predictor(arch) - 2 * predictor.error > np.log(budget):
            raise SkippedError("predicted to miss the budget")
        return arch

    nas.search.trial.suggest = filtered
    try:
        with tempfile.TemporaryDirectory() as out:
            options = SearchRequest(
                budget_ms=budget,
                settings=Settings(threads=args.threads),
                families=tuple(FAMILIES),
                trials=args.trials,
                timeout_s=args.seconds,
                study="s",
                out=Path(out),
                storage=None,
                sampler=sampler,
                seed=seed,
                num_classes=1000,
                cache=predictor is None and name == "warm",
            )
            study, _ = search(options, lambda _: None, lambda _: None)
            trials = study.get_trials(deepcopy=False)
    finally:
        nas.search.trial.suggest = plain
    skipped = sum("SkippedError" in t.user_attrs.get("error", "") for t in trials)
    measured = [t for t in trials if "latency_ms" in t.user_attrs]
    feasible = [t for t in measured if t.user_attrs["feasible"]]
    best = max((t.values[0] for t in feasible), default=float("nan"))
    print(
        f"{name}, sampler {sampler}, seed {seed}: {len(measured)} measured, {len(feasible)} of them feasible, "
        f"{skipped} skipped, best quality bound {best:.1f}",
        flush=True,
    )
    return {"feasible": len(feasible)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--budget", default="2ms")
    parser.add_argument("--sampler", nargs="+", default=["auto"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=100, help="as in a search: a quarter are published networks")
    args = parser.parse_args()
    os.environ["VITNAS_CACHE"] = tempfile.mkdtemp()  # one machine, one kind of settings
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run(args, 100, "random", None, "warm")
    predictor = Predictor(cached())
    for sampler in args.sampler:
        for seed in args.seeds:
            for name, one in (("without", None), ("with", predictor)):
                run(args, seed, sampler, one, name)


if __name__ == "__main__":
    main()
