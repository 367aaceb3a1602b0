"""One budget, equal fine-tuning: what criteria, the choice across axes and reallocation buy.

    python tests/benchmarks/bench_pruning.py --data FOLDER --out FOLDER [--budget 0.5] [--seeds 0,1,2] [--methods NAMES]
    python tests/benchmarks/bench_pruning.py --data FOLDER --out FOLDER --table      (print what is finished)
    python tests/benchmarks/bench_pruning.py --data FOLDER --out FOLDER --measure    (latencies, on a quiet machine)

EfficientViT-M0 at 96 pixels is trained, cut to half its MACs (or --budget) in three rounds with re-scoring, and
fine-tuned on 24,000 images, with three seeds, each with a dense network of its own. What a cut leaves is not refitted
(bench_compensation.py does that), and the learning rate is ten times that of `vitnas prune`. Accuracy on 5,000 test
images before fine-tuning and after 2,000, 8,000 and all images of the one fine-tuning (the learning rate is still high
at the first two). The method "ours, other weights" is ours with the weights drawn anew: what is the architecture's
part. Two methods tie when their means differ by less than the pooled standard deviation over seeds.

On a free core: 4 minutes for each dense network, then a minute or a minute and a half for a method and seed (with all
methods, an hour). A run that was stopped goes on; runs with other seeds or methods may share `--out`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pruning_bench import (
    ARCHS,
    Data,
    InOrder,
    Rows,
    Shuffled,
    child,
    common_arguments,
    dense,
    dense_top1,
    markdown,
    prepare,
    save,
    say,
)
from timm.utils import random_seed
from torch import nn

from nas.training.evaluation import evaluate
from nas.training.fit import fit
from pruning.allocation import Costs, allocate
from pruning.importance import score
from pruning.units import KNOB_KINDS, Anatomy, Scores, Settings, anatomy
from search_spaces import Arch, create_model, table

NETWORK = "efficientvit_m0"
ROUNDS = 3
MULTIPLE = 8
POINTS = (0, 2_000, 8_000, 24_000)
LR = 1e-3
UNIFORM = ("ffn", "qk", "v", "embed")
Choose = Callable[[Anatomy, Scores, float, bool], Settings]
"""(network, scores, target in MACs, last round) -> settings."""


def across(*kinds: str, reallocate: bool = False) -> Choose:
    """Our allocation over all knobs of these kinds (of all kinds without any)."""

    def choose(parts: Anatomy, scores: Scores, target: float, last: bool) -> Settings:
        costs = Costs(parts, "macs")
        return allocate(parts, scores, costs, target, kinds or tuple(KNOB_KINDS), MULTIPLE, reallocate and last)

    return choose


def uniform(parts: Anatomy, scores: Scores, target: float, last: bool) -> Settings:
    """The same share of every width, to the nearest multiple of MULTIPLE. Widths that the largest share within the
    target rounds down go up, one after another, while the target allows."""
    knobs = [knob for knob in parts.knobs if knob.kind in UNIFORM]

    def sizes(share: float) -> dict[str, int]:
        return {k.name: min(k.size, max(MULTIPLE, MULTIPLE * round(share * k.size / MULTIPLE))) for k in knobs}

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if macs_at(parts, sizes(middle)) <= target else (low, middle)
    settings, above = sizes(low), sizes(high)
    for name, size in above.items():
        if macs_at(parts, settings | {name: size}) <= target:
            settings[name] = size
    return settings


def macs_at(parts: Anatomy, settings: Mapping[str, int]) -> float:
    costs, sizes = Costs(parts, "macs"), parts.sizes
    total = costs.base
    for knob in parts.knobs:
        change = settings.get(knob.name, knob.size) - knob.size
        if change:
            total += costs.difference(knob, change, sizes, ())
            for name in (knob.width, *knob.follows):
                sizes[name] += change
    return total


@dataclass(frozen=True)
class Method:
    criterion: str
    choose: Choose
    fresh: bool = False


NO_BLOCKS = tuple(kind for kind in KNOB_KINDS if kind != "blocks")
OURS, PLAIN = "ours, with reallocation", "ours, without (taylor)"
METHODS = {
    OURS: Method("taylor", across(reallocate=True)),
    PLAIN: Method("taylor", across()),
    "uniform (taylor within a width)": Method("taylor", uniform),
    "torch-pruning's default": Method("torch-pruning", across()),
    "magnitude": Method("magnitude", across()),
    "random": Method("random", across()),
    "taylor2, without reallocation": Method("taylor2", across()),
    "ours, other weights": Method("taylor", across(reallocate=True), fresh=True),
    "magnitude, no blocks": Method("magnitude", across(*NO_BLOCKS)),
    "random, no blocks": Method("random", across(*NO_BLOCKS)),
    "torch-pruning's default, no blocks": Method("torch-pruning", across(*NO_BLOCKS)),
    "ours without reallocation, no blocks": Method("taylor", across(*NO_BLOCKS)),
}
DENSE = "dense, fine-tuned as well"


def pruned(
    model: nn.Module, arch: Arch, method: Method, budget: float, data: Data, seed: int
) -> tuple[nn.Module, Arch]:
    """Cut a network to a share of its MACs in ROUNDS rounds (at 1x, reallocation alone, in one)."""
    own = table(arch).macs()
    rounds = ROUNDS if budget < 1 else 1
    for number in range(1, rounds + 1):
        parts = anatomy(arch)
        scores = score(model, parts, data.calibration(arch.resolution), method.criterion, seed)
        target = own * budget ** (number / rounds)
        model, arch = child(model, parts, scores, method.choose(parts, scores, target, number == rounds), seed)
    if method.fresh:
        random_seed(seed)
        model = create_model(arch)
    return model, arch


def curve(model: nn.Module, data: Data, resolution: int, seed: int) -> dict[str, float]:
    """Fine-tune in place; top-1 at POINTS."""
    test = InOrder(data.test, resolution)
    found = {"top1_0": evaluate(model, test).top1}
    left = list(POINTS[1:])

    def watch(done: int, total: int, loss: float) -> None:
        if left and done >= left[0]:
            found[f"top1_{left.pop(0)}"] = evaluate(model, test).top1
            model.train()

    fit(model, Shuffled(data.train, resolution, 100 + seed), POINTS[-1], LR, seed=seed, progress=watch)
    return found


def cell(name: str, budget: float, seed: int, data: Data, out: Path) -> dict[str, object]:
    started, used = time.time(), time.process_time()
    model, arch = dense(NETWORK, data, seed, out)
    if name != DENSE:
        model, arch = pruned(model, arch, METHODS[name], budget, data, seed)
        save(model, arch, folder(out, budget, name, seed) / "pruned")
    counts = table(arch)
    found = curve(model, data, arch.resolution, seed)
    save(model, arch, folder(out, budget, name, seed))
    return {
        "method": name,
        "seed": seed,
        "macs": counts.macs(),
        "params": counts.params(),
        **found,
        "wall_s": round(time.time() - started),
        "cpu_s": round(time.process_time() - used),
    }


def folder(out: Path, budget: float, name: str, seed: int) -> Path:
    return out / f"{budget:g}x" / "".join(c if c.isalnum() else "-" for c in name) / str(seed)


def latency_file(out: Path, budget: float) -> Path:
    return out / f"latency-{budget:g}x.json"


def measure(rows: Rows, budget: float, out: Path, threads: int) -> None:
    """Latency of every finished cell's network next to its dense one, in one interleaved run."""
    from nas.bench.request import BenchRequest
    from nas.bench.run import bench
    from nas.measure.runtime import Settings as MeasureSettings
    from nas.networks.targets import find_target

    targets = [find_target(str(out / f"{NETWORK}-dense-0"))]
    cells = [row for row in rows.rows if row["method"] != DENSE]
    targets += [find_target(str(folder(out, budget, row["method"], row["seed"]))) for row in cells]
    found = bench(BenchRequest(targets, [MeasureSettings(threads=threads)], rounds=40))
    for line in found.errors:
        say(line)
    latency_file(out, budget).write_text(json.dumps({row.model: row.ratio for row in found.rows}, indent=1) + "\n")


