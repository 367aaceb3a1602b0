"""Layers shared by the families.

Each says which widths index its weights (`axes`) and at how many positions of an image they multiply (`positions`), for
the width table; what inference does not need folds away (`folded`, see `network.fold`). Shapes: B images, C channels,
H x W grid, N = H * W tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.arch import Ffn, kept
from search_spaces.counting import NORM_MACS
from search_spaces.gates import Gate
from search_spaces.tokens import on_strongest
from search_spaces.widths import Axis, Width, fixed

Form = Literal["linear", "conv"]
"""Tokens as (B, N, C), or as (B, C, H, W)."""
RGB = fixed(3)
ONE = fixed(1)

Axes = dict[str, tuple[Axis, ...]]
"""The axes of a layer's own parameters and buffers, by their names."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over channels that knows its width."""

    def __init__(self, axis: Axis, positions: int, eps: float = 1e-6) -> None:
        super().__init__(axis.size, eps=eps)
        self.axes: Axes = {"weight": (axis,), "bias": (axis,)}
        self.positions = NORM_MACS * positions


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with one group that knows its width."""

    def __init__(self, axis: Axis, positions: int) -> None:
        super().__init__(1, axis.size)
        self.axes: Axes = {"weight": (axis,), "bias": (axis,)}
        self.positions = NORM_MACS * positions


class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d that knows its width; its weight starts at `gamma`."""

    def __init__(self, axis: Axis, gamma: float = 1.0) -> None:
        super().__init__(axis.size)
        self.axes = _batch_norm_axes(axis)
        nn.init.constant_(self.weight, gamma)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that knows its width; its weight starts at `gamma`."""

    def __init__(self, axis: Axis, gamma: float = 1.0) -> None:
        super().__init__(axis.size)
        self.axes = _batch_norm_axes(axis)
        nn.init.constant_(self.weight, gamma)


def _batch_norm_axes(axis: Axis) -> Axes:
    names = ("weight", "bias", "running_mean", "running_var")
    return dict.fromkeys(names, (axis,)) | {"num_batches_tracked": ()}


class Linear(nn.Linear):
    """nn.Linear that knows its widths; its weight starts from a truncated normal of 0.02."""

    query_scale: float | None = None
    """Of a projection that writes queries: what attention multiplies their products with the keys by."""
    terms: int = 1
    """How many terms its input is the sum of, where other settings of the same layer have another number."""

    def __init__(self, inp: Axis, out: Axis, positions: int, bias: bool = True) -> None:
        super().__init__(inp.size, out.size, bias=bias)
        self.axes: Axes = {"weight": (out, inp)}
        self.positions = positions
        nn.init.trunc_normal_(self.weight, std=0.02)
        if bias:
            self.axes["bias"] = (out,)
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
        groups, pad = inp.size if depthwise else 1, kernel.size // 2 if padding is None else padding
        super().__init__(inp.size, out.size, kernel.size, stride, pad, groups=groups, bias=bias)
        self.pad = pad
        self.axes: Axes = {"weight": (out, ONE if depthwise else inp, kernel, kernel)}
        if bias:
            self.axes["bias"] = (out,)
        self.positions = positions


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm. (B, C, H, W) -> (B, C', H', W')."""

    query_scale: float | None = None
    """As `Linear.query_scale`."""

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
        self.norm = BatchNorm2d(out, gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        # With a dimension of 1, torch (2.15, on a CPU) mistakes channels-last for contiguous: BatchNorm's backward is
        # wrong where x and its gradient differ in layout.
        ambiguous = 1 in x.shape
        y: Tensor = self.norm(x.contiguous() if ambiguous else x)
        if ambiguous and y.requires_grad:
            y.register_hook(Tensor.contiguous)
        return y

    def folded(self) -> nn.Conv2d:
        conv, (scale, shift) = self.linear, affine(self.norm)
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        out = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, conv.pad, groups=conv.groups)
        out.weight.data = conv.weight * scale[:, None, None, None]
        out.bias = nn.Parameter(shift)
        return out


