"""Fine-tuning against its own probe, and against timm's usual script recipe at equal epochs.

    python tests/benchmarks/bench_finetune.py DATA ZOO LITE OUT [--minutes 60] [--only tin20]

DATA has tin20/, catsdogs/ and cifar10/, each with train/ and val/ (or test/); of CIFAR-10 2,000 images are used. ZOO
has NAME.safetensors of this project's networks, trained at 64 px; LITE is what `lite_weights.py` writes. OUT gets
finetune.jsonl, one row for each network, data, method, number of epochs and seed. One thread, one process; rows that
are there are skipped, and the most telling come first. All of them take days; `--summary` prints what there is. CPU
seconds are counted, so others may use the machine; VITNAS_LOCKS=FOLDER lets no measurement make it wait.

probe: `vitnas train --probe`. ours: the recipe `finetune`, probe and trials of the learning rate included. timm: SGD
with Nesterov momentum 0.9 from 0.01 along a cosine, batches of 64, weight decay 2e-5, BatchNorm training, crops of 8%
or more of an image, smoothed labels, a new random head.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ttest_ind
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed
from torch import nn

from nas.data.batches import loader
from nas.data.images import Augmentation
from nas.intervals import of_mean
from nas.networks.targets import find_target
from nas.training.evaluation import evaluate
from nas.training.inputs import first_network, open_inputs
from nas.training.recipes import FINETUNE
from nas.training.request import TrainRequest, choose_recipe
from nas.training.run import train

METHODS = ("probe", "ours", "timm")
BATCH = 64
TRAIN_IMAGES, VAL_IMAGES = 2000, {"tin20": 1000, "catsdogs": 2000, "cifar10": 1000}
ZOO_PX, ZOO_CLASSES = 64, 100


class Subject(NamedTuple):
    data: str
    network: str
    """A published name of this project, whose weights are in the zoo, or timm/NAME."""
    px: int


class Cell(NamedTuple):
    subject: Subject
    epochs: int
    seed: int


M0, M1, M2, SHVIT = "efficientvit_m0", "efficientvit_m1", "efficientvit_m2", "shvit_s1"
LITE0, LITE1, LITE2 = (f"timm/tf_efficientnet_lite{size}" for size in range(3))
ZOO = tuple(Subject(data, network, 64) for network in (M0, M1, SHVIT, M2) for data in VAL_IMAGES)
LITES = {
    px: tuple(Subject(data, network, px) for network in (LITE0, LITE1, LITE2) for data in VAL_IMAGES)
    for px in (64, 128)
}
LARGE = Subject("catsdogs", LITE0, 128)


@dataclass(frozen=True)
class Row:
    data: str
    network: str
    px: int
    method: str
    epochs: int
    """0 of a probe."""
    seed: int
    top1: float
    """Percent, of `images` test images."""
    images: int
    cpu_s: float
    kept: str | None = None
    """Of ours, what was kept, "probe" or "tuned"."""
    lr: float | None = None
    """Of ours, the rate that its trials chose."""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, int, str, int, int]:
        return self.data, self.network, self.px, self.method, self.epochs, self.seed


def cells() -> Iterator[Cell]:
    """Each once, the most telling first."""
    plan = [
        (LARGE, 3, 0),
        *((subject, epochs, seed) for seed in range(3) for epochs in (3, 1, 10) for subject in ZOO),
        *((subject, 3, seed) for seed in range(3) for subject in LITES[64]),
        *((subject, 30, 0) for subject in ZOO),
        *((subject, 3, seed) for seed in range(3) for subject in LITES[128]),
        *(
            (subject, epochs, seed)
            for epochs in (1, 10, 30)
            for seed in range(3)
            for px in LITES
            for subject in LITES[px]
        ),
        *((subject, 30, seed) for seed in (1, 2) for subject in ZOO),
    ]
    yield from (Cell(*each) for each in dict.fromkeys(plan))


class Bench:
    def __init__(self, data: Path, zoo: Path, lite: Path, out: Path) -> None:
        self.data, self.zoo, self.lite, self.out = data, zoo, lite, out
        self.file = out / "finetune.jsonl"
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()

    def rows(self) -> list[Row]:
        if not self.file.is_file():
            return []
        return [Row(**json.loads(line)) for line in self.file.read_text().splitlines()]

    def run(self, methods: Sequence[str], only: str | None, until: float) -> None:
        def done() -> set[tuple[str, str, int, str, int, int]]:
            """Read each time: another process may write too."""
            return {row.key for row in self.rows()}

        for subject, epochs, seed in cells():
            for method in methods:
                key = (*subject, method, 0 if method == "probe" else epochs, seed)
                if key in done() or (only is not None and only not in f"{subject.data}-{subject.network}-{subject.px}"):
                    continue
                if time.monotonic() > until:
                    return
                row = self.measure(subject, method, key[4], seed)
                with self.file.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                print(row, flush=True)

    def measure(self, subject: Subject, method: str, epochs: int, seed: int) -> Row:
        """Train once; the folder of the training is removed."""
        request = self.request(subject, method, epochs, seed)
        begun = time.process_time()
        if method == "timm":
            top1, images, kept, lr = *usual(request), None, None
        else:
            result = train(request)
            assert result is not None
            assert result.top1 is not None
            assert result.images is not None
            top1, images, kept = result.top1, result.images, result.kept
            lr = float(result.recipe["peak_lr"]) if epochs else None
        spent = time.process_time() - begun
        shutil.rmtree(request.folder, ignore_errors=True)
        return Row(*subject, method, epochs, seed, top1, images, round(spent, 1), kept, lr, self.commit)

    def request(self, subject: Subject, method: str, epochs: int, seed: int) -> TrainRequest:
        recipe = choose_recipe(FINETUNE.name, max(epochs, 1))
        if method == "timm":
            recipe = replace(recipe, augmentation=Augmentation(scale=0.08), from_probe=False)
        timms = subject.network.startswith("timm/")
        return TrainRequest(
            model=subject.network if timms else self.zoo_arch(subject.network),
            recipe=recipe,
            device="cpu",
            folder=self.out / f"run-{os.getpid()}",
            data=str(self.images(subject.data)),
            resolution=subject.px,
            weights=None if timms else str(self.zoo / f"{subject.network}.safetensors"),
            weights_from=self.lite if timms else None,
            probe=method == "probe",
            seed=seed,
        )

    def zoo_arch(self, name: str) -> str:
        """The arch.json of a network of the zoo."""
        path = self.out / f"{name}.json"
        arch = find_target(name).arch
        assert arch is not None
        path.write_text(arch.at(ZOO_PX).replace(num_classes=ZOO_CLASSES).to_json())
        return str(path)

    def images(self, name: str) -> Path:
        """A folder of links to the images that are used, equally many of each class."""
        folder = self.out / name
        if not folder.is_dir():
            draft = folder.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            val = next(part for part in ("val", "test") if (self.data / name / part).is_dir())
            for part, source, count in (("train", "train", TRAIN_IMAGES), ("val", val, VAL_IMAGES[name])):
                classes = sorted(path for path in (self.data / name / source).iterdir() if path.is_dir())
                for each in classes:
                    (draft / part / each.name).mkdir(parents=True)
                    files = sorted(each.iterdir())
                    for at in np.random.default_rng(0).permutation(len(files))[: count // len(classes)]:
                        os.symlink(files[at].resolve(), draft / part / each.name / files[at].name)
            draft.rename(folder)
        return folder


def usual(request: TrainRequest) -> tuple[float, int]:
    """timm's script recipe on the network that `request` begins with: top-1 in percent, and the images judged."""
    inputs = open_inputs(request, lambda line: None)
    model: nn.Module = first_network(request, inputs, lambda line: None)[0]
    random_seed(request.seed)
    images, epochs = inputs.data.train, request.recipe.epochs
    batches = loader(images, BATCH, shuffle=True, seed=request.seed)
    updates = len(images) // BATCH
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01, momentum=0.9, weight_decay=2e-5)
    schedule = CosineLRScheduler(optimizer, t_initial=updates * epochs, t_in_epochs=False)
    model.to(memory_format=torch.channels_last)
    done = 0
    for epoch in range(epochs):
        model.train()
        batches.set_epoch(epoch)
        for x, y in batches:
            if len(y) < BATCH:
                continue
            schedule.step_update(done)
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y, label_smoothing=0.1).backward()
            optimizer.step()
            done += 1
    found = evaluate(model, loader(inputs.data.val, 256, shuffle=False, seed=0))
    return found.top1, found.total


