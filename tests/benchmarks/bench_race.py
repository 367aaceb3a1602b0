"""What a search that starts from pretrained weights finds, beside the ready network that a user would fine-tune.

    python tests/benchmarks/bench_race.py latencies OUT            (once, on a quiet machine: budgets to choose from)
    python tests/benchmarks/bench_race.py run DATA ZOO OUT --budget 0.6 --budget 0.75 [--px 64] [--minutes 60]
    python tests/benchmarks/bench_race.py table OUT

DATA is a folder with train/ and val/; ZOO has the pretrained weights, NAME.safetensors (`--weights-from`). Each row of
OUT/race.jsonl is one command, as a user types it, at one thread on ONNX Runtime: race: `vitnas search --data`; scratch:
the same with `--from-scratch`, for as many epochs at the end; random: a race with `--sampler random`, for as long as
the trials of the race took, whose best derived network counts. The last two need the race's row. A race's row also
holds the best ready network, fine-tuned by the same recipe from the same seeds.

Rows that are there are skipped, and a run that was killed goes on. A search without final accuracies has no row: the
same command goes on with it. CPU seconds are those of the command and all its processes, over all runs of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp, ttest_ind

METHODS = {"race": [], "scratch": ["--from-scratch"], "random": ["--sampler", "random"]}
MANY = 100_000
"""Trials of a search that its time ends."""
READY = ("efficientvit_m0", "efficientvit_m1", "efficientvit_m2", "shvit_s1", "levit_128s")
CNNS = ("timm/lcnet_050", "timm/mobilenetv4_conv_small_050", "timm/tf_efficientnet_lite0")
VALIDATED = "before any epoch"
"""What `--validate` calls the estimate of rung 0."""


@dataclass(frozen=True)
class Found:
    """A network of a closing table."""

    name: str
    kind: str
    resolution: int
    latency_ms: float
    top1: Sequence[float]
    """Percent of the test images, one for each seed of the final trainings."""

    @classmethod
    def of(cls, result: dict[str, Any], which: str) -> Found | None:
        """A network of result.json; None where it was not trained fully."""
        standing, accuracy = result.get(which), result["accuracy"] or {"rows": []}
        if standing is None:
            return None
        top1 = next((row["top1"] for row in accuracy["rows"] if row["label"] == standing["name"]), None)
        if top1 is None:
            return None
        kind = standing.get("kind") or "scratch"
        return cls(standing["name"], kind, standing["resolution"], standing["latency_ms"], top1)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)


@dataclass(frozen=True)
class Row:
    """A search."""

    data: str
    budget_ms: float
    method: str
    seed: int
    cpu_s: float
    wall_s: float
    trials: int
    winner: Found | None
    best_ready: Found | None
    best_derived: Found | None
    tau: dict[str, float] = field(default_factory=dict)
    """Kendall's tau of each rung with the last one, by its epochs."""
    commit: str = ""
    ranked: dict[str, int] = field(default_factory=dict)
    """Of how many networks each tau is."""
    final_tau: float | None = None
    """Kendall's tau of rung 0 with full trainings, where `--validate` has made these."""
    validated: int = 0
    """Of how many networks that is."""
    gain: Sequence[float] | None = None
    """Of the best network that the search made up over the best ready one: points, and the ends of its interval."""
    trial_s: float = 0.0
    """Wall time of the trials."""
    epochs: int | None = None
    """Of a full training."""

    @property
    def key(self) -> tuple[str, float, str, int]:
        return self.data, self.budget_ms, self.method, self.seed

    @classmethod
    def read(cls, document: dict[str, Any]) -> Row:
        for name in ("winner", "best_ready", "best_derived"):
            document[name] = Found(**document[name]) if document[name] else None
        return cls(**document)

    @classmethod
    def of(cls, result: dict[str, Any], key: tuple[str, float, str, int], trials: int, **more: Any) -> Row:
        """From result.json."""
        rungs, validation, gain = result["quality_tier"]["rungs"], result["validation"], result.get("gain_over_ready")
        validated = (validation or {"tau": {}})["tau"].get(VALIDATED)
        return cls(
            *key,
            trials=trials,
            winner=Found.of(result, "winner"),
            best_ready=Found.of(result, "best_ready"),
            best_derived=Found.of(result, "best_derived"),
            tau={str(rung["epochs"]): rung["tau"]["tau"] for rung in rungs if rung["tau"]["tau"] is not None},
            ranked={str(rung["epochs"]): rung["networks"] for rung in rungs},
            final_tau=validated and validated["tau"],
            validated=validation["networks"] if validated else 0,
            gain=gain and [gain["points"], gain["low"], gain["high"]],
            trial_s=round(sum(phase["seconds"] for phase in result["breakdown"]), 1),
            epochs=result["accuracy"]["epochs"],
            **more,
        )


