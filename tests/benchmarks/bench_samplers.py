"""Which sampler finds most in equal wall time, on the real space: a replay of measured networks.

    vitnas search --latency-budget 2ms --sampler random --trials 300 --study table --out DIR
    python tests/benchmarks/bench_samplers.py DIR/table/study.journal [--seconds 240] [--seeds 3] [--budget 2]

The latencies of the random study (each trial's fastest sample) are fitted per family as nonnegative costs of MACs,
activations and layers; the held-out error of that fit is printed first. Samplers then search the real space, with the
real prior and the fitted latency (with 2% noise). A trial costs the study's median trial time (or --trial-seconds),
plus the time the sampler really takes here. Score: feasible hypervolume over latency 0..budget and quality bound
40..80, in percent.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import optuna
from scipy.optimize import nnls

from nas.measure.runtime import Settings
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.prior import PriorTier
from nas.search.published import choices, published_order
from nas.search.request import SearchRequest
from nas.search.trial import suggest
from nas.study.samplers import make_sampler
from nas.study.storage import open_storage
from search_spaces import Arch, table
from search_spaces.api import find_variant
from search_spaces.registry import FAMILIES
from search_spaces.widths import Table

Point = tuple[Arch, Table, float]
FLOOR, CEILING = 40.0, 80.0
LARGE_GRID = 256


def inputs(arch: Arch, counts: Table) -> np.ndarray:
    """What latency is spent on: MACs on large and on small grids, depthwise MACs, attention, activations, layers."""
    large = depthwise = activations = 0.0
    for entry in counts.entries:
        work = entry.positions * float(np.prod(entry.shape))
        large += work * (entry.positions >= LARGE_GRID)
        depthwise += work * (len(entry.axes) == 4 and entry.axes[1].size == 1)
        activations += entry.positions * entry.axes[0].size if entry.axes else 0
    small = counts.macs() - counts.product_macs() - large
    reduced = sum(stage.keep_rate < 1 for stage in arch.summary())
    weights = [large, small, depthwise, counts.product_macs(), activations, counts.params()]
    return np.array([*(w / 1e6 for w in weights), len(counts.entries) / 100, reduced, 1.0])


class LatencyFit:
    """Latency as a sum of nonnegative costs, a family at a time; relative errors are minimised."""

    def __init__(self, points: list[Point]) -> None:
        self._costs = {}
        for family in FAMILIES:
            own = [p for p in points if p[0].family == family]
            x = np.array([inputs(arch, counts) for arch, counts, _ in own])
            y = np.array([ms for _, _, ms in own])
            self._costs[family], _ = nnls(x / y[:, None], np.ones(len(y)))

    def at(self, arch: Arch, counts: Table) -> float:
        return float(inputs(arch, counts) @ self._costs[arch.family])


def held_out_error(points: list[Point], folds: int = 5) -> float:
    """Median relative error of predictions for points left out of the fit."""
    errors = []
    for fold in range(folds):
        fit = LatencyFit([p for i, p in enumerate(points) if i % folds != fold])
        errors += [abs(fit.at(a, m) / ms - 1) for i, (a, m, ms) in enumerate(points) if i % folds == fold]
    return statistics.median(errors)


def hypervolume(found: list[tuple[float, float]], budget: float) -> float:
    """Area that (latency, quality) points dominate within the budget, in percent."""
    area, right = 0.0, budget
    for latency, quality in sorted(found, key=lambda p: -p[1]):
        if latency < right:
            area += (right - latency) * max(0.0, min(quality, CEILING) - FLOOR)
            right = latency
    return 100 * area / (budget * (CEILING - FLOOR))


def replay(name: str, seed: int, enqueue: bool, world: "World", seconds: float) -> tuple[float, int, int, float]:
    """Hypervolume, trials, feasible trials and best quality after `seconds`."""
    study = optuna.create_study(directions=["maximize"] * 2, sampler=make_sampler(name, seed))
    if enqueue:
        for variant in world.published:
            study.enqueue_trial(variant)
    noise = np.random.default_rng(seed)
    found, spent, best = [], 0.0, 0.0
    while spent < seconds:
        started = time.perf_counter()
        trial = study.ask()
        arch = suggest(trial, world.options).arch
        spent += time.perf_counter() - started + world.trial_s
        quality, clean = world.look_up(arch)
        latency = clean * math.exp(0.02 * noise.standard_normal())
        trial.set_constraint("latency", latency / world.options.budget_ms - 1)
        started = time.perf_counter()
        study.tell(trial, [quality, 1000 / latency])
        spent += time.perf_counter() - started
        if latency <= world.options.budget_ms:
            found.append((latency, quality))
            best = max(best, quality)
    return hypervolume(found, world.options.budget_ms), len(study.trials), len(found), best


def fastest_samples(path: Path) -> dict[int, float]:
    """Each trial's fastest sample: what a busy machine disturbs least."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["trial"]: min(min(samples) for samples in row["rounds_ms"]) for row in rows if "trial" in row}


