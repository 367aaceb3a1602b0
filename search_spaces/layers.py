"""Layers shared by the families. Each declares its widths (`axes`) and folds away what inference does not need.

Shapes: B images, C channels, H x W grid, N = H * W tokens. `fold` turns a model into the form that is measured
and exported: BatchNorm merged into its neighbour, bias tables gathered, attention scales merged into q.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.arch import Ffn, kept
from search_spaces.widths import Axis, Cat, Each, Width, fixed

Form = Literal["linear", "conv"]
RGB = fixed(3)
ONE = fixed(1)
NORM_MACS = 5
"""Multiply-accumulates per element of a norm that cannot fold away (fvcore's count, in the published figures)."""
TIE = 2.0**-20
"""What a place among scores is worth: 16 of float32's steps below 1. Equal tokens differ by 1 or 2."""


def declare_norm(norm: nn.Module, axis: Axis) -> None:
    """Enter a normalisation layer's parameters and buffers into the width table."""
    names = [name for name, value in [*norm.named_parameters(), *norm.named_buffers()] if value.ndim == 1]
    norm.axes = dict.fromkeys(names, (axis,))
    if "num_batches_tracked" in dict(norm.named_buffers()):
        norm.axes["num_batches_tracked"] = ()


def batch_norm(axis: Axis, gamma: float, dims: Literal[1, 2]) -> nn.Module:
    """BatchNorm over `axis` with its weight started at `gamma`."""
    norm = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(axis.size)
    nn.init.constant_(norm.weight, gamma)
    declare_norm(norm, axis)
    return norm


def layer_norm(axis: Axis, positions: int, eps: float = 1e-6) -> nn.LayerNorm:
    """LayerNorm over channels."""
    norm = nn.LayerNorm(axis.size, eps=eps)
    declare_norm(norm, axis)
    norm.positions = NORM_MACS * positions
    return norm


def declare_scale(layer: nn.Module, scale: float) -> None:
    """Say that an attention multiplies the queries which `layer` writes by `scale`, by their products with the keys."""
    layer.query_scale = scale


class Gate(nn.Module):
    """Where the units of `axis` can be silenced or weighed: the identity until `mask` is set.

    dims: the dimensions the units lie along, one, or two for the heads and the units of an `Each`. branch: the path
    of the residual branch whose output this is. heads: the width, and the head of it where each has a gate of its
    own, whose heads fall silent with all their units here. mask: (B or 1, *units), multiplied in; where windows have
    joined the batch, those of an image follow one another. drop_path: chance, in training, that an image goes without
    the branch; a branch has the images in its first dimension.
    """

    def __init__(
        self, axis: Axis, *dims: int, branch: str | None = None, heads: tuple[Width, int | None] | None = None
    ) -> None:
        super().__init__()
        self.axis, self.dims, self.branch, self.heads = axis, dims, branch, heads
        self.mask: Tensor | None = None
        self.drop_path = 0.0

    @property
    def units(self) -> tuple[int, ...]:
        """Shape of one image's mask."""
        return (self.axis.outer.size, self.axis.inner.size) if isinstance(self.axis, Each) else (self.axis.size,)

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_path and self.training:
            keep = 1 - self.drop_path
            x = x * x.new_empty((len(x), *[1] * (x.ndim - 1))).bernoulli_(keep).div_(keep)
        if self.mask is None:
            return x
        shape = [1] * x.ndim
        for dim in self.dims:
            shape[dim] = x.shape[dim]
        mask = self.mask.reshape(len(self.mask), *shape[1:])
        return x * (mask if len(mask) == 1 else mask.repeat_interleave(len(x) // len(mask), 0))

    def folded(self) -> nn.Identity:
        return nn.Identity()


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth (Huang et al., ECCV 2016) at the residual branches, in training mode: 0 turns it off.

    As in DeiT and Swin, the chance to drop rises evenly from 0 at the first block to `rate` at the last, is the same
    for a block's branches, and what is kept is scaled by 1 / (1 - chance). A downsampling counts as a block. Each
    image draws for itself from torch's generator.

    Raises:
        ValueError: a rate outside 0 <= rate < 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop path {rate} is not at least 0 and below 1")
    gates = [module for module in model.modules() if isinstance(module, Gate) and module.branch is not None]
    blocks = [re.match(r"(stages\.\d+\.)?(blocks\.\d+|downsample)", gate.branch)[0] for gate in gates]
    order = list(dict.fromkeys(blocks))
    for gate, block in zip(gates, blocks, strict=True):
        gate.drop_path = rate * order.index(block) / max(1, len(order) - 1)


class KeepsFewer(Protocol):
    """A network that keeps fewer tokens as training goes on."""

    keep_progress: float
    """From 0 (all tokens) to 1 (the Arch's keep rates); used in training mode only."""
    training: bool

    def keep_at(self, progress: float) -> None:
        """Set the token counts of every block."""


def set_keep_progress(model: nn.Module, progress: float) -> None:
    """Set how far keep rates have come from 1 (at 0 and below) to the Arch's own (at 1 and above), in training mode.

    Eval mode, folding and export are always at the Arch's rates. Networks without such a schedule (all but EViT's) have
    nothing to set. Each new token count makes torch.compile compile again: compile after the schedule.
    """
    for module in model.modules():
        if "keep_progress" in vars(module):  # hasattr would take a compiled wrapper for its network
            network: KeepsFewer = module
            network.keep_progress = min(max(progress, 0.0), 1.0)
            if network.training:
                network.keep_at(network.keep_progress)


class Linear(nn.Linear):
    """nn.Linear that knows its widths; weight started from a truncated normal of 0.02."""

    def __init__(self, inp: Axis, out: Axis, positions: int, bias: bool = True) -> None:
        super().__init__(inp.size, out.size, bias=bias)
        self.axes = {"weight": (out, inp)} | ({"bias": (out,)} if bias else {})
        self.positions = positions
        nn.init.trunc_normal_(self.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.bias)


class Conv(nn.Conv2d):
    """nn.Conv2d that knows its widths; `depthwise` convolutions have `inp == out`."""

    def __init__(
        self,
        inp: Axis,
        out: Axis,
        kernel: Width,
        positions: int,
        stride: int = 1,
        padding: int | None = None,
        depthwise: bool = False,
        bias: bool = False,
    ) -> None:
        groups = inp.size if depthwise else 1
        pad = kernel.size // 2 if padding is None else padding
        super().__init__(inp.size, out.size, kernel.size, stride, pad, groups=groups, bias=bias)
        self.axes = {"weight": (out, ONE if depthwise else inp, kernel, kernel)} | ({"bias": (out,)} if bias else {})
        self.positions = positions


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm. (B, C, H, W) -> (B, C', H', W')."""

    def __init__(
        self,
        inp: Axis,
        out: Axis,
        positions: int,
        kernel: Width = ONE,
        stride: int = 1,
        depthwise: bool = False,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self.linear = Conv(inp, out, kernel, positions, stride, depthwise=depthwise)
        self.norm = batch_norm(out, gamma, dims=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if 1 not in x.shape:
            return self.norm(x)
        # With a dimension of 1, torch (2.15, on a CPU) mistakes channels-last for contiguous: BatchNorm's backward is
        # wrong where x and its gradient differ in layout.
        y = self.norm(x.contiguous())
        if y.requires_grad:
            y.register_hook(Tensor.contiguous)
        return y

    def folded(self) -> nn.Conv2d:
        conv, scale, shift = self.linear, *affine(self.norm)
        out = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            groups=conv.groups,
        )
        out.weight.data = conv.weight * scale[:, None, None, None]
        out.bias.data = shift
        return out


class LinearNorm(nn.Module):
    """Linear without bias, then BatchNorm over all tokens. (B, N, C) -> (B, N, C')."""

    def __init__(self, inp: Axis, out: Axis, positions: int, gamma: float = 1.0) -> None:
        super().__init__()
        self.linear = Linear(inp, out, positions, bias=False)
        self.norm = batch_norm(out, gamma, dims=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).view_as(x)

    def folded(self) -> nn.Linear:
        scale, shift = affine(self.norm)
        return as_linear(self.linear.weight * scale[:, None], shift)


class NormLinear(nn.Module):
    """BatchNorm, then the classifier. (B, C) -> (B, classes).

    What writes x has gates of its own; the one here, for eval mode, is of the shift that BatchNorm adds to them.
    """

    def __init__(self, inp: Axis, out: Axis) -> None:
        super().__init__()
        self.norm = batch_norm(inp, 1.0, dims=1)
        self.shift_gate = Gate(inp, 1)
        self.linear = Linear(inp, out, positions=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.shift_gate.mask is not None:
            shift = affine(self.norm)[1].expand_as(y)
            y = y - shift + self.shift_gate(shift)
        return self.linear(y)

    def folded(self) -> nn.Linear:
        scale, shift = affine(self.norm)
        return as_linear(self.linear.weight * scale, self.linear.bias + self.linear.weight @ shift)


class Classifier(nn.Module):
    """BatchNorm and Linear on pooled features (B, C), with an optional second head for distillation.

    Returns the mean of both heads; `heads_of` has them as a pair.
    """

    def __init__(self, embed: Width, classes: Width, distilled: bool) -> None:
        super().__init__()
        self.cls = NormLinear(embed, classes)
        self.dist = NormLinear(embed, classes) if distilled else None
        self.distilled_training = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.dist is None:
            return self.cls(x)
        if self.distilled_training:
            return self.cls(x), self.dist(x)
        return (self.cls(x) + self.dist(x)) / 2

    def folded(self) -> nn.Linear:
        if self.dist is None:
            return self.cls
        return as_linear((self.cls.weight + self.dist.weight) / 2, (self.cls.bias + self.dist.bias) / 2)


def heads_of(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """The logits (B, classes) of each of a network's heads, the class head first; their mean is what it returns.

    One call of `model`, which may be wrapped (DDP, compiled). Of timm's LeViT, training mode only has both.
    """
    heads = [module for module in model.modules() if hasattr(module, "distilled_training")]
    for head in heads:
        head.distilled_training = True
    try:
        out = model(images)
    finally:
        for head in heads:
            head.distilled_training = False
    return out if isinstance(out, tuple) else (out,)


def pointwise(form: Form, inp: Axis, out: Axis, positions: int, gamma: float = 1.0) -> nn.Module:
    """A per-token projection with BatchNorm: a Linear on (B, N, C) or a 1x1 convolution on (B, C, H, W)."""
    return (LinearNorm if form == "linear" else ConvNorm)(inp, out, positions, gamma=gamma)


def stem(hidden: tuple[int, ...], embed: Width, resolution: int, act: Callable[[], nn.Module]) -> nn.Sequential:
    """Stride-2 3x3 convolutions with BatchNorm, `act` between: (B, 3, R, R) -> (B, C, R', R')."""
    widths = [RGB, *(Width(f"stem.{i}", size) for i, size in enumerate(hidden)), embed]
    layers, grid = nn.Sequential(), resolution
    for i, (inp, out) in enumerate(itertools.pairwise(widths)):
        grid = halved(grid)
        layers.add_module(f"{2 * i}", ConvNorm(inp, out, grid * grid, kernel=fixed(3), stride=2))
        if out is not embed:
            layers.add_module(f"{2 * i + 1}", act())
        layers.add_module(f"gate{i}", Gate(out, 1))
    return layers


def halved(grid: int) -> int:
    """Side of the grid after a stride-2 step (kernel 3, padding 1)."""
    return -(-grid // 2)


class Residual(nn.Module):
    """x + branch(x); a depthwise convolution takes the identity into its centre tap when folded."""

    def __init__(self, branch: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.branch, self.gate = branch, gate

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.branch(x))

    def folded(self) -> nn.Module:
        conv = self.branch
        if not (isinstance(conv, nn.Conv2d) and conv.groups == conv.out_channels == conv.in_channels):
            return self
        centre = conv.kernel_size[0] // 2
        conv.weight.data[:, :, centre, centre] += 1
        return conv


class FeedForward(nn.Module):
    """Residual FFN with BatchNorm on the tokens it keeps: x + W2 act(W1 x).

    Linear form (B, N, C), conv form (B, C, H, W). Below a keep rate of 1 the ceil(keep_rate * N) tokens of
    largest L2 norm pass through the FFN and the others are left as they are; the grid stays whole.
    """

    def __init__(
        self,
        name: str,
        doc: Ffn,
        embed: Width,
        tokens: int,
        act: Callable[[], nn.Module],
        form: Form = "conv",
    ) -> None:
        super().__init__()
        hidden = Width(f"{name}.hidden", doc.hidden)
        self.form, self.keep, self.tokens = form, kept(doc.keep_rate, tokens), tokens
        dim = 1 if form == "conv" else -1
        self.fc1 = pointwise(form, embed, hidden, self.keep)
        self.act = act()
        self.gate = Gate(hidden, dim)
        self.fc2 = pointwise(form, hidden, embed, self.keep, gamma=0.0)
        self.branch_gate = Gate(embed, dim, branch=name)

    def forward(self, x: Tensor) -> Tensor:
        if self.keep == self.tokens:
            return x + self._branch(x)
        if self.form == "linear":
            return on_strongest(x, self.keep, self._branch)
        rows = x.flatten(2).transpose(1, 2)
        rows = on_strongest(rows, self.keep, self._on_rows)
        return rows.transpose(1, 2).reshape(x.shape)

    def _branch(self, x: Tensor) -> Tensor:
        return self.branch_gate(self.fc2(self.gate(self.act(self.fc1(x)))))

    def _on_rows(self, rows: Tensor) -> Tensor:
        return self._branch(rows.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


def mlp(name: str, hidden: int, embed: Width, positions: int) -> nn.Sequential:
    """Linear, GELU, Linear: a residual branch, and the path `name` its place."""
    inner = Width(f"{name}.hidden", hidden)
    layers = nn.Sequential()
    layers.add_module("fc1", Linear(embed, inner, positions))
    layers.add_module("act", nn.GELU())
    layers.add_module("gate", Gate(inner, -1))
    layers.add_module("fc2", Linear(inner, embed, positions))
    layers.add_module("branch_gate", Gate(embed, -1, branch=name))
    return layers


def foremost(scores: Tensor, keep: int) -> Tensor:
    """Positions (B, keep) of the largest of scores (B, N), none negative, largest first; of equal ones the first.

    Equal tokens, as in areas of one colour, have scores that differ in the last bits, by kernel, width and CPU: so a
    score loses `TIE` of itself a position, none being zero then.
    """
    count = scores.shape[1]
    handicap = torch.arange(1, 1 - TIE * count, -TIE, dtype=torch.float32, device=scores.device)
    return ((scores + TIE) * handicap).topk(keep, dim=1).indices


def strongest(x: Tensor, keep: int) -> Tensor:
    """Positions in (B, N) of the `keep` tokens of largest L2 norm in x (B, N, C), strongest first."""
    return foremost(x.square().sum(-1), keep)


def flat_rows(index: Tensor, tokens: int) -> Tensor:
    """Row numbers in x.flatten(0, 1) of the tokens `index` (B, k) names in x (B, `tokens`, C): shape (B * k)."""
    offset = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * tokens
    return (index + offset).reshape(-1)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: x (B, N, C), index (B, k) -> (B, k, C)."""
    return x.flatten(0, 1).index_select(0, flat_rows(index, x.shape[1])).view(*index.shape, x.shape[-1])


def on_strongest(x: Tensor, keep: int, delta: Callable[[Tensor], Tensor]) -> Tensor:
    """Add delta(kept) to the `keep` strongest tokens of x (B, N, C); the others are unchanged."""
    rows = flat_rows(strongest(x, keep), x.shape[1])
    flat = x.flatten(0, 1)
    chosen = flat.index_select(0, rows)
    updated = chosen + delta(chosen.view(x.shape[0], keep, -1)).flatten(0, 1)
    return flat.index_put((rows,), updated).view_as(x)


@functools.lru_cache(maxsize=16)
def offsets(grid: int, stride: int) -> np.ndarray:
    """Entry of the bias table for each (query, key); one array for all layers of a grid."""
    keys = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")).reshape(2, -1)
    queries = keys.reshape(2, grid, grid)[:, ::stride, ::stride].reshape(2, -1)
    offset = np.abs(queries[:, :, None] - keys[:, None, :])
    return offset[0] * grid + offset[1]


class AttentionBias(nn.Module):
    """A learned bias per head for every offset (|dy|, |dx|) between two positions of a grid.

    The table is (heads, grid * grid). Called, it gives (heads, queries, keys), gathered afresh each time: there
    is no cache to go stale. `stride` takes every stride-th row and column of the grid as queries.
    """

    def __init__(self, name: str, heads: Width, grid: int, stride: int = 1) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads.size, grid * grid))
        self.axes = {"table": (heads, Width(f"{name}.offsets", grid * grid, "resize"))}
        self.register_buffer("offset", torch.from_numpy(offsets(grid, stride)), persistent=False)

    def forward(self) -> Tensor:
        return self.table[:, self.offset]

    def folded(self) -> BakedBias:
        return BakedBias(self().detach())


class BakedBias(nn.Module):
    """An attention bias gathered once, for inference."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias.contiguous())

    def forward(self) -> Tensor:
        return self.bias


class SqueezeExcite(nn.Module):
    """Channel gate: x * sigmoid(W2 relu(W1 mean(x))). (B, C, H, W) -> same."""

    def __init__(self, channels: Axis, squeezed: Axis) -> None:
        super().__init__()
        self.gate = Gate(squeezed, 1)
        self.fc1 = Conv(channels, squeezed, ONE, positions=1, bias=True)
        self.fc2 = Conv(squeezed, channels, ONE, positions=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.gate(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))).sigmoid()


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """An eval-mode BatchNorm as x * scale + shift."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def as_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A plain nn.Linear holding the given tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = weight, bias
    return linear


def scale_rows(layer: nn.Module, rows: slice | Tensor, scale: float) -> None:
    """Multiply some output units of a folded projection, in place."""
    layer.weight.data[rows] *= scale
    layer.bias.data[rows] *= scale


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of the model for inference, in eval mode: same outputs, nothing left that inference does not need."""
    return _fold(copy.deepcopy(model)).eval().requires_grad_(False)


def _fold(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    return module.folded() if hasattr(module, "folded") else module


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v for (..., tokens, dim) without a bias."""
    if torch.onnx.is_in_onnx_export():
        return ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def key(qk: Width) -> Width:
    """The keys' side of `qk`: a new key begins at zero and its query at random, so that neither stays dead."""
    return replace(qk, grown="zero")


def qkv_axis(heads: Width, qk: Width, v: Width) -> Each:
    """Rows of a fused projection that lays out q, k and v of one head after the other."""
    return Each(heads, Cat((qk, key(qk), v)))
