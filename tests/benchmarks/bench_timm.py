"""Our modules against timm's, both BatchNorm-folded: latency ratio on ONNX Runtime and on PyTorch eager.

    python tests/benchmarks/bench_timm.py [NAME ...]

One process and one thread (at one thread, live sessions do not disturb each other); ours and timm's take turns, in
both orders. The ratio is the median over pairs, with its 95% interval. Goal: at most 1.05.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nas.export.onnx import to_onnx
from nas.measure.samples import median_interval
from search_spaces import create_model, fold, get_arch, list_models
from search_spaces.api import find_variant

GOAL = 1.05
PAIRS = 40


def fold_timm(model: nn.Module) -> nn.Module:
    """timm folds layer by layer (`fuse` methods), some models as a whole."""
    for name, child in model.named_children():
        fused = child.fuse() if callable(getattr(child, "fuse", None)) else child
        setattr(model, name, fused if fused is not child else fold_timm(child))
    return model


def session(path: Path, images: torch.Tensor) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {loaded.get_inputs()[0].name: images.numpy()}
    return lambda: loaded.run(None, feed)


def eager(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def seconds(run: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - started) / count


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, list[float]]:
    count = max(1, round(0.03 / seconds(theirs, 3)))
    seconds(ours, 3)
    pairs = []
    for i in range(PAIRS):
        first, second = (ours, theirs) if i % 2 else (theirs, ours)
        a, b = seconds(first, count), seconds(second, count)
        pairs.append((a, b) if i % 2 else (b, a))
    ratios = sorted(a / b for a, b in pairs)
    return min(a for a, _ in pairs), min(b for _, b in pairs), ratios


def main() -> int:
    import timm

    torch.set_num_threads(1)
    names = sys.argv[1:] or [name for name in list_models() if find_variant(name)[1].timm]
    slower = 0
    print("| network | runtime | ours ms | timm ms | ratio | 95% |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            arch, variant = get_arch(name), find_variant(name)[1]
            ours = fold(create_model(arch))
            theirs = fold_timm(timm.create_model(variant.timm)).eval().requires_grad_(False)
            images = torch.randn(1, 3, arch.resolution, arch.resolution)
            paths = [Path(folder) / "ours.onnx", Path(folder) / "timm.onnx"]
            for model, path in zip((ours, theirs), paths, strict=True):
                to_onnx(model, path, arch.resolution, 1)
            for runtime, pair in (
                ("onnxruntime", [session(path, images) for path in paths]),
                ("eager", [eager(model, images) for model in (ours, theirs)]),
            ):
                best, best_theirs, ratios = ratio(*pair)
                low, high = median_interval(ratios)
                middle = ratios[len(ratios) // 2]
                slower += middle > GOAL
                row = f"{best * 1e3:.2f} | {best_theirs * 1e3:.2f} | {middle:.3f} | {low:.3f}..{high:.3f}"
                print(f"| {name} | {runtime} | {row} |", flush=True)
    print(f"{slower} above {GOAL}")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
