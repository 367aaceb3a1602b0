"""A training pass in the supernet against the same network alone, the largest and the smallest of each space.

    python tests/benchmarks/bench_supernet.py [FAMILY ...] [--device cuda] [--batch 128] [--resolution 224] [--pairs 20]

Forward and backward pass of one batch, in turns, in one run: the median of the pairs' ratios and its 95% interval
(goal: 1.15 at the largest). Beside it, in milliseconds: zeroing all gradients and an AdamW update of the owner, which a
step of four candidates does once, and putting a new candidate together, which a step does twice.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from nas.measure.samples import median_interval
from nas.training.candidate import Candidate
from nas.training.supernet import Supernet
from search_spaces import Arch, table
from search_spaces.registry import FAMILIES

GOAL = 1.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="default: efficientvit shvit levit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
    slow = 0
    print(
        "| family | candidate | M params | in the supernet ms | alone ms | ratio | 95% |\n|---|---|---|---|---|---|---|"
    )
    for family in options.families or ("efficientvit", "shvit", "levit"):
        net = Supernet.over(family, 1000, options.resolution)
        net.to(options.device)
        for name, arch in (("largest", net.largest), ("smallest", net.smallest)):
            ours, theirs, ratios = compare(net, arch, options)
            low, high = median_interval(ratios)
            middle = statistics.median(ratios)
            slow += name == "largest" and middle > GOAL
            row = f"{ours * 1e3:.1f} | {theirs * 1e3:.1f} | {middle:.3f} | {low:.3f}..{high:.3f}"
            print(f"| {family} | {name} | {table(arch).params() / 1e6:.1f} | {row} |", flush=True)
        update, build = overheads(net, options.device)
        print(f"{family}: zeroing and AdamW {update * 1e3:.1f} ms, a new candidate {build * 1e3:.1f} ms", flush=True)
    print(f"{slow} of the largest above {GOAL}")
    return int(slow > 0)


def compare(net: Supernet, arch: Arch, options: argparse.Namespace) -> tuple[float, float, list[float]]:
    """Median seconds in the supernet and alone, and the sorted ratios of the pairs."""
    images = torch.randn(options.batch, 3, arch.resolution, arch.resolution, device=options.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=options.device)
    candidate = net.candidate(arch)
    candidate.model.train()
    alone = FAMILIES[arch.family].build(arch).to(options.device).train()

    def shared() -> None:
        candidate.begin()
        F.cross_entropy(candidate(images), labels).backward()
        candidate.finish()

    def single() -> None:
        alone.zero_grad()
        F.cross_entropy(alone(images), labels).backward()

    pairs = []
    for i in range(-2, options.pairs):
        order = (shared, single) if i % 2 else (single, shared)
        found = {run: seconds(run, options.device) for run in order}
        if i >= 0:
            pairs.append((found[shared], found[single]))
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return ours, theirs, sorted(a / b for a, b in pairs)


def overheads(net: Supernet, device: str) -> tuple[float, float]:
    """Median seconds of zeroing the gradients and an AdamW update, and of making a random candidate."""
    optimizer = torch.optim.AdamW(net.owner.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)

    def update() -> None:
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()

    def build() -> None:
        Candidate(net._draw(rng), net.owner, net._entries)

    return tuple(statistics.median(seconds(run, device) for _ in range(5)) for run in (update, build))


def seconds(run: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
