"""What a search that starts from pretrained weights finds, beside the ready network that a user would fine-tune.

    python tests/benchmarks/bench_race.py latencies OUT            (once, on a quiet machine: budgets to choose from)
    python tests/benchmarks/bench_race.py run DATA ZOO OUT --budget 0.6 --budget 0.75 [--px 64] [--minutes 60]
    python tests/benchmarks/bench_race.py table OUT

DATA is a folder with train/ and val/; ZOO has the pretrained weights, NAME.safetensors (`--weights-from`). Each row of
OUT/race.jsonl is one command, as a user types it, at one thread on ONNX Runtime: race: `vitnas search --data`; scratch:
the same with `--from-scratch`; random: the same with `--sampler random`, whose best derived network counts. A race's
row also holds the best ready network, fine-tuned by the same recipe from the same seeds. Rows that are there are
skipped, and a run that was killed goes on. CPU seconds are those of the command and all its processes.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

METHODS = {"race": [], "scratch": ["--from-scratch"], "random": ["--sampler", "random"]}
READY = ("efficientvit_m0", "efficientvit_m1", "efficientvit_m2", "shvit_s1", "levit_128s")
CNNS = ("timm/lcnet_050", "timm/mobilenetv4_conv_small_050", "timm/tf_efficientnet_lite0")


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


@dataclass(frozen=True)
class Row:
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

    @property
    def key(self) -> tuple[str, float, str, int]:
        return self.data, self.budget_ms, self.method, self.seed

    @classmethod
    def read(cls, document: dict[str, Any]) -> Row:
        for name in ("winner", "best_ready", "best_derived"):
            document[name] = Found(**document[name]) if document[name] else None
        return cls(**document)


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
        if (args.data.name, budget, method, seed) in {row.key for row in rows_of(args.out)}:
            continue
        if time.monotonic() > until:
            return
        study = f"{args.data.name}-{budget:g}ms-{method}-{seed}"
        command = [sys.executable, "-m", "nas.cli", *search_command(args, budget, method, seed), "--study", study]
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        code = subprocess.run(command).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if code == 130:
            return
        result = json.loads((args.out / study / "result.json").read_text())
        row = Row(
            data=args.data.name,
            budget_ms=budget,
            method=method,
            seed=seed,
            cpu_s=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            wall_s=round(time.monotonic() - begun, 1),
            trials=len((args.out / study / "trials.csv").read_text().splitlines()) - 1,
            winner=Found.of(result, "winner"),
            best_ready=Found.of(result, "best_ready"),
            best_derived=Found.of(result, "best_derived"),
            tau={str(rung["epochs"]): rung["tau"]["tau"] for rung in result["quality_tier"].get("rungs", [])},
            commit=commit,
        )
        with (args.out / "race.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)
        shutil.rmtree(args.out / study / "training", ignore_errors=True)


def search_command(args: argparse.Namespace, budget: float, method: str, seed: int) -> list[str]:
    command = ["search", "--latency-budget", f"{budget}ms", "--threads", "1", "--data", str(args.data)]
    command += [] if method == "scratch" else ["--weights-from", str(args.zoo)]
    command += ["--seed", str(seed), "--out", str(args.out), *METHODS[method], *args.options]
    return command + (["--resolution", str(args.px)] if args.px else [])


def difference(one: Sequence[float], other: Sequence[float]) -> str:
    """Of means in points, with Welch's 95% interval where both have two or more."""
    if not one or not other:
        return ""
    mean = statistics.fmean(one) - statistics.fmean(other)
    if min(len(one), len(other)) < 2:
        return f"{mean:+.1f}"
    interval = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return f"{mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


COLUMNS = ("data", "budget ms", "race", "ready", "scratch", "random", "race - ready", "race - scratch", "CPU min")


def table(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for data, budget in sorted({(row.data, row.budget_ms) for row in rows}):
        here = [row for row in rows if (row.data, row.budget_ms) == (data, budget)]

        def top1(method: str, which: str, here: Sequence[Row] = tuple(here)) -> list[float]:
            found = [getattr(row, which) for row in here if row.method == method]
            return [value for each in found if each is not None for value in each.top1]

        race, ready = top1("race", "winner"), top1("race", "best_ready")
        scratch, random = top1("scratch", "winner"), top1("random", "best_derived")
        minutes = [row.cpu_s / 60 for row in here if row.method == "race"]
        lines.append(
            [
                data,
                f"{budget:g}",
                *(f"{statistics.fmean(each):.1f}" if each else "" for each in (race, ready, scratch, random)),
                difference(race, ready),
                difference(race, scratch),
                f"{statistics.fmean(minutes):.0f}" if minutes else "",
            ]
        )
    return lines


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