# Summary


def difference(ours: Sequence[float], other: Sequence[float]) -> str:
    """Of means over seeds, in points, with Welch's 95% interval where both have two seeds or more."""
    mean = statistics.fmean(ours) - statistics.fmean(other)
    if min(len(ours), len(other)) < 2:
        return f"{mean:+.1f}"
    interval = ttest_ind(ours, other, equal_var=False).confidence_interval(0.95)
    return f"{mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def over_cells(differences: Sequence[float]) -> str:
    interval = of_mean(differences)
    ends = f" [{interval.low:+.1f}, {interval.high:+.1f}]" if interval is not None else ""
    return f"{statistics.fmean(differences):+.1f}{ends}"


COLUMNS = ("data", "network", "px", "epochs", "seeds", "probe", "timm", "ours", "ours - probe", "ours - timm", "CPU s")


def table(rows: Iterable[Row]) -> list[list[str]]:
    """A line for each network, data and number of epochs that ours was run for, and one with the mean of each number
    of epochs."""
    found: dict[tuple[Subject, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((Subject(row.data, row.network, row.px), row.method, row.epochs), []).append(row)
    lines: list[list[str]] = []
    for epochs in sorted({of for _, method, of in found if method == "ours"}):
        gains: dict[str, list[float]] = {"probe": [], "timm": []}
        for subject in sorted({subject for subject, method, of in found if method == "ours" and of == epochs}):
            runs = {
                method: found.get((subject, method, 0 if method == "probe" else epochs), [])
                for method in ("probe", "timm", "ours")
            }
            top1 = {method: [row.top1 for row in group] for method, group in runs.items()}
            against = {}
            for method, differences in gains.items():
                against[method] = difference(top1["ours"], top1[method]) if top1[method] else ""
                if top1[method]:
                    differences.append(statistics.fmean(top1["ours"]) - statistics.fmean(top1[method]))
            lines.append(
                [
                    subject.data,
                    subject.network,
                    str(subject.px),
                    str(epochs),
                    str(len(top1["ours"])),
                    *(f"{statistics.fmean(top1[each]):.1f}" if top1[each] else "" for each in runs),
                    *against.values(),
                    " / ".join(f"{statistics.fmean(r.cpu_s for r in group):.0f}" for group in runs.values() if group),
                ]
            )
        means = [over_cells(differences) if differences else "" for differences in gains.values()]
        lines.append(["mean", "", "", str(epochs), "", "", "", "", *means, ""])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "zoo", "lite", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="begin no training after that")
    parser.add_argument("--only", help="part of DATA-NETWORK-PX, such as catsdogs-timm/tf_efficientnet_lite0-128")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--summary", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.data, args.zoo, args.lite, args.out)
    if not args.summary:
        bench.run(args.methods, args.only, time.monotonic() + 60 * args.minutes)
    for line in (COLUMNS, ["---"] * len(COLUMNS), *table(bench.rows())):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