class LinearNorm(nn.Module):
    """Linear without bias, then BatchNorm over all tokens. (B, N, C) -> (B, N, C')."""

    query_scale: float | None = None
    """As `Linear.query_scale`."""

    def __init__(self, inp: Axis, out: Axis, positions: int, gamma: float = 1.0) -> None:
        super().__init__()
        self.linear = Linear(inp, out, positions, bias=False)
        self.norm = BatchNorm1d(out, gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        y: Tensor = self.norm(x.flatten(0, 1))
        return y.view_as(x)

    def folded(self) -> nn.Linear:
        scale, shift = affine(self.norm)
        return as_linear(self.linear.weight * scale[:, None], shift)


class NormLinear(nn.Module):
    """BatchNorm, then the classifier. (B, C) -> (B, classes).

    What writes x has gates of its own; the one here, for eval mode, is of the shift that BatchNorm adds to them.
    """

    def __init__(self, inp: Axis, out: Axis) -> None:
        super().__init__()
        self.norm = BatchNorm1d(inp)
        self.shift_gate = Gate(inp, 1)
        self.linear = Linear(inp, out, positions=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        if self.shift_gate.mask is not None:
            shift = affine(self.norm)[1].expand_as(y)
            y = y - shift + self.shift_gate(shift)
        logits: Tensor = self.linear(y)
        return logits

    def folded(self) -> nn.Linear:
        scale, shift = affine(self.norm)
        return as_linear(self.linear.weight * scale, self.linear.bias + self.linear.weight @ shift)


class Classifier(nn.Module):
    """BatchNorm and Linear on pooled features (B, C), with an optional second head for distillation.

    Returns the mean of both heads; `network.heads_of` has them as a pair.
    """

    distilled_training: bool
    """Whether to return both heads' logits."""

    def __init__(self, embed: Width, classes: Width, distilled: bool) -> None:
        super().__init__()
        self.cls: NormLinear | nn.Linear = NormLinear(embed, classes)
        self.dist: NormLinear | nn.Linear | None = NormLinear(embed, classes) if distilled else None
        self.distilled_training = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits: Tensor = self.cls(x)
        if self.dist is None:
            return logits
        distilled: Tensor = self.dist(x)
        return (logits, distilled) if self.distilled_training else (logits + distilled) / 2

    def folded(self) -> nn.Linear:
        cls, dist = self.cls, self.dist
        if isinstance(cls, NormLinear) or isinstance(dist, NormLinear):
            raise TypeError("a classifier's heads fold before it does")
        if dist is None:
            return cls
        return as_linear((cls.weight + dist.weight) / 2, (cls.bias + dist.bias) / 2)


def pointwise(form: Form, inp: Axis, out: Axis, positions: int, gamma: float = 1.0) -> LinearNorm | ConvNorm:
    """A per-token projection with BatchNorm: a Linear on (B, N, C) or a 1x1 convolution on (B, C, H, W)."""
    return (LinearNorm if form == "linear" else ConvNorm)(inp, out, positions, gamma=gamma)


def stem(hidden: tuple[int, ...], embed: Width, resolution: int, act: Callable[[], nn.Module]) -> nn.Sequential:
    """Stride-2 3x3 convolutions with BatchNorm, `act` between: (B, 3, R, R) -> (B, C, R', R')."""
    widths = [RGB, *(Width(f"stem.{i}", size, kind="embed") for i, size in enumerate(hidden)), embed]
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
        y: Tensor = self.gate(self.branch(x))
        return x + y

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
        hidden = Width(f"{name}.hidden", doc.hidden, kind="ffn")
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
        y: Tensor = self.branch_gate(self.fc2(self.gate(self.act(self.fc1(x)))))
        return y

    def _on_rows(self, rows: Tensor) -> Tensor:
        return self._branch(rows.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


def mlp(name: str, hidden: int, embed: Width, positions: int) -> nn.Sequential:
    """Linear, GELU, Linear: the residual branch at the path `name`."""
    inner = Width(f"{name}.hidden", hidden, kind="ffn")
    layers = nn.Sequential()
    layers.add_module("fc1", Linear(embed, inner, positions))
    layers.add_module("act", nn.GELU())
    layers.add_module("gate", Gate(inner, -1))
    layers.add_module("fc2", Linear(inner, embed, positions))
    layers.add_module("branch_gate", Gate(embed, -1, branch=name))
    return layers


class SqueezeExcite(nn.Module):
    """Channel gate: x * sigmoid(W2 relu(W1 mean(x))). (B, C, H, W) -> same."""

    def __init__(self, channels: Axis, squeezed: Axis) -> None:
        super().__init__()
        self.gate = Gate(squeezed, 1)
        self.fc1 = Conv(channels, squeezed, ONE, positions=1, bias=True)
        self.fc2 = Conv(squeezed, channels, ONE, positions=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.fc2(self.gate(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return x * weights.sigmoid()


def affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """An eval-mode BatchNorm as x * scale + shift."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics does not fold")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def as_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A plain nn.Linear holding the given tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = weight, bias
    return linear
