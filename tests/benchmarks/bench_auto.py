"""Whether `vitnas search --precision auto` finds better networks than `--precision fp32`, within the same budgets.

    python tests/benchmarks/bench_auto.py --data FOLDER --weights FOLDER --out OUT [--minutes 120]

The first folder has train/ and val/: the search trains on train/ and judges by a third of val/; the rest nothing has
seen. The second one has pretrained weights, NAME.safetensors. Budgets are multiples (`TIMES`) of the latency of
EfficientViT-M0 in fp32 on the runtime, which is measured once. For each budget and seed both arms make a small search
at one resolution, thread and batch; which of them is first changes from seed to seed. A search takes over the parents
that others of its seed have tuned: tuning them depends on images, weights and seed, not on budget or precision. Then
the files that won are judged on the images that nothing has seen, and timed in one interleaved run.

What is timed, here and in the searches, is the measuring process's CPU time at one thread: on an idle machine that is
the latency, on a busy one it holds no waiting. --wall times by the clock, as `vitnas search` does for users.

OUT/auto.jsonl has a row for each budget and seed; those that are there are skipped, a search that was killed goes on,
and nothing begins after --minutes. With all rows, or as far as they are, a table is printed at the end.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import ttest_ind

from nas.data.dataset import open_data
from nas.evaluate.pairs import compare
from nas.evaluate.precision import HeldOut, judging
from nas.export.artifact import Exporter
from nas.export.side_by_side import measure_side_by_side
from nas.measure.device import settings_for
from nas.measure.runtime import Settings
from nas.measure.samples import Measurement, paired_ratio
from nas.networks.build import from_document
from nas.networks.counts import counts_of
from nas.search.folder import TRAINING_INPUTS
from search_spaces import get_arch

ARMS = ("fp32", "auto")
TIMES = (0.7, 1.0, 1.4)
BASE = "efficientvit_m0"
CLOCK = "import time\n\ntime.perf_counter_ns = time.process_time_ns  # which nas.measure.worker alone uses\n"
JUDGED = 3
"""One of so many images of val/ is for the search."""
ROUNDS = 40


@dataclass(frozen=True)
class Found:
    """The winner of a search, as its file is deployed."""

    name: str
    precision: str
    parent: str
    params_m: float
    told_top1: float
    """Percent, as the search tells it, of the images that it judged by."""
    top1: float
    """Percent of the images that nothing has seen."""
    latency_ms: float
    """Median of the interleaved run of both arms' winners."""
    ci_ms: tuple[float, float]
    cpu_s: float
    """Of the search and its processes, without the parents that others had tuned."""
    trials: int
    cut: int
    """Trials of networks that were cut from a parent."""

    @property
    def made(self) -> str:
        return f"cut from {self.parent}" if self.parent else self.name


@dataclass(frozen=True)
class Row:
    runtime: str
    times: float
    """The budget as a multiple of the latency of `BASE`."""
    budget_ms: float
    seed: int
    fp32: Found | None
    """None: nothing within the budget."""
    auto: Found | None
    points: float | None
    """Top-1 of auto's winner less fp32's, on the images that nothing has seen."""
    points_ci: tuple[float, float] | None
    """95%, paired image by image."""
    ratio: float | None
    """Latency of auto's winner over that of fp32's, the median over rounds."""
    ratio_ci: tuple[float, float] | None
    first: str
    """The arm that was searched first."""
    commit: str

    @classmethod
    def read(cls, line: str) -> Row:
        document = json.loads(line)
        return cls(**document | {arm: document[arm] and Found(**document[arm]) for arm in ARMS})


def rows_of(out: Path) -> list[Row]:
    path = out / "auto.jsonl"
    return [Row.read(line) for line in path.read_text().splitlines()] if path.is_file() else []


def split(data: Path, out: Path) -> tuple[Path, Path]:
    """Two data sets with the same train/: val/ of the first is for the search, that of the second for what it found."""
    searched, unseen = out / "data", out / "unseen"
    for folder in (searched, unseen):
        if not (folder / "train").is_dir():
            folder.mkdir(exist_ok=True)
            (folder / "train").symlink_to((data / "train").resolve())
    for label in sorted((data / "val").iterdir()):
        for number, image in enumerate(sorted(label.iterdir())):
            target = (unseen if number % JUDGED else searched) / "val" / label.name / image.name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(image.resolve())
    return searched, unseen


def base_ms(settings: Settings, px: int, out: Path) -> float:
    """The latency of `BASE`, measured once."""
    path = out / f"{settings.runtime}-base.json"
    if not path.is_file():
        network = get_arch(BASE).at(px)
        with Exporter() as exporter:
            found = measure_side_by_side(
                {BASE: network}, lambda each, stem: exporter.write(each, settings, stem), settings, ROUNDS
            )[BASE]
        assert isinstance(found, Measurement), found
        path.write_text(json.dumps(found.p50_ms))
    return float(json.loads(path.read_text()))


