"""The default trained search under a latency budget against what else a user could do, all trained by one recipe.

Contestants: the search's winner; the best of random networks within the budget, trained to the search's last rung for
as many epochs as the search trained in all; the prior tier's pick of as many trials; the published networks within the
budget, slowest first; CNNs from timm. Each is trained from several seeds on the images the search used and tested on
the data's validation part, which nothing else has seen; latencies are from one interleaved run.

    python tests/benchmarks/bench_search.py --data PATH --out FOLDER     (resumes; every stage is a file in FOLDER)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.data.images import sample
from nas.export.artifact import write_artifact
from nas.export.onnx import to_onnx
from nas.measure.device import compare, device_lock
from nas.measure.protocol import Measurer
from nas.measure.runtime import Settings
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.plan import TrainingPlan
from nas.quality.trained import HalvingTier
from nas.quality.trainer import CandidateTrainer
from nas.search.accuracy import Accuracies, compare_means, verdict
from nas.search.trial import reference_arch
from nas.training.engine import Training
from nas.training.evaluation import evaluate
from nas.training.recipes import RECIPES
from search_spaces import Arch, create_model, fold, get_arch, table
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

CNNS = ("lcnet_075", "mobilenetv3_small_100", "repghostnet_100")
TESTED_IMAGES = 5_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="0.8ms")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--final-epochs", type=int, default=18)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--published", type=int, default=2)
    parser.add_argument("--stage", choices=("cnns", "search", "train", "all"), default="all", help="stop after it")
    parser.add_argument("--only", nargs="+", help="train these contestants only, to share the work between processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = open_trainer(args)
    models: dict[str, dict[str, Any]] = {f"timm/{name}": {"timm": name} for name in CNNS}
    if args.stage != "cnns":
        arches = once(args.out / "contestants.json", lambda: contestants(args, trainer))
        models = {name: {"arch": arch} for name, arch in arches["arches"].items()} | models
    if args.stage == "search":
        return
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.only or models]
    for name, seed in jobs:
        once(result_path(args, name, seed), lambda n=name, s=seed: trained(args, trainer, models[n], s))
    if args.stage in ("cnns", "train"):
        return
    print_table(args, models, arches, once(args.out / "latency.json", lambda: latencies(args, models)))


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; made and written where there is none."""
    if not path.is_file():
        made = make()
        path.write_text(json.dumps(made))
        print(f"{path.name} done", flush=True)
    return json.loads(path.read_text())


def result_path(args: argparse.Namespace, name: str, seed: int) -> Path:
    return args.out / f"{name.replace('/', '-')}-{seed}.json"


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(runtime="onnxruntime", device="cpu", threads=1, batch_size=1)


def open_trainer(args: argparse.Namespace) -> CandidateTrainer:
    data = open_data(args.data, args.resolution, None, 0)
    plan = TrainingPlan(args.data, args.images, args.epochs, args.final_epochs, args.seeds, 0)
    return CandidateTrainer(data, plan, 0, "cpu", args.out / "training", list, lambda *_: None)


