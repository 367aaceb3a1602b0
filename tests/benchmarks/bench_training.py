"""Our modules in training against timm's: step time, and the loss curve at equal weights, images and recipe.

    python tests/benchmarks/bench_training.py [--data PATH] [--resolution 224] [--batch 32] [--updates 40]

One process, one thread; ours and timm's take turns, in both orders. The ratio is the median over pairs, with its 95%
interval; goal: at most 1.05. With --data the loss curves of ours, of timm's with equal weights, and of timm's from
another seed are compared, and the loader alone is timed beside a step.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.measure.samples import median_interval
from nas.training.recipes import RECIPES
from nas.training.updater import Updater
from search_spaces import create_model, get_arch
from search_spaces.api import find_variant
from search_spaces.weights import fit, translate

NAMES = ("levit_128s", "efficientvit_m0", "shvit_s1", "deit_tiny")
PAIRS = 15


def pair(name: str, resolution: int, classes: int, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's with equal weights."""
    torch.manual_seed(seed)
    _, variant = find_variant(name)
    sized = {} if name.startswith("shvit") else {"img_size": resolution}
    theirs = timm.create_model(variant.timm, num_classes=classes, **sized)
    ours = create_model(get_arch(name, classes).replace(resolution=resolution))
    fit(ours, translate(theirs.state_dict(), ours.arch, ours.state_dict()))
    return ours, theirs


def step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        logits = model(images)
        F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, labels).backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def step_times(name: str, resolution: int, batch: int) -> None:
    images = torch.randn(batch, 3, resolution, resolution).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))
    ours, theirs = (step_of(model, images, labels) for model in pair(name, resolution, 1000))
    timed(ours), timed(theirs)
    ratios, speeds = [], []
    for i in range(PAIRS):
        first, second = (ours, theirs) if i % 2 else (theirs, ours)
        a, b = timed(first), timed(second)
        a, b = (a, b) if i % 2 else (b, a)
        ratios.append(a / b)
        speeds.append(batch / a)
    low, high = median_interval(sorted(ratios))
    print(
        f"| {name} | {np.median(ratios):.3f} | {low:.3f}..{high:.3f} | {np.median(speeds):.0f} |",
        flush=True,
    )


def curves(name: str, given: list[tuple[Tensor, Tensor]], resolution: int, classes: int) -> None:
    """Losses of ours, of timm's with equal weights, and of timm's from another seed."""
    ours, theirs = pair(name, resolution, classes)
    _, other = pair(name, resolution, classes, seed=1)
    ours, theirs, other = (curve(model, given) for model in (ours, theirs, other))
    half = len(given) // 2
    print(
        f"| {name} | {abs(ours - theirs)[:5].max():.1e} | {abs(ours - theirs)[half:].mean():.3f} | "
        f"{abs(other - theirs)[half:].mean():.3f} | {theirs[0]:.2f} to {theirs[half:].mean():.2f} |",
        flush=True,
    )


def curve(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    recipe = replace(RECIPES["quick"], batch_size=len(given[0][1]))
    if hasattr(model, "distilled_training"):
        model.distilled_training = False
    updater = Updater(model.train(), recipe, len(given), "cpu")
    return np.array([updater.step(i, [one]).item() for i, one in enumerate(given)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--data")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--updates", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | step time to timm's | 95% | images/s |\n|---|---|---|---|")
    for name in args.names:
        step_times(name, args.resolution, args.batch)
    if args.data:
        images = open_data(args.data, args.resolution, None, 0).train
        made = loader(images, args.batch, shuffle=True, seed=0)
        begun = time.perf_counter()
        given = list(itertools.islice(made, args.updates))
        speed = args.updates * args.batch / (time.perf_counter() - begun)
        print(f"\nthe loader alone, no worker: {speed:.0f} images/s\n")
        print(
            "| network | first 5 losses | later, ours to timm's | later, timm's seeds | loss |\n|---|---|---|---|---|"
        )
        for name in args.names:
            curves(name, given, args.resolution, max(images.labels) + 1)


if __name__ == "__main__":
    main()