def search(arm: str, folder: Path, budget_ms: float, seed: int, args: argparse.Namespace, data: Path) -> float:
    """Make a search, or go on with it, and give the CPU seconds of this call.

    Raises: KeyboardInterrupt: Ctrl-C ended it.
    """
    words = ["search", "--latency-budget", f"{budget_ms:g}ms", "--data", data, "--weights-from", args.weights]
    words += ["--precision", arm, "--runtime", args.runtime, "--resolution", args.px, "--threads", 1]
    words += ["--trials", args.trials, "--final-epochs", args.final_epochs, "--seeds", 1, "--seed", seed]
    words += ["--train-threads", 1, "--out", args.out, "--study", folder.name, "--quiet", *args.options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-m", "nas.cli", *map(str, words)]
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code == 130:
        raise KeyboardInterrupt
    if code not in (0, 1):  # 1: nothing within the budget
        sys.exit(f"{folder.name}: exit code {code}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def share_parents(source: Path, target: Path) -> None:
    """Give a folder the parents that searches of the same seed have tuned, and the rates that they tried for them."""
    for part in ("parents", "rates"):
        if (source / "training" / part).is_dir():
            shutil.copytree(source / "training" / part, target / "training" / part, dirs_exist_ok=True)
            shutil.copyfile(source / TRAINING_INPUTS, target / TRAINING_INPUTS)


def shipped(folder: Path) -> tuple[Path, str] | None:
    """The file that a search's winner is deployed as, and its precision; None without a winner."""
    winner = json.loads((folder / "result.json").read_text())["winner"]
    if winner is None:
        return None
    own = folder / "best" / f"model.{winner['precision']}.onnx"
    return (own if own.is_file() else folder / "best" / "model.onnx"), winner["precision"]


def told(folder: Path, right: np.ndarray, timed: Measurement, cpu_s: float) -> Found:
    winner = json.loads((folder / "result.json").read_text())["winner"]
    with (folder / "trials.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    return Found(
        name=winner["label"],
        precision=winner["precision"],
        parent=winner["parent"],
        params_m=round(counts_of(from_document(json.dumps(winner["arch"]))).params / 1e6, 3),
        told_top1=winner["top1"],
        top1=round(100 * float(right.mean()), 2),
        latency_ms=timed.p50_ms,
        ci_ms=timed.ci_ms,
        cpu_s=round(cpu_s, 1),
        trials=len(trials),
        cut=sum(trial["kind"] == "derived" for trial in trials),
    )


def interleaved(files: Mapping[str, tuple[Path, str]], settings: Settings) -> dict[str, Measurement]:
    """Latencies of files in their precisions, in one run."""

    def copied(path: Path, stem: Path) -> Path:
        return Path(shutil.copyfile(path, f"{stem}.onnx"))

    paths = {arm: path for arm, (path, _) in files.items()}
    own = {arm: replace(settings, precision=precision) for arm, (_, precision) in files.items()}
    results = measure_side_by_side(paths, copied, own, ROUNDS) if files else {}
    for arm, found in results.items():
        assert isinstance(found, Measurement), (arm, found)
    return {arm: found for arm, found in results.items() if isinstance(found, Measurement)}


def row_of(times: float, seed: int, args: argparse.Namespace) -> Row:
    """Both searches of a budget and a seed, judged and timed."""
    data, unseen = split(args.data, args.out)
    settings = settings_for(args.runtime, threads=1)
    budget_ms = round(times * base_ms(settings, args.px, args.out), 3)
    order = ARMS if seed % 2 == 0 else ARMS[::-1]
    folders = {arm: args.out / f"{args.runtime}-{budget_ms:g}ms-{seed}-{arm}" for arm in order}
    seconds: dict[str, float] = {}
    store = args.out / f"parents-{seed}"
    for arm in order:
        share_parents(store, folders[arm])
        seconds[arm] = search(arm, folders[arm], budget_ms, seed, args, data)
        share_parents(folders[arm], store)
    files = {arm: file for arm in ARMS if (file := shipped(folders[arm])) is not None}
    images = open_data(unseen, args.px, None, 0)
    right: dict[str, np.ndarray] = {}
    for arm, (path, precision) in files.items():
        held_out = HeldOut.of(images.val, images.classes, path, arm)
        right[arm] = held_out.right(path, judging(args.runtime), 1, precision == "bf16")
    timed = interleaved(files, settings)
    found = {arm: told(folders[arm], right[arm], timed[arm], seconds[arm]) for arm in files}
    both = len(found) == len(ARMS)
    points = compare({arm: right[arm] for arm in ARMS})[0] if both else None
    ratio = paired_ratio(timed["auto"], timed["fp32"]) if both else None
    for arm in ARMS:
        shutil.rmtree(folders[arm] / "training", ignore_errors=True)
    return Row(
        runtime=args.runtime,
        times=times,
        budget_ms=budget_ms,
        seed=seed,
        fp32=found.get("fp32"),
        auto=found.get("auto"),
        points=points.difference if points else None,
        points_ci=points.difference_ci if points else None,
        ratio=ratio[0] if ratio else None,
        ratio_ci=ratio[1] if ratio else None,
        first=order[0],
        commit=subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip(),
    )


COLUMNS = (
    "runtime",
    "budget, ms",
    "fp32: top-1",
    "ms",
    "auto: top-1",
    "ms",
    "its precisions",
    "auto less fp32, points (Welch, 95%)",
)
PAIRS = (
    "budget, ms",
    "seed",
    "fp32: network",
    "top-1",
    "ms",
    "auto: network",
    "precision",
    "top-1",
    "ms",
    "points (95%)",
    "verdict",
    "latency ratio (95%)",
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line a budget: means over seeds."""
    lines = []
    for runtime, times in sorted({(row.runtime, row.times) for row in rows}):
        here = [row for row in rows if (row.runtime, row.times) == (runtime, times)]
        pairs = [(row.fp32, row.auto) for row in here if row.fp32 and row.auto]
        if not pairs:
            continue
        one, other = ([pair[i] for pair in pairs] for i in range(2))
        lines.append(
            [
                runtime,
                f"{here[0].budget_ms:.3g} ({times:g} x {BASE})",
                f"{statistics.fmean(each.top1 for each in one):.1f}",
                f"{statistics.fmean(each.latency_ms for each in one):.3f}",
                f"{statistics.fmean(each.top1 for each in other):.1f}",
                f"{statistics.fmean(each.latency_ms for each in other):.3f}",
                ", ".join(each.precision for each in other),
                difference([each.top1 for each in other], [each.top1 for each in one]),
            ]
        )
    return lines


def pairs(rows: Sequence[Row]) -> list[list[str]]:
    """A line a pair of searches."""
    lines = []
    for row in sorted(rows, key=lambda each: (each.runtime, each.times, each.seed)):
        budget = [f"{row.budget_ms:.3g} ({row.times:g} x M0)", f"{row.seed}"]
        one, other = (
            [each.made, f"{each.top1:.2f}", f"{each.latency_ms:.3f}"] if each else ["nothing", "", ""]
            for each in (row.fp32, row.auto)
        )
        told = ["", "", ""]
        if row.points is not None and row.points_ci is not None and row.ratio is not None and row.ratio_ci is not None:
            low, high = row.points_ci
            verdict = "gain" if low > 0 else "loss" if high < 0 else "tie"
            told = [
                f"{row.points:+.2f} ({low:+.2f} to {high:+.2f})",
                verdict,
                "{:.2f} ({:.2f} to {:.2f})".format(row.ratio, *row.ratio_ci),
            ]
        lines.append([*budget, *one, other[0], row.auto.precision if row.auto else "", *other[1:], *told])
    return lines


def difference(one: Sequence[float], other: Sequence[float]) -> str:
    """Of means, with Welch's 95% interval where both have two or more."""
    mean = statistics.fmean(one) - statistics.fmean(other)
    if len(one) < 2 or (len({*one}) == 1 and len({*other}) == 1):
        return f"{mean:+.1f}"
    interval = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return f"{mean:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120, help="begin no search after that")
    parser.add_argument("--runtime", default="openvino", help="onnxruntime or openvino")
    parser.add_argument("--wall", action="store_true", help="time by the clock; for a quiet machine")
    parser.add_argument("--times", type=float, action="append", help=f"a budget; repeatable  [default: {TIMES}]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--final-epochs", type=int, default=3)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of the searches")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.wall:
        clock = args.out / "clock"
        clock.mkdir(exist_ok=True)
        (clock / "sitecustomize.py").write_text(CLOCK)
        sys.path.insert(0, str(clock.resolve()))  # of all processes that are started
    until = time.monotonic() + 60 * args.minutes
    for seed, times in itertools.product(range(args.seeds), args.times or TIMES):
        if (args.runtime, times, seed) in {(row.runtime, row.times, row.seed) for row in rows_of(args.out)}:
            continue
        if time.monotonic() > until:
            break
        row = row_of(times, seed, args)
        with (args.out / "auto.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)
    for columns, lines in ((COLUMNS, table(rows_of(args.out))), (PAIRS, pairs(rows_of(args.out)))):
        for line in (columns, ["---"] * len(columns), *lines):
            print(f"| {' | '.join(line)} |")
        print()


if __name__ == "__main__":
    main()