def spread(values: list[float], digits: int = 1) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def verdict(ours: list[float], theirs: list[float]) -> str:
    """Ours against another method, seed by seed in the same order: a tie below the pooled standard deviation."""
    if len(ours) < 2:
        return "one seed"
    each = np.subtract(ours, theirs)
    pooled = math.sqrt((np.var(ours, ddof=1) + np.var(theirs, ddof=1)) / 2)
    word = "tie" if abs(each.mean()) < pooled else "ours better" if each.mean() > 0 else "ours worse"
    return f"{word}: {each.mean():+.1f} ± {each.std(ddof=1):.1f}, spread {pooled:.1f}"


def show(rows: Rows, budget: float, out: Path, network: tuple[int, int], before: Mapping[int, float]) -> None:
    measured_in = latency_file(out, budget)
    latencies = json.loads(measured_in.read_text()) if measured_in.exists() else {}
    print(f"Dense: {network[0] / 1e6:.2f} MMACs, {network[1] / 1e6:.2f} M parameters, ", end="")
    print(f"top-1 {spread(list(before.values()))} ({', '.join(f'{value:.1f}' for value in before.values())})\n")
    found = {name: [row for row in rows.rows if row["method"] == name] for name in (*METHODS, DENSE)}
    lines, against = [], []
    for name, cells in found.items():
        if not cells:
            continue
        cells = sorted(cells, key=lambda row: row["seed"])
        measured = [latencies.get(str(folder(out, budget, name, row["seed"]))) for row in cells if name != DENSE]
        lines.append(
            [
                name,
                len(cells),
                spread([row["macs"] / network[0] for row in cells], 3),
                spread([row["params"] / network[1] for row in cells], 3),
                spread(measured, 2) if measured and None not in measured else "not measured",
                *(spread([row[f"top1_{point}"] for row in cells]) for point in POINTS),
            ]
        )
        if found[OURS] and name not in (OURS, DENSE):
            shared = {row["seed"] for row in cells} & {row["seed"] for row in found[OURS]}
            at = {
                which: [[r[f"top1_{p}"] for r in some if r["seed"] in shared] for p in POINTS]
                for which, some in (("ours", sorted(found[OURS], key=lambda r: r["seed"])), ("theirs", cells))
            }
            against.append([name, *(verdict(a, b) for a, b in zip(at["ours"], at["theirs"], strict=True))])
    points = [f"top-1 after {point:,}" if point else "top-1 before fine-tuning" for point in POINTS]
    print(markdown(("method", "seeds", "MACs", "parameters", "latency", *points), lines))
    print("MACs, parameters, latency: relative to dense. Mean and standard deviation over seeds.\n")
    print(
        "Ours with reallocation against each, in points of top-1: mean and deviation of the differences seed by seed,"
    )
    print("then the pooled standard deviation over seeds, below which the means tie:\n")
    print(markdown(("against", *points), against))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the dense network's MACs; 1: reallocate")
    parser.add_argument("--methods", help="names, separated by semicolons; all without it")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    parser.add_argument("--measure", action="store_true", help="measure the latencies of what is finished and print")
    args = parser.parse_args()
    data = prepare(args)
    rows = Rows(args.out / f"pruning-{args.budget:g}x.jsonl")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.measure:
        measure(rows, args.budget, args.out, args.threads)
    elif not args.table:
        names = args.methods.split(";") if args.methods else [*METHODS, DENSE]
        for seed in seeds:
            for name in names:
                if not rows.has(method=name, seed=seed):
                    row = cell(name, args.budget, seed, data, args.out)
                    rows.add(row)
                    say(str(row))
    counts = table(ARCHS[NETWORK][0](data.classes))
    trained = [seed for seed in seeds if (args.out / f"{NETWORK}-dense-{seed}" / "training.json").exists()]
    before = {seed: dense_top1(NETWORK, seed, args.out) for seed in trained}
    show(rows, args.budget, args.out, (counts.macs(), counts.params()), before)


if __name__ == "__main__":
    main()
