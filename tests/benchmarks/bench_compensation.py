"""Right after a cut: what compensation keeps, by criterion, budget and network, and from how many images.

    python tests/benchmarks/bench_compensation.py --data FOLDER --weights FOLDER --out FOLDER [--networks NAMES]
    python tests/benchmarks/bench_compensation.py --data FOLDER --weights FOLDER --out FOLDER --part images
    python tests/benchmarks/bench_compensation.py --data FOLDER --weights FOLDER --out FOLDER --part tuning
    python tests/benchmarks/bench_compensation.py --data FOLDER --weights FOLDER --out FOLDER --part latency
    python tests/benchmarks/bench_compensation.py --out FOLDER --table      (print what is finished)

Each network has the weights of `--weights`/NAME.safetensors, at their 64 pixels, and a linear probe on the training
images of `--data` for a classifier. It is cut once to shares of its MACs, by several criteria, scored on 512 training
images; top-1 on 2,000 validation images right after the cut, with BatchNorm's statistics taken again, and with
compensation from the same images, their labels unseen. `--part images`: by the number of images. Nothing is fine-tuned
in these two.

`--part tuning`: the cut networks fine-tuned as `vitnas prune --no-distill` does it (AdamW along a cosine, BatchNorm
frozen), but in batches of 64, for half an epoch, two and eight, each a training of its own; beside them the whole
network and each ready network of NETWORKS that is smaller, given the same.

`--part latency`, on a quiet machine: `vitnas prune --no-reallocate --finetune 0` to 0.7x and 0.5x of the latency, which
is judged on all validation images up to 5,000; at the end all of these networks and the ready ones in one interleaved
run. What cannot be reached, or was kept waiting, is told, has no row, and is tried again by the same command.

On a free core: 15 seconds a row, of which compensation is 1 to 6; with four networks 15 minutes, 5 for `--part images`
and some 2 hours for `--part tuning`, 16 rows a network; `--part latency` has 10 rows a network, of a minute or two. A
run that was stopped goes on; runs of other networks may share `--out`.
"""

import argparse
import copy
import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_pruning import METHODS, PLAIN, Method, spread
from pruning_bench import Rows, markdown, say
from torch import Tensor, nn

from nas.bench.request import BenchRequest
from nas.bench.run import bench
from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.data.images import Images, sample
from nas.errors import UserError
from nas.intervals import of_share
from nas.measure.runtime import Settings
from nas.networks.targets import find_target
from nas.prune.request import PruneRequest, parse_pruning_budget
from nas.prune.run import prune
from nas.prune.steps import FINETUNE_LR
from nas.quality.ready import own_pixels, with_weights
from nas.training.fit import fit
from nas.training.probe import find_features, fit_probe, install, without_dead
from nas.training.statistics import take_statistics
from pruning.compensation import compensate
from pruning.importance import score
from pruning.slicing import origins_of, slice_weights
from pruning.units import Scores, anatomy, cut
from search_spaces import Arch, create_model, get_arch, table

