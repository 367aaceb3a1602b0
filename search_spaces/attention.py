"""What attentions share: their widths, learned biases and products."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.layers import Axes
from search_spaces.widths import Cat, Each, Width


class Heads(Protocol):
    """A document of an attention whose heads are alike."""

    @property
    def heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


def attention_widths(name: str, doc: Heads) -> tuple[Width, Width, Width]:
    """The widths of an attention at the path `name`: its heads, and the q (and k) and v units of each."""
    return (
        Width(f"{name}.heads", doc.heads, kind="heads"),
        Width(f"{name}.qk", doc.key_dim, kind="qk"),
        Width(f"{name}.v", doc.value_dim, kind="v"),
    )


def key(qk: Width) -> Width:
    """The keys' side of `qk`: a new key begins at zero and its query at random, so that neither stays dead."""
    return replace(qk, grown="zero")


def qkv_axis(heads: Width, qk: Width, v: Width) -> Each:
    """Rows of a fused projection that lays out q, k and v of one head after the other."""
    return Each(heads, Cat((qk, key(qk), v)))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale + bias) v for (..., tokens, dim)."""
    if torch.onnx.is_in_onnx_export():
        logits = (q @ k.transpose(-2, -1)) * scale
        return (logits if bias is None else logits + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def scale_rows(layer: nn.Module, rows: slice | Tensor, scale: float) -> None:
    """Multiply some output units of a folded projection, in place.

    Raises:
        TypeError: another layer than a Linear or Conv2d with a bias, as folding leaves them.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias is None:
        raise TypeError(f"{type(layer).__name__} is no folded projection")
    layer.weight.data[rows] *= scale
    layer.bias.data[rows] *= scale


@functools.lru_cache(maxsize=16)
def offsets(grid: int, stride: int) -> np.ndarray:
    """Entry of the bias table for each (query, key); one array for all layers of a grid."""
    keys = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")).reshape(2, -1)
    queries = keys.reshape(2, grid, grid)[:, ::stride, ::stride].reshape(2, -1)
    dy, dx = np.abs(queries[:, :, None] - keys[:, None, :])
    return np.asarray(dy * grid + dx)


class AttentionBias(nn.Module):
    """A learned bias per head for every offset (|dy|, |dx|) between two positions of a grid.

    The table is (heads, grid * grid). Called, it gives (heads, queries, keys), gathered afresh each time: there
    is no cache to go stale. `stride` takes every stride-th row and column of the grid as queries.
    """

    offset: Tensor

    def __init__(self, name: str, heads: Width, grid: int, stride: int = 1) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads.size, grid * grid))
        self.axes: Axes = {"table": (heads, Width(f"{name}.offsets", grid * grid, "resize"))}
        self.register_buffer("offset", torch.from_numpy(offsets(grid, stride)), persistent=False)

    def forward(self) -> Tensor:
        return self.table[:, self.offset]

    def folded(self) -> BakedBias:
        return BakedBias(self.forward().detach())


class BakedBias(nn.Module):
    """An attention bias gathered once, for inference."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias.contiguous())

    def forward(self) -> Tensor:
        return self.bias