def contestants(args: argparse.Namespace, trainer: CandidateTrainer) -> dict[str, Any]:
    """Archs by role, and what finding each cost in CPU-seconds."""
    searched = search(args, "train", "--data", args.data, "--from-scratch", *training_words(args))
    prior = search(args, "prior", "--num-classes", str(len(trainer.data.classes)))
    budget_ms = searched["budget_ms"]
    found = {"search (train)": searched["winner"]["arch"], "search (prior)": prior["winner"]["arch"]}
    costs: dict[str, float] = {}
    epochs = trained_epochs(args)
    best, costs["random"] = random_search(args, trainer, budget_ms, epochs)
    print(f"the search trained {epochs} epochs in all", flush=True)
    found["random"] = best
    published = sorted(
        (row for row in searched["final"] if row["name"] and row["verdict"] == "fits"), key=lambda r: -r["latency_ms"]
    )
    for row in published[: args.published]:
        arch = get_arch(row["name"], len(trainer.data.classes)).at(args.resolution)
        found[row["name"]] = arch.model_dump(mode="json")
    costs["search (train)"] = costs["random"] * epochs / (epochs // args.epochs * args.epochs)
    return {"arches": found, "cpu_seconds": costs, "budget_ms": budget_ms}


def training_words(args: argparse.Namespace) -> list[str]:
    return [
        *("--train-images", str(args.images), "--epochs", str(args.epochs)),
        *("--final-epochs", "1", "--seeds", "1"),
    ]


def search(args: argparse.Namespace, tier: str, *words: str) -> dict[str, Any]:
    """`vitnas search`'s JSON."""
    command = [
        *(
            sys.executable,
            "-m",
            "nas.cli",
            "search",
            "--latency-budget",
            args.budget,
            "--threads",
            "1",
            "--no-cache",
            "--json",
        ),
        *("--resolution", str(args.resolution), "--trials", str(args.trials), "--seed", "0"),
        *("--study", tier, "--out", str(args.out), *words),
    ]
    begun = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    print(f"{tier} search: {time.monotonic() - begun:.0f} s", flush=True)
    return json.loads(done.stdout)


def trained_epochs(args: argparse.Namespace) -> int:
    """Epochs that all of a search's candidates together were trained for."""
    import optuna

    from nas.search.trainings import results_of
    from nas.study.storage import open_storage

    storage = open_storage(args.out / "train" / "study.journal", read_only=True)
    study = optuna.load_study(study_name="train", storage=storage)
    return sum(max(each.rungs) for each in results_of(study))


def random_search(
    args: argparse.Namespace, trainer: CandidateTrainer, budget_ms: float, epochs: int
) -> tuple[dict[str, Any], float]:
    """The best on the images that judge of random networks within the budget, each trained to the last rung, for as
    many epochs together as given; and the CPU-seconds of their trainings."""
    rng, tier = np.random.default_rng(0), HalvingTier(trainer)
    best, top1, seconds = None, -1.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        reference = write_artifact(reference_arch(), settings_of(args), Path(folder) / "reference")
        with device_lock("cpu"), Measurer(settings_of(args), reference, Path(folder)) as measurer:
            measurer.measure(reference)
            for _ in range(epochs // args.epochs):
                while True:
                    family = list(FAMILIES)[rng.integers(len(FAMILIES))]
                    space = FAMILIES[family].space
                    arch = space.decode(random_params(rng), len(trainer.data.classes), args.resolution)
                    measurer.prepare()
                    path = write_artifact(arch, settings_of(args), Path(folder) / "candidate")
                    if measurer.measure(path, budget_ms).p50_ms <= budget_ms:
                        break
                begun = time.process_time()
                rungs = tier.complete(Candidate(arch), counts_of(arch)).training.rungs
                seconds += time.process_time() - begun
                print(f"random {family}: {rungs}", flush=True)
                if rungs[args.epochs] > top1:
                    best, top1 = arch.model_dump(mode="json"), rungs[args.epochs]
    return best, seconds


def build(what: Mapping[str, Any], args: argparse.Namespace, classes: int) -> nn.Module:
    if "arch" in what:
        return create_model(Arch.from_json(json.dumps(what["arch"])))
    import timm

    return timm.create_model(what["timm"], num_classes=classes)


def trained(args: argparse.Namespace, trainer: CandidateTrainer, what: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One full training by the recipe that searches end with."""
    torch.manual_seed(seed)
    images, _ = trainer.split(args.resolution)
    recipe = replace(RECIPES["quick"], epochs=args.final_epochs)
    begun = time.process_time()
    training = Training(build(what, args, len(trainer.data.classes)), images, recipe, seed=seed)
    training.run()
    tested = sample(trainer.data.at(args.resolution).val, TESTED_IMAGES, 0)
    found = evaluate(training.network, loader(tested, 64, shuffle=False, seed=0))
    return {"top1": found.top1, "images": found.total, "cpu_seconds": time.process_time() - begun}


def latencies(args: argparse.Namespace, models: Mapping[str, Any]) -> dict[str, Any]:
    """All contestants in one interleaved run."""
    with tempfile.TemporaryDirectory() as folder, device_lock("cpu"):
        paths = {}
        for name, what in models.items():
            paths[name] = Path(folder) / f"{len(paths)}.onnx"
            model = build(what, args, 10).eval()
            to_onnx(fold(model) if "arch" in what else reparameterised(model), paths[name], args.resolution, 1)
        results = compare(paths, settings_of(args), rounds=40)
    return {name: {"ms": one.p50_ms, "ci": one.ci_ms} for name, one in results.items()}


def reparameterised(model: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


def print_table(
    args: argparse.Namespace, models: Mapping[str, Any], arches: Mapping[str, Any], latency: Mapping[str, Any]
) -> None:
    found = {}
    print("| network | top-1 % | ms | 95% | M params | MMACs | CPU-minutes of training to find it |")
    print("|---" * 7 + "|")
    for name, what in models.items():
        rows = [json.loads(result_path(args, name, seed).read_text()) for seed in range(args.seeds)]
        top1 = [row["top1"] for row in rows]
        found[name] = Accuracies(name, top1, rows[0]["images"], sum(row["cpu_seconds"] for row in rows))
        shown = name
        if "arch" in what:
            arch = Arch.from_json(json.dumps(what["arch"]))
            shown = f"{name}: {arch.family}"
            size = f"{table(arch).params() / 1e6:.2f} | {table(arch).macs() / 1e6:.1f}"
        else:
            size = f"{sum(p.numel() for p in build(what, args, 10).parameters()) / 1e6:.2f} | "
        low, high = latency[name]["ci"]
        cost = arches["cpu_seconds"].get(name)
        print(
            f"| {shown} | {statistics.mean(top1):.1f} +- {statistics.stdev(top1):.1f} | {latency[name]['ms']:.2f} | "
            f"{low:.2f}..{high:.2f} | {size} | {'' if cost is None else f'{cost / 60:.1f}'} |"
        )
    for name, other in found.items():
        if name != "search (train)":
            print(verdict(compare_means(found["search (train)"], other), found["search (train)"], other))


if __name__ == "__main__":
    main()
