"""The surrogate on ViT-Bench-101's 300 really trained networks: Kendall's tau and error on networks it was not shown.

    python tests/benchmarks/bench_surrogate.py --table vitbench101.json

The table (Auto-Prox, AAAI 2024, Apache-2.0) lists 200 AutoFormer-Ti and 100 PiT architectures with their accuracies
after 300 epochs on small data sets. Each cell: tau / mean absolute error on the rest, and what the surrogate itself
says that error is (networks left out one by one), over 10 draws of n networks.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from nas.quality.surrogate import Surrogate, TrainedNetwork

EPOCHS = 300
DRAWS = 10
SIZES = (10, 20, 30, 50)
NOISE = 0.2
"""Points between seeds of so long a training, assumed: the table has one seed."""
TARGETS = {
    "pit": ("c100_base_acc", "c100_kd_acc", "flower_kd_acc", "chaoyang_kd_acc"),
    "autoformer": ("c100_kd_acc", "flower_kd_acc", "chaoyang_kd_acc"),
}


def autoformer(arch: dict[str, Any]) -> list[float]:
    """log2 parameters, log2 MACs, and its axes: one width, blocks with heads of 64 and an MLP ratio each."""
    width, tokens = arch["hidden_dim"], 197
    weights = [
        4 * width * heads * 64 + 2 * width * width * ratio
        for heads, ratio in zip(arch["num_heads"], arch["mlp_ratio"], strict=True)
    ]
    macs = sum(weights) * tokens + sum(2 * tokens**2 * heads * 64 for heads in arch["num_heads"])
    shape = [np.log2(width), np.log2(arch["depth"]), np.mean(np.log2(arch["num_heads"])), np.mean(arch["mlp_ratio"])]
    return [np.log2(sum(weights) + 768 * width), np.log2(macs), *shape]


def pit(arch: dict[str, Any]) -> list[float]:
    """log2 parameters, log2 MACs, and its axes: three stages of width base_dim x heads on grids of 27, 14 and 7."""
    widths = [arch["base_dim"] * heads for heads in arch["num_heads"]]
    params = macs = 0.0
    for depth, width, grid in zip(arch["depth"], widths, (27, 14, 7), strict=True):
        tokens, weights = grid * grid + 1, (4 + 2 * arch["mlp_ratio"]) * width**2
        params += depth * weights
        macs += depth * (weights * tokens + 2 * tokens**2 * width)
    shape = [np.log2(sum(arch["depth"])), arch["mlp_ratio"], np.log2(np.mean(arch["num_heads"]))]
    return [np.log2(params), np.log2(macs), *np.log2(widths), *shape]


FEATURES = {"pit": pit, "autoformer": autoformer}


def drawn(features: np.ndarray, top1: np.ndarray, count: int, seed: int) -> tuple[float, float, float]:
    """tau and error on the rest after fitting to `count` networks, and the error that the surrogate states."""
    order = np.random.default_rng(seed).permutation(len(top1))
    seen, rest = order[:count], order[count:]
    surrogate = Surrogate([TrainedNetwork(str(i), features[i], {EPOCHS: top1[i]}) for i in seen], EPOCHS, NOISE)
    found = np.array([surrogate.predict(features[i]).value for i in rest])
    stated, _ = surrogate.held_out()
    return kendalltau(found, top1[rest]).statistic, float(np.abs(found - top1[rest]).mean()), stated


def tau(column: Sequence[float], top1: np.ndarray) -> float:
    return float(kendalltau(column, top1).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    table = json.loads(parser.parse_args().table.read_text())
    warnings.simplefilter("ignore")
    print(
        "| networks, data | params | MACs | " + " | ".join(f"n = {n}" for n in SIZES) + " |\n|---|---|---|" + "---|" * 4
    )
    for space, targets in TARGETS.items():
        features = np.array([FEATURES[space](row["arch"]) for row in table[space]])
        for target in targets:
            top1 = np.array([row[target] for row in table[space]])
            cells = []
            for count in SIZES:
                found = np.mean([drawn(features, top1, count, seed) for seed in range(DRAWS)], axis=0)
                cells.append(f"{found[0]:.2f} / {found[1]:.2f} ({found[2]:.2f})")
            sizes = f"{tau(features[:, 0], top1):.2f} | {tau(features[:, 1], top1):.2f}"
            print(f"| {space}, {target.removesuffix('_acc')} | {sizes} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