class World:
    """The real space and prior, with fitted latencies."""

    def __init__(self, points: list[Point], trial_s: float, reference_ms: float, budget: float) -> None:
        self.options = SearchRequest(budget, Settings(), tuple(FAMILIES), 100, None, "", Path(), None, "", None, 1000)
        self.trial_s, self._fit, self._prior = trial_s, LatencyFit(points), PriorTier()
        self._known: dict[str, tuple[float, float]] = {}
        self.published = []
        for name in published_order(self.options, reference_ms)[: self.options.trials // 4]:
            family, variant = find_variant(name)
            self.published.append({"family": family, **FAMILIES[family].space.encode(variant.values)})
        assert all(p.keys() == choices(self.options).keys() for p in self.published)

    def look_up(self, arch: Arch) -> tuple[float, float]:
        key = arch.digest()
        if key not in self._known:
            score = self._prior.estimate(Candidate(arch), counts_of(arch)).score
            self._known[key] = (score, self._fit.at(arch, table(arch)))
        return self._known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=2.0)
    parser.add_argument("--trial-seconds", type=float, help="cost of a trial beside its sampler (default: the study's)")
    parser.add_argument("--samplers", nargs="+", default=["random", "nsga2", "tpe", "gp"])
    args = parser.parse_args()
    storage = open_storage(args.journal, read_only=True)
    (summary,) = optuna.get_all_study_names(storage)
    trials = [t for t in optuna.load_study(study_name=summary, storage=storage).trials if "detail" in t.user_attrs]
    fastest = fastest_samples(args.journal.with_name("samples.jsonl"))
    points = []
    for trial in trials:
        arch = Arch.from_json(json.dumps(trial.user_attrs["arch"]))
        if trial.number in fastest:
            points.append((arch, table(arch), fastest[trial.number]))
    reference = statistics.median(t.user_attrs["detail"]["reference_ms"] for t in trials)
    durations = sorted((t.datetime_complete - t.datetime_start).total_seconds() for t in trials)
    trial_s = args.trial_seconds or statistics.median(durations)
    world = World(points, trial_s, reference, args.budget)
    print(
        f"{len(points)} measured networks; held-out median error of the fitted latency {held_out_error(points):.1%}; "
        f"a trial costs {trial_s:.2f} s beside its sampler; {args.seconds:g} s of wall time, budget {args.budget:g} ms"
    )
    print("| sampler | published enqueued | hypervolume % | trials | feasible | best quality bound |")
    print("|---|---|---|---|---|---|")
    for enqueue in (False, True):
        for name in args.samplers:
            runs = [replay(name, seed, enqueue, world, args.seconds) for seed in range(args.seeds)]
            volumes, counts, feasible, best = (list(column) for column in zip(*runs, strict=True))
            spread = statistics.stdev(volumes) if len(volumes) > 1 else 0.0
            print(
                f"| {name} | {'yes' if enqueue else 'no'} | {statistics.mean(volumes):.1f} +- {spread:.1f} | "
                f"{statistics.mean(counts):.0f} | {statistics.mean(feasible):.0f} | {statistics.mean(best):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
