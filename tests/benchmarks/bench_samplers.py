"""Which sampler finds most in equal wall time: real searches, nothing replayed.

    python tests/benchmarks/bench_samplers.py OUT [--budgets 2 5 10] [--threads 1 2] [--seconds 120] [--seeds 5]
        [--samplers auto random tpe nsga2 gp] [--earlier CLONE]
    python tests/benchmarks/bench_samplers.py OUT --table

Samplers take turns at every seed. A run that OUT holds already is not made again, so that it can be made in parts.
A search is killed once its time is over: its closing run and its report are not waited for.
--earlier: a clone of vitnas at an earlier commit (fcd58c7, say), whose default makes 100 trials, however long.
Networks of every run are scored by the prior of today. Told of each: the best bound within the budget, the networks
measured, the seconds until the first one within the budget (from the first trial's start), the families with one.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna

from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.prior import PriorTier
from nas.study.storage import open_storage
from search_spaces import Arch

ROOT = Path(__file__).parents[2]
EARLIER, EARLIER_TRIALS = "earlier", 100
MOST = 100_000
STARTING_S = 15.0
"""Seconds that a search may take until its first trial begins."""
ENDED = "ended"


@dataclass(frozen=True)
class Run:
    """A search. sampler: of vitnas's names, or EARLIER."""

    budget: float
    threads: int
    sampler: str
    seed: int

    @property
    def study(self) -> str:
        return f"{self.budget:g}ms-{self.threads}t-{self.sampler}-{self.seed}"


@dataclass(frozen=True)
class Found:
    """best: the best bound within the budget, percent; None where nothing fits. first_s: seconds until the first
    network within the budget."""

    best: float | None
    networks: int
    trials: int
    first_s: float | None
    families: int
    seconds: float


def search(run: Run, out: Path, seconds: float, earlier: Path | None) -> None:
    words = ["search", "--latency-budget", f"{run.budget:g}ms", "--threads", str(run.threads), "--seed", str(run.seed)]
    words += ["--study", run.study, "--out", str(out), "--no-cache", "--quiet"]
    if run.sampler == EARLIER:
        words += ["--trials", str(EARLIER_TRIALS)]
    else:
        words += ["--trials", str(MOST), "--timeout", f"{seconds:g}s", "--sampler", run.sampler]
    code = str(earlier if run.sampler == EARLIER else ROOT)
    with (out / f"{run.study}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nas.cli", *words],
            env=os.environ | {"PYTHONPATH": code},
            cwd=code,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        status = process.wait(None if run.sampler == EARLIER else seconds + STARTING_S)
        if status not in (0, 1):
            sys.exit(f"{run.study} failed: see {log.name}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (out / run.study / ENDED).touch()


def found(run: Run, out: Path) -> Found:
    storage = open_storage(out / run.study / "study.journal", read_only=True)
    trials = optuna.load_study(study_name=run.study, storage=storage).get_trials(deepcopy=False)
    measured = [trial for trial in trials if trial.values]
    begun = min(trial.datetime_start for trial in measured if trial.datetime_start)
    prior, scores, first_s, families = PriorTier(), [], None, set()
    for trial in sorted(measured, key=lambda trial: trial.datetime_complete):
        if trial.user_attrs["latency_ms"] <= run.budget:
            arch = Arch.from_json(json.dumps(trial.user_attrs["arch"]))
            scores.append(prior.estimate(Candidate(arch), counts_of(arch)).score)
            families.add(arch.family)
            first_s = first_s or (trial.datetime_complete - begun).total_seconds()
    return Found(
        max(scores, default=None),
        len({json.dumps(trial.user_attrs["arch"]) for trial in measured}),
        len(measured),
        first_s,
        len(families),
        (max(trial.datetime_complete for trial in measured) - begun).total_seconds(),
    )


def ended(out: Path) -> Iterator[Run]:
    """The runs in a folder that came to their end."""
    for path in sorted(out.glob(f"*/{ENDED}")):
        budget, threads, sampler, seed = path.parent.name.split("-")
        yield Run(float(budget.removesuffix("ms")), int(threads.removesuffix("t")), sampler, int(seed))


def print_table(out: Path) -> None:
    cells: dict[tuple[float, int, str], list[Found]] = {}
    for run in ended(out):
        cells.setdefault((run.budget, run.threads, run.sampler), []).append(found(run, out))
    print("| budget, ms | threads | sampler | runs | best bound | networks | first within, s | families | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (budget, threads, sampler), runs in sorted(cells.items()):
        best = [run.best for run in runs if run.best is not None]
        first = [run.first_s for run in runs if run.first_s is not None]
        spread = f" +- {statistics.stdev(best):.2f}" if len(best) > 1 else ""
        print(
            f"| {budget:g} | {threads} | {sampler} | {len(runs)} | "
            f"{f'{statistics.mean(best):.2f}{spread}' if best else 'none'} | "
            f"{statistics.mean(run.networks for run in runs):.0f} | "
            f"{f'{statistics.mean(first):.0f}' if first else 'none'} | "
            f"{statistics.mean(run.families for run in runs):.1f} | "
            f"{statistics.mean(run.seconds for run in runs):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0, 5.0, 10.0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samplers", nargs="+", default=["auto", "random", "tpe", "nsga2", "gp"])
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        done = set(ended(out))
        samplers = [*options.samplers, *([EARLIER] if options.earlier else [])]
        for seed in range(options.seeds):
            for budget in options.budgets:
                for threads in options.threads:
                    for sampler in samplers:
                        run = Run(budget, threads, sampler, seed)
                        if run not in done:
                            search(run, out, options.seconds, options.earlier and options.earlier.resolve())
    print_table(out)


if __name__ == "__main__":
    main()
