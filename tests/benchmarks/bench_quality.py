"""How well each quality tier ranks networks that are then trained fully: Kendall's tau on real images.

Each call adds networks to a JSONL, one line each, and prints the table; a killed run loses the network it was at.

    python tests/benchmarks/bench_quality.py --data PATH --networks 12            (about 4 CPU-minutes a network)
    python tests/benchmarks/bench_quality.py --data PATH --parent efficientvit_m1 (adds the inherit tier to every line)
    python tests/benchmarks/bench_quality.py                                      (prints the table)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.data.images import sample
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.inherit import InheritTier
from nas.quality.parent import SCORED_IMAGES
from nas.quality.plan import TrainingPlan
from nas.quality.ranking import Tau, tau
from nas.quality.surrogate import Surrogate, TrainedNetwork, describe
from nas.quality.trained import HalvingTier
from nas.quality.trainer import CandidateTrainer, Parent
from nas.search.validate import SEED
from pruning.importance import score
from pruning.units import anatomy
from search_spaces import Arch, get_arch, table
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

RESULTS = Path(__file__).parent / "quality.jsonl"
SMALLEST, LARGEST = 0.4, 1.3
"""Sizes drawn, in MACs of the family's smallest published network."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--family", default="efficientvit", choices=list(FAMILIES))
    parser.add_argument("--networks", type=int, default=0, help="lines of the family in the file, in total")
    parser.add_argument("--seeds", type=int, default=1, help="full trainings of each network")
    parser.add_argument("--parent", help="published network, trained first on the same images: adds the inherit tier")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--images", type=int, default=3_000)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--final-epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.out)
    if args.data:
        for row in work(args, rows):
            rows = [old for old in rows if old["digest"] != row["digest"]] + [row]
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['family']} {row['digest'][:8]}: {row['rungs']} then {row['top1']}", flush=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['family']}, {json.dumps(row['settings'])}", []).append(row)
    for name, alike in groups.items():
        print_table(name, alike)


def read(path: Path) -> list[dict[str, Any]]:
    """A network's last line counts."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return list({row["digest"]: row for row in map(json.loads, lines)}.values())


def work(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines that are new, or know more than before."""
    data = open_data(args.data, args.resolution, None, 0)
    with tempfile.TemporaryDirectory() as folder:
        plan = TrainingPlan(args.data, args.images, args.epochs, args.final_epochs, 1, 0)
        trainer = CandidateTrainer(data, plan, 0, "cpu", Path(folder) / "training", list, lambda *_: None)
        tier = HalvingTier(trainer)
        settings = {"images": trainer.used, "resolution": args.resolution, "epochs": args.final_epochs}
        mine = {row["digest"]: row for row in rows if row["family"] == args.family}
        for arch in draw(args.family, args.resolution, len(data.classes)):
            if len(mine) >= args.networks:
                break
            if arch.digest() in mine:
                continue
            begun = time.process_time()
            short = tier.complete(Candidate(arch), counts_of(arch))
            cost = time.process_time() - begun
            mine[arch.digest()] = {
                "family": arch.family,
                "digest": arch.digest(),
                "params": table(arch).params(),
                "macs": table(arch).macs(),
                "rungs": short.training.to_json()["rungs"],
                "cpu_seconds": {"train": cost},
                "top1": [full(tier, arch, SEED)],
                "settings": settings,
                "arch": arch.model_dump(mode="json"),
            }
            yield mine[arch.digest()]
        for row in mine.values():
            while len(row["top1"]) < args.seeds:
                row["top1"].append(full(tier, arch_of(row), SEED + len(row["top1"])))
                yield row
        if args.parent:
            brief = replace(plan, epochs=3)
            heirs = replace(trainer, plan=brief)
            heir = InheritTier(replace(heirs, parent=parent_of(args, tier)))
            for row in mine.values():
                if "inherited" not in row:
                    begun, arch = time.process_time(), arch_of(row)
                    rungs = heir.complete(Candidate(arch), counts_of(arch)).training.to_json()["rungs"]
                    row["inherited"] = rungs
                    row["cpu_seconds"]["inherit"] = time.process_time() - begun
                    yield row