@dataclass
class Spent:
    """Seconds of a search's processes, over all runs of its command; a file keeps them."""

    path: Path
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @classmethod
    def of(cls, path: Path) -> Spent:
        return cls(path, **(json.loads(path.read_text()) if path.is_file() else {}))

    @contextmanager
    def counting(self) -> Iterator[None]:
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            yield
        finally:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.cpu_s += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            self.wall_s += time.monotonic() - begun
            self.path.write_text(json.dumps({"cpu_s": self.cpu_s, "wall_s": self.wall_s}))


def rows_of(out: Path) -> list[Row]:
    path = out / "race.jsonl"
    return [Row.read(json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def latencies(args: argparse.Namespace) -> None:
    """Measure the ready networks side by side at one thread."""
    subprocess.run([sys.executable, "-m", "nas.cli", *bench_command(args.out)], check=True)


def bench_command(out: Path) -> list[str]:
    networks = [f"{name}@{px}" for name in (*READY, *CNNS) for px in (64, 96, 128)]
    return ["bench", *networks, "--threads", "1", "--csv", str(out / "latencies.csv")]


def run(args: argparse.Namespace) -> None:
    """Run what is not there yet, race first; stop before a search that would begin after the time."""
    until = time.monotonic() + 60 * args.minutes
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    for seed, budget, method in itertools.product(range(args.seeds), args.budget, args.methods):
        rows = {row.key: row for row in rows_of(args.out)}
        key, race = (args.data.name, budget, method, seed), rows.get((args.data.name, budget, "race", seed))
        if key in rows:
            continue
        if time.monotonic() > until:
            return
        study = f"{args.data.name}-{budget:g}ms-{method}-{seed}"
        if method != "race" and race is None:
            print(f"{study}: not run, as it is to have what the race had, which has no row", flush=True)
            continue
        folder, spent = args.out / study, Spent.of(args.out / f"{study}.spent.json")
        command = [*search_command(args, budget, method, seed), *bounds(method, race, spent), "--study", study]
        with spent.counting():
            code = subprocess.run([sys.executable, "-m", "nas.cli", *command]).returncode
        if code == 130:
            return
        result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").is_file() else {}
        if code not in (0, 1) or not result.get("accuracy"):
            print(f"{study}: exit code {code}, no final accuracies: no row; the same command goes on", flush=True)
            continue
        trials = len((folder / "trials.csv").read_text().splitlines()) - 1
        row = Row.of(result, key, trials, cpu_s=round(spent.cpu_s, 1), wall_s=round(spent.wall_s, 1), commit=commit)
        with (args.out / "race.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)
        shutil.rmtree(folder / "training", ignore_errors=True)


def search_command(args: argparse.Namespace, budget: float, method: str, seed: int) -> list[str]:
    command = ["search", "--latency-budget", f"{budget}ms", "--threads", "1", "--data", str(args.data)]
    command += [] if method == "scratch" else ["--weights-from", str(args.zoo)]
    command += ["--seed", str(seed), "--out", str(args.out), *METHODS[method], *args.options]
    return command + (["--resolution", str(args.px)] if args.px else [])


def bounds(method: str, race: Row | None, spent: Spent) -> list[str]:
    """What makes another search equal to its race: the epochs of final trainings, and of a random one the time that the
    race's trials took, less what earlier runs of it have spent."""
    if method == "race" or race is None:
        return []
    epochs = ["--final-epochs", str(race.epochs)]
    if method != "random":
        return epochs
    return [*epochs, "--trials", str(MANY), "--timeout", f"{max(1, round(race.trial_s - spent.wall_s))}s"]


# The table


COLUMNS = (
    "data",
    "budget, ms",
    "race",
    "best ready",
    "best derived",
    "scratch",
    "random derived",
    "race - ready",
    "derived - ready",
    "race - scratch",
    "derived - random",
    "tau of rung 0 with the last",
    "with full trainings",
    "CPU min: race, scratch, random",
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for data, budget in sorted({(row.data, row.budget_ms) for row in rows}):
        by = {method: [row for row in rows if row.key[:3] == (data, budget, method)] for method in METHODS}
        race, scratch, random = by["race"], by["scratch"], by["random"]
        minutes = [[row.cpu_s / 60 for row in by[method]] for method in METHODS]
        lines.append(
            [
                data,
                f"{budget:g}",
                *(networks(race, which) for which in ("winner", "best_ready", "best_derived")),
                networks(scratch, "winner"),
                networks(random, "best_derived"),
                within(race, "winner", "best_ready"),
                within(race, "best_derived", "best_ready"),
                between(means(race, "winner"), means(scratch, "winner")),
                between(means(race, "best_derived"), means(random, "best_derived")),
                ", ".join(f"{row.tau['0']:.2f} ({row.ranked.get('0', '?')})" for row in race if "0" in row.tau),
                ", ".join(f"{row.final_tau:.2f} ({row.validated})" for row in race if row.final_tau is not None),
                ", ".join(f"{statistics.fmean(each):.0f}" if each else "-" for each in minutes),
            ]
        )
    return lines


def means(rows: Sequence[Row], which: str) -> list[float]:
    """Mean top-1 of a network in percent, one a search: final trainings of one search share their network."""
    return [found.mean for row in rows if (found := getattr(row, which)) is not None]


def networks(rows: Sequence[Row], which: str) -> str:
    """A network of each search, with its kind, latency in ms of its own run, and mean top-1."""
    found = [each for row in rows if (each := getattr(row, which)) is not None]
    return "; ".join(f"{each.name} ({each.kind}), {each.latency_ms:.2f}: {each.mean:.1f}" for each in found)


def within(rows: Sequence[Row], one: str, other: str) -> str:
    """The mean difference of two networks of each search, in points: of one search with its own interval, where the two
    are those of its gain; of several with Student's."""
    pairs = [(getattr(row, one), getattr(row, other), row.gain) for row in rows]
    known = [(a, b, gain) for a, b, gain in pairs if a is not None and b is not None]
    differences = [a.mean - b.mean for a, b, _ in known]
    if len(known) == 1:
        (a, b, gain), points = known[0], differences[0]
        if gain is not None and a != b and abs(points - gain[0]) < 1e-6:
            return told(points, gain[1], gain[2])
    if len(known) < 2 or len({*differences}) < 2:
        return f"{statistics.fmean(differences):+.1f}" if known else ""
    interval = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return told(statistics.fmean(differences), interval.low, interval.high)


def between(one: Sequence[float], other: Sequence[float]) -> str:
    """The difference of means over searches, in points; with Welch's 95% interval where both have two or more."""
    if not one or not other:
        return ""
    mean = statistics.fmean(one) - statistics.fmean(other)
    if min(len(one), len(other)) < 2:
        return f"{mean:+.1f}"
    interval = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return told(mean, interval.low, interval.high)


def told(points: float, low: float, high: float) -> str:
    return f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring, running, telling = (verbs.add_parser(name) for name in ("latencies", "run", "table"))
    running.add_argument("data", type=Path)
    running.add_argument("zoo", type=Path)
    for each in (measuring, running, telling):
        each.add_argument("out", type=Path)
    running.add_argument("--budget", type=float, action="append", required=True, help="ms; repeatable")
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--px", type=int, help="one resolution; otherwise it is searched")
    running.add_argument("--minutes", type=float, default=60, help="begin no search after that")
    running.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    running.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of the search")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.verb == "latencies":
        latencies(args)
    elif args.verb == "run":
        run(args)
    for line in (COLUMNS, ["---"] * len(COLUMNS), *table(rows_of(args.out))):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
