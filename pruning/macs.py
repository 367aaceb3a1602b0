"""Multiply-accumulates of any module, by torch's own counter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Multiply-accumulates per module name ("" is the whole model), of one forward pass.

    Half of the FLOPs torch's FlopCounterMode counts: convolutions, matrix products and scaled_dot_product_attention.
    Not counted: elementwise operations, normalisation, pooling, softmax, and kernels torch does not know.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