def parent_of(args: argparse.Namespace, tier: HalvingTier) -> Parent:
    """A published network trained for twice the epochs of a full training, on the images a search uses."""
    trainer = tier.trainer
    arch = get_arch(args.parent, len(trainer.data.classes)).at(args.resolution)
    images, judge = trainer.split(args.resolution)
    training = tier.begin(Candidate(arch), images, tier.recipe(2 * args.final_epochs), 0, trainer.folder / "parent")
    training.run()
    print(f"parent {args.parent}: {trainer.judge(training.network, judge).top1:.1f} %", flush=True)
    scored = list(loader(sample(images, SCORED_IMAGES, 0), 32, shuffle=False, seed=0))
    scores = score(training.network, anatomy(arch), scored, "taylor")
    return Parent(args.parent, arch, training.network.state_dict(), scores)


def draw(family: str, resolution: int, classes: int) -> Iterator[Arch]:
    """Networks of the family's space near its smallest published one in MACs, always in the same order."""
    space = FAMILIES[family].space
    smallest = min(
        table(space.arch(v.values, classes).at(resolution)).macs() for v in FAMILIES[family].variants.values()
    )
    rng = np.random.default_rng(1)
    while True:
        arch = space.decode(random_params(rng), classes, resolution)
        if SMALLEST <= table(arch).macs() / smallest <= LARGEST:
            yield arch


def full(tier: HalvingTier, arch: Arch, seed: int) -> float:
    """Top-1 on the images that judge after a full training on all the others that a search uses."""
    images, judge = tier.trainer.split(arch.resolution)
    recipe = tier.recipe(tier.trainer.plan.final_epochs)
    training = tier.begin(Candidate(arch), images, recipe, seed, tier.trainer.folder / f"{arch.digest()[:16]}-{seed}")
    training.run()
    return tier.trainer.judge(training.network, judge).top1


def arch_of(row: dict[str, Any]) -> Arch:
    return Arch.from_json(json.dumps(row["arch"]))


def print_table(family: str, rows: list[dict[str, Any]]) -> None:
    truth = [float(np.mean(row["top1"])) for row in rows]
    print(f"\n{family}: {len(rows)} networks, {min(truth):.1f} to {max(truth):.1f} % after full training")
    columns = {"params": [row["params"] for row in rows], "MACs": [row["macs"] for row in rows]}
    for epochs in rows[0]["rungs"]:
        columns[f"train, {epochs} epochs"] = [row["rungs"][epochs] for row in rows]
    last = max(map(int, rows[0]["rungs"]))
    trained = [known(row, last) for row in rows]
    columns["train, with surrogate"] = [Surrogate(trained, last).predict(one.features).value for one in trained]
    columns["surrogate, left out"] = [
        Surrogate([other for other in trained if other is not one], last).predict(one.features).value for one in trained
    ]
    if all("inherited" in row for row in rows):
        for epochs in rows[0]["inherited"]:
            columns[f"inherit, {epochs} epochs"] = [row["inherited"][epochs] for row in rows]
    again = [row for row in rows if len(row["top1"]) > 1]
    for name, values in columns.items():
        show(name, tau(values, truth), max(truth) - truth[int(np.argmax(values))])
    if len(again) > 3:
        name = f"another seed, {len(again)} networks"
        show(name, tau([row["top1"][1] for row in again], [row["top1"][0] for row in again]), None)
    for tier in ("train", "inherit"):
        costs = [row["cpu_seconds"][tier] for row in rows if tier in row["cpu_seconds"]]
        if costs:
            print(f"  {tier}: {np.median(costs):.0f} CPU-seconds a network")


def known(row: dict[str, Any], last: int) -> TrainedNetwork:
    arch = arch_of(row)
    return TrainedNetwork(
        row["digest"], describe(arch, counts_of(arch)), {int(e): top1 for e, top1 in row["rungs"].items()}
    )


def show(name: str, found: Tau, regret: float | None) -> None:
    """regret: points that the network it puts first lies below the best."""
    lost = "" if regret is None else f"   its first is {regret:.1f} points below the best"
    if found.tau is None or found.ci is None:
        print(f"  {name:<28} undefined{lost}")
    else:
        print(f"  {name:<28} tau {found.tau:5.2f}   95% {found.ci[0]:5.2f} to {found.ci[1]:5.2f}{lost}")


if __name__ == "__main__":
    main()