NETWORKS = ("efficientvit_m0", "efficientvit_m1", "efficientvit_m2", "shvit_s1")
PX = 64
SHARES = (0.7, 0.5, 0.35)
NAMES = (PLAIN, "uniform (taylor within a width)", "torch-pruning's default", "magnitude", "random")
SCORED = 512
COUNTS = (32, 128, 512)
EVALUATED = 2_000
BATCH = 64
EPOCHS = (0.5, 2, 8)
TUNED = ((PLAIN, True), (PLAIN, False), ("torch-pruning's default", True), ("magnitude", True), ("random", True))
"""Methods that are tuned after the cut, and whether they are compensated first."""
WHOLE = "whole"
"""A network without a cut."""
BUDGETS = ("0.7x", "0.5x")
BY_LATENCY = (("taylor", True), ("taylor", False), ("torch-pruning", True), ("magnitude", True), ("random", True))
"""Criteria that cut to a latency, and whether what they leave is compensated."""
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A network with a probe, and the images that score and repair it and judge it."""

    name: str
    arch: Arch
    model: nn.Module
    calibration: Images
    """The training images, not augmented."""
    scored: Batches
    """512 of them."""
    judges: Batches
    train: Images
    """Augmented."""
    val: Images
    """Those that `judges` are some of, in the order of their classes."""
    top1: float
    scores: dict[tuple[str, int], Scores] = field(default_factory=dict)
    """By criterion and seed, those that are known."""


def batches(images: Images) -> Batches:
    return list(loader(images, BATCH, shuffle=False, seed=0))


@torch.no_grad()
def top1(model: nn.Module, judges: Batches) -> float:
    model.eval()
    hits = sum((model(images).argmax(1) == labels).sum().item() for images, labels in judges)
    return 100 * hits / sum(len(labels) for _, labels in judges)


def subject(name: str, data: Path, weights: Path) -> Subject:
    whole = open_data(data, PX, None, seed=0)
    arch = get_arch(name).replace(num_classes=len(whole.classes)).at(PX)
    images = whole.at(PX, pixels=own_pixels(arch))
    train, judges = batches(images.calibration), batches(sample(images.val, EVALUATED, seed=0))
    model = with_weights(arch, weights / f"{name}.safetensors").eval()
    found = find_features(model, train)
    install(model, fit_probe(without_dead(found.values), found.labels, len(whole.classes), seed=0))
    scored = batches(sample(images.calibration, SCORED, seed=0))
    return Subject(name, arch, model, images.calibration, scored, judges, images.train, images.val, top1(model, judges))


def cells(of: Subject, share: float, name: str, seed: int, counts: tuple[int, ...]) -> list[dict[str, object]]:
    """A row for each number of images."""
    method: Method = METHODS[name]
    parts = anatomy(of.arch)
    key = method.criterion, seed
    if key not in of.scores:
        of.scores[key] = score(of.model, parts, of.scored, method.criterion, seed)
    scores = of.scores[key]
    found = cut(parts, scores, method.choose(parts, scores, share * table(of.arch).macs(), True))
    state = of.model.state_dict()
    sliced = slice_weights(of.arch, state, found.arch, found.select, found.blocks)
    child = create_model(found.arch)
    child.load_state_dict(sliced)
    restated = copy.deepcopy(child)
    take_statistics(restated, of.scored)
    row = {"network": of.name, "share": share, "method": name, "seed": seed, "dense": of.top1}
    row |= {"macs": table(found.arch).macs() / table(of.arch).macs(), "blocks": len(found.blocks)}
    row |= {"cut": top1(child, of.judges), "statistics": top1(restated, of.judges)}
    inputs, origins = torch.cat([x for x, _ in of.scored]), origins_of(of.arch, found.arch, found.select, found.blocks)
    inputs = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))]  # they are by class
    rows = []
    for count in counts:
        used = time.process_time()
        repaired, layers = compensate(of.arch, state, found.arch, sliced, origins, inputs[:count])
        used = time.process_time() - used
        child.load_state_dict(repaired)
        after = {"images": count, "layers": layers, "cpu_s": round(used, 1), "compensated": top1(child, of.judges)}
        rows.append(row | after)
    return rows


def tuned(of: Subject, start: nn.Module, epochs: float, seed: int) -> float:
    """Top-1 of a copy after fine-tuning."""
    model = copy.deepcopy(start)
    train = loader(of.train, BATCH, shuffle=True, seed=seed)
    fit(model, train, round(epochs * len(of.train)), FINETUNE_LR, seed=seed, batch_norm="frozen")
    return top1(model, of.judges)


def after_cut(of: Subject, share: float, name: str, compensated: bool, seed: int) -> nn.Module:
    """The network cut to a share of its MACs."""
    method, parts = METHODS[name], anatomy(of.arch)
    key = method.criterion, seed
    if key not in of.scores:
        of.scores[key] = score(of.model, parts, of.scored, method.criterion, seed)
    found = cut(parts, of.scores[key], method.choose(parts, of.scores[key], share * table(of.arch).macs(), True))
    state = of.model.state_dict()
    weights = slice_weights(of.arch, state, found.arch, found.select, found.blocks)
    if compensated:
        inputs = torch.cat([x for x, _ in of.scored])
        inputs = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))]
        origins = origins_of(of.arch, found.arch, found.select, found.blocks)
        weights = compensate(of.arch, state, found.arch, weights, origins, inputs)[0]
    child = create_model(found.arch)
    child.load_state_dict(weights)
    return child.eval()


def tune_all(of: Subject, shares: list[float], seed: int, rows: Rows) -> None:
    """A row for each cut, and one for the whole network."""
    cuts = [(share, name, compensated) for share in shares for name, compensated in TUNED]
    for share, name, compensated in [(1.0, WHOLE, False), *cuts]:
        if rows.has(network=of.name, share=share, method=name, compensated=compensated, seed=seed):
            continue
        used = time.process_time()
        model = of.model if name == WHOLE else after_cut(of, share, name, compensated, seed)
        row = {"network": of.name, "share": share, "method": name, "compensated": compensated, "seed": seed}
        row |= {"macs": table(model.arch).macs(), "dense": of.top1, "top1_0": top1(model, of.judges)}
        row |= {f"top1_{epochs:g}": tuned(of, model, epochs, seed) for epochs in EPOCHS}
        row |= {"cpu_s": round(time.process_time() - used)}
        rows.add(row)
        say(str(row))


def cut_to_latencies(network: str, data: Path, weights: Path, seeds: list[int], out: Path, rows: Rows) -> None:
    """A row for each budget and criterion, pruned by the command itself; what fails is told, and has none."""
    for budget, (name, compensated) in itertools.product(BUDGETS, BY_LATENCY):
        for seed in seeds if name == "random" else (0,):
            cell = {"network": network, "budget": budget, "method": name, "compensated": compensated, "seed": seed}
            if rows.has(**cell):
                continue
            request = PruneRequest(
                model=str(ready_file(network, out)),
                budget=parse_pruning_budget(latency=budget),
                settings=Settings(),
                folder=out / "latency" / network / f"{budget}-{name}{'' if compensated else '-not-compensated'}-{seed}",
                reallocate=False,
                criterion=name,
                compensate=compensated,
                finetune=0,
                data=str(data),
                weights=str(weights / f"{network}.safetensors"),
                seed=seed,
            )
            try:
                found = prune(request, say=say)
            except UserError as error:
                say(f"{request.folder}: {error}")
                continue
            if found.failures:
                say(f"{request.folder}: {'; '.join(found.failures)}")
                continue
            after = found.accuracy.pruned
            row = cell | {"folder": str(request.folder), "verdict": str(found.budget.verdict)}
            row |= {"macs": found.after.macs / found.before.macs, "dense": found.accuracy.before.top1}
            row |= {"cut": after.top1, "cut_ci": after.top1_ci, "seconds": found.phases.get("compensating", 0.0)}
            rows.add(row)
            say(str(row))


def ready_file(network: str, out: Path) -> Path:
    """The arch.json of an unpruned network, which is written."""
    path = out / f"{network}.json"
    path.write_text(get_arch(network).at(PX).to_json())
    return path


def measure(rows: Rows, out: Path) -> None:
    """Latencies of all cut networks and the ready ones, in one interleaved run, by their names."""
    ready = [str(ready_file(network, out)) for network in dict.fromkeys(row["network"] for row in rows.rows)]
    named = [*ready, *(row["folder"] for row in rows.rows)]
    found = bench(BenchRequest([find_target(name) for name in named], [Settings()], rounds=40), say=say)
    for line in found.errors:
        say(line)
    measured = {row.model: [row.latency_ms, *row.ci, row.waiting] for row in found.rows}
    (out / "compensation-latency-ms.json").write_text(json.dumps(measured, indent=1) + "\n")


def show_latency(rows: Rows, out: Path) -> None:
    path = out / "compensation-latency-ms.json"
    measured = json.loads(path.read_text()) if path.exists() else {}

    def ms(name: str) -> str:
        if name not in measured:
            return "not measured"
        median, low, high, waiting = measured[name]
        return "waiting times" if waiting else f"{median:.3f} [{low:.3f}, {high:.3f}]"

    lines = []
    for network in dict.fromkeys(row["network"] for row in rows.rows):
        own = [row for row in rows.rows if row["network"] == network]
        whole = ms(str(out / f"{network}.json")), f"{own[0]['dense']:.1f}"
        lines.append([network, "", WHOLE, "", "", "1.00x", *whole, "", ""])
        for row in own:
            low, high = row["cut_ci"]
            method = row["method"] + ", compensated" * row["compensated"]
            figures = [f"{row['macs']:.2f}x", ms(row["folder"]), f"{row['dense']:.1f}"]
            figures += [f"{row['cut']:.1f} [{low:.1f}, {high:.1f}]", f"{row['seconds']:.1f}"]
            lines.append([network, row["budget"], method, row["seed"], row["verdict"], *figures])
    header = ("network", "budget", "method", "seed", "closing run", "MACs", "ms", "dense", "as cut", "seconds")
    print(markdown(header, lines))


def show_tuned(rows: Rows) -> None:
    """A line for the seeds of each network and method, with mean and deviation."""
    points = ["top1_0", *(f"top1_{epochs:g}" for epochs in EPOCHS)]
    alike: dict[tuple[str, float, str, bool], list[dict[str, Any]]] = {}
    for row in rows.rows:
        alike.setdefault((row["network"], row["share"], row["method"], row["compensated"]), []).append(row)
    lines = [
        [
            network,
            spread([row["macs"] / 1e6 for row in found]),
            method + ", compensated" * compensated,
            len(found),
            *(spread([row[point] for row in found]) for point in points),
            spread([row["cpu_s"] for row in found], 0),
        ]
        for (network, _, method, compensated), found in alike.items()
    ]
    header = ("network", "MMACs", "method", "seeds", "as cut", *(f"{epochs:g} epochs" for epochs in EPOCHS), "CPU s")
    print(markdown(header, lines))


def show(rows: Rows) -> None:
    def line(row: dict[str, Any]) -> list[str]:
        kept = of_share(row["compensated"], EVALUATED)
        figures = [f"{row[key]:.1f}" for key in ("dense", "cut", "statistics")]
        kept_text = f"{row['compensated']:.1f} [{kept.low:.1f}, {kept.high:.1f}]"
        counted = [f"{row['compensated'] / row['dense']:.0%}", str(row["images"]), str(row["cpu_s"])]
        return [row["network"], f"{row['macs']:.2f}x", row["method"], *figures, kept_text, *counted]

    header = ("network", "MACs", "method", "dense", "cut", "statistics", "compensated", "of dense", "images", "CPU s")
    print(markdown(header, map(line, rows.rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="image folder with train/ beside val/")
    parser.add_argument("--weights", type=Path, help="folder of NAME.safetensors, trained at 64 pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder of what was found")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the MACs")
    parser.add_argument("--seeds", default="0", help="of the criterion random, and of the tuning")
    parser.add_argument("--part", choices=("cuts", "images", "tuning", "latency"), default="cuts")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    args = parser.parse_args()
    if not args.table and (args.data is None or args.weights is None):
        parser.error("give --data and --weights, or --table")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / f"compensation-{args.part}.jsonl")
    networks = [] if args.table else args.networks.split(",")
    shares, seeds = list(map(float, args.shares.split(","))), list(map(int, args.seeds.split(",")))
    if args.part == "latency":
        for network in networks:
            cut_to_latencies(network, args.data, args.weights, seeds, args.out, rows)
        if networks and rows.rows:
            measure(rows, args.out)
        show_latency(rows, args.out)
        return
    names = NAMES if args.part == "cuts" else (PLAIN,)
    counts = (SCORED,) if args.part == "cuts" else COUNTS
    for network in networks:
        of = subject(network, args.data, args.weights)
        if args.part == "tuning":
            for seed in seeds:
                tune_all(of, shares, seed, rows)
            continue
        for share in shares:
            for name in names:
                for seed in seeds if name == "random" else (0,):
                    if not rows.has(network=network, share=share, method=name, seed=seed):
                        for row in cells(of, share, name, seed, counts):
                            rows.add(row)
                            say(str(row))
    (show_tuned if args.part == "tuning" else show)(rows)


if __name__ == "__main__":
    main()
