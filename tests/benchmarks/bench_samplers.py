"""Which sampler finds most in equal wall time: real searches, nothing replayed.

    python tests/benchmarks/bench_samplers.py OUT [--budgets 2 5 10] [--threads 1 2] [--seconds 120] [--seeds 5]
        [--samplers auto random tpe nsga2 gp] [--earlier CLONE]
    python tests/benchmarks/bench_samplers.py OUT --table

Samplers take turns at every seed. A run that OUT holds already is not made again, so that it can be made in parts.
A search is killed once its time is over: its closing run and its report are not waited for.
--earlier: a clone of vitnas at an earlier commit (fcd58c7, say), whose default makes 100 trials, however long.
Networks of every run are scored by the prior of today. One is within the budget where the upper end of the 95% interval
of its latency is. Told of each sampler: how many of its runs found one, and their best bound (mean and standard
deviation); how far that is above the bound of `random` with the same seed, with the 95% interval of the mean by
Student's t, and what that says; the best bound where the median alone has to be within the budget; then, as mean, least
and most, the networks measured, the seconds from the start of the process to the first one within the budget, and the
families with one.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial
from scipy.stats import t

from nas.measure.budget import Verdict
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.prior import PriorTier
from nas.search.latency import TrialLatency
from nas.study.storage import open_storage
from search_spaces import Arch

ROOT = Path(__file__).parents[2]
EARLIER, EARLIER_TRIALS = "earlier", 100
RANDOM = "random"
"""What others are compared with."""
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
    """What a search has found. Within the budget is where the upper end of the 95% interval of a latency is.

    best: the best bound within the budget, percent; best_by_median: where the median alone has to be; None: nothing is.
    first_s: seconds from the start of the process to the first network within the budget. seconds: to the last
    trial's end. families: that have one within the budget."""

    best: float | None = None
    best_by_median: float | None = None
    networks: int = 0
    first_s: float | None = None
    families: int = 0
    seconds: float = 0.0


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
    (out / run.study).mkdir(exist_ok=True)
    (out / run.study / ENDED).touch()


def found(run: Run, out: Path) -> Found:
    begun, prior = begun_at(run, out), PriorTier()
    sure, by_median, first_s, families = [], [], None, set()
    measured = sorted(
        (trial for trial in trials_of(run, out) if trial.values), key=lambda trial: trial.datetime_complete
    )
    for trial in measured:
        latency = TrialLatency.read({**trial.user_attrs["detail"], "latency_ms": trial.user_attrs["latency_ms"]})
        if latency.latency_ms <= run.budget:
            arch = Arch.from_json(json.dumps(trial.user_attrs["arch"]))
            by_median.append(prior.estimate(Candidate(arch), counts_of(arch)).score)
            if latency.verdict(run.budget) == Verdict.FITS:
                sure.append(by_median[-1])
                families.add(arch.family)
                first_s = trial.datetime_complete.timestamp() - begun if first_s is None else first_s
    return Found(
        max(sure, default=None),
        max(by_median, default=None),
        len({json.dumps(trial.user_attrs["arch"]) for trial in measured}),
        first_s,
        len(families),
        max((trial.datetime_complete.timestamp() - begun for trial in measured), default=0.0),
    )


def trials_of(run: Run, out: Path) -> list[FrozenTrial]:
    """None where the search was killed before it had a study."""
    journal = out / run.study / "study.journal"
    if not journal.is_file():
        return []
    storage = open_storage(journal, read_only=True)
    if run.study not in optuna.get_all_study_names(storage):
        return []
    return optuna.load_study(study_name=run.study, storage=storage).get_trials(deepcopy=False)


def begun_at(run: Run, out: Path) -> float:
    """When the process of a search began, in seconds since the epoch: its log was born then. Where the file system does
    not tell, or the folder was copied, what was changed first: a log without words, or a file 3 s younger."""
    log = out / f"{run.study}.log"
    told = subprocess.run(["stat", "-c", "%.W", str(log)], capture_output=True, text=True).stdout.strip()
    born = float(told) if told.replace(".", "").isdigit() else 0.0
    return min(filter(None, (born, *(path.stat().st_mtime for path in (log, *(out / run.study).iterdir())))))


def ended(out: Path) -> Iterator[Run]:
    """The runs in a folder that came to their end."""
    for path in sorted(out.glob(f"*/{ENDED}")):
        budget, threads, sampler, seed = path.parent.name.split("-")
        yield Run(float(budget.removesuffix("ms")), int(threads.removesuffix("t")), sampler, int(seed))


def mean_of(values: Sequence[float | None], digits: int = 0) -> str:
    """Their mean, least and most; how many there are not."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    told = f"{statistics.mean(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"
    return told if len(known) == len(values) else f"{told}; none in {len(values) - len(known)}"


def best_of(values: Sequence[float | None]) -> str:
    """Their mean and standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    return f"{statistics.mean(known):.2f}" + (f" +- {statistics.stdev(known):.2f}" if len(known) > 1 else "")


def compared(runs: Mapping[int, Found], others: Mapping[int, Found]) -> tuple[str, str]:
    """How far the best bounds of runs are above those of others with the same seeds: the mean difference with its 95%
    interval, and what that says."""
    seeds = runs.keys() & others.keys()
    pairs = [(runs[seed].best, others[seed].best) for seed in sorted(seeds)]
    differences = [one - other for one, other in pairs if one is not None and other is not None]
    left_out = f"; {len(pairs) - len(differences)} without a pair" if len(differences) < len(pairs) else ""
    if not differences:
        return f"none{left_out}", ""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}{left_out}", "one seed"
    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    verdict = "win" if mean > half else "loss" if mean < -half else "tie"
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}){left_out}", verdict


def print_table(out: Path) -> None:
    cells: dict[tuple[float, int], dict[str, dict[int, Found]]] = {}
    for run in ended(out):
        cells.setdefault((run.budget, run.threads), {}).setdefault(run.sampler, {})[run.seed] = found(run, out)
    columns = (
        *("budget, ms", "threads", "sampler", "runs with a find", "best bound", "above random's (95%)", "verdict"),
        *("best by the median", "networks", "first within, s", "families", "seconds"),
    )
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for (budget, threads), samplers in sorted(cells.items()):
        for sampler, by_seed in sorted(samplers.items()):
            runs = [*by_seed.values()]
            best = [run.best for run in runs]
            row = (
                *(f"{budget:g}", str(threads), sampler, f"{len(runs) - best.count(None)} of {len(runs)}"),
                best_of(best),
                *(("", "") if sampler == RANDOM else compared(by_seed, samplers.get(RANDOM, {}))),
                best_of([run.best_by_median for run in runs]),
                mean_of([run.networks for run in runs]),
                mean_of([run.first_s for run in runs]),
                mean_of([run.families for run in runs], 1),
                f"{statistics.mean(run.seconds for run in runs):.0f}",
            )
            print(f"| {' | '.join(row)} |")


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
