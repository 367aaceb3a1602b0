"""SepViT against a reference in plain loops over windows and tokens."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import search_spaces
from search_spaces import Arch, ArchError

Grid = dict[tuple[int, int], Tensor]
State = dict[str, Tensor]


def layer_norm(x: Tensor, state: State, name: str, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean()
    scaled = centred / math.sqrt(float(centred.square().mean()) + eps)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def convolve(grid: Grid, weight: Tensor, bias: Tensor, stride: int, pad: int, depthwise: bool = False) -> Grid:
    """A convolution, position by position."""
    size, kernel = 1 + max(y for y, _ in grid), weight.shape[-1]
    side = (size + 2 * pad - kernel) // stride + 1
    out: Grid = {}
    for y in range(side):
        for x in range(side):
            total = bias.clone()
            for dy in range(kernel):
                for dx in range(kernel):
                    source = grid.get((y * stride + dy - pad, x * stride + dx - pad))
                    if source is not None:
                        tap = weight[:, :, dy, dx]
                        total += tap[:, 0] * source if depthwise else tap @ source
            out[y, x] = total
    return out


def reference(arch: Arch, state: State, pixels: Tensor) -> Tensor:
    """Logits of one image (3, R, R)."""
    size = arch.resolution
    grid: Grid = {(y, x): pixels[:, y, x] for y in range(size) for x in range(size)}
    for s, stage in enumerate(arch.stages):
        name = f"stages.{s}"
        stride, pad = (4, 3) if s == 0 else (2, 1)
        grid = convolve(grid, state[f"{name}.patch_embed.weight"], state[f"{name}.patch_embed.bias"], stride, pad)
        grid = {at: layer_norm(value, state, f"{name}.norm", 1e-5) for at, value in grid.items()}
        for i, block in enumerate(stage.blocks):
            if block.attn is not None:
                grid = separable(grid, block.attn, state, f"{name}.blocks.{i}.attn")
            if block.ffn is not None:
                grid = feed_forward(grid, block.ffn, state, f"{name}.blocks.{i}")
            if i == 0:
                tap = state[f"{name}.position.branch.weight"], state[f"{name}.position.branch.bias"]
                encoded = convolve(grid, *tap, stride=1, pad=1, depthwise=True)
                grid = {at: value + encoded[at] for at, value in grid.items()}
    normed = [layer_norm(value, state, "norm") for value in grid.values()]
    return linear(sum(normed) / len(normed), state, "head")


def feed_forward(grid: Grid, doc: Any, state: State, name: str) -> Grid:
    """The MLP on the tokens of largest norm, the residual for all."""
    keep = math.ceil(Fraction(str(doc.keep_rate)) * len(grid))
    chosen = sorted(grid, key=lambda at: -float(grid[at].square().sum()))[:keep]
    out = dict(grid)
    for at in chosen:
        hidden = gelu(linear(layer_norm(grid[at], state, f"{name}.norm"), state, f"{name}.ffn.fc1"))
        out[at] = grid[at] + linear(hidden, state, f"{name}.ffn.fc2")
    return out


def separable(grid: Grid, doc: Any, state: State, name: str) -> Grid:
    """Attention within windows, then between them through their tokens."""
    m = doc.window
    per_side = (1 + max(y for y, _ in grid)) // m
    windows = [
        [(wy * m + y, wx * m + x) for y in range(m) for x in range(m)]
        for wy in range(per_side)
        for wx in range(per_side)
    ]
    single = len(windows) == 1
    energy = [float(sum(grid[at].square().sum() for at in window)) for window in windows]
    keep = math.ceil(Fraction(str(doc.keep_rate)) * len(windows))
    active = sorted(range(len(windows)), key=lambda w: -energy[w])[:keep]

    maps: dict[int, list[Tensor]] = {}
    for w in active:
        tokens = [grid[at] for at in windows[w]]
        if not single:
            tokens = [state[f"{name}.window_token"][0, w, 0], *tokens]
        normed = [layer_norm(token, state, f"{name}.norm") for token in tokens]
        mixed = depthwise(normed, doc, state, name)
        maps[w] = [z + inner(y, doc) for z, y in zip(mixed, normed, strict=True)]
    if not single:
        maps = pointwise(maps, doc, state, name)
    out = dict(grid)
    for w, features in maps.items():
        for at, z in zip(windows[w], features, strict=True):
            out[at] = grid[at] + linear(z, state, f"{name}.proj")
    return out


def depthwise(tokens: list[Tensor], doc: Any, state: State, name: str) -> list[Tensor]:
    """Multi-head attention among the tokens of one window, before any output projection."""
    heads, key_dim, value_dim = doc.heads, doc.key_dim, doc.value_dim
    qkv = [linear(token, state, f"{name}.qkv") for token in tokens]
    out = []
    for row in qkv:
        mixed = []
        for head in range(heads):
            q = row[head * key_dim : (head + 1) * key_dim]
            start = (heads + head) * key_dim
            weights = softmax([float(q @ other[start : start + key_dim]) * doc.scale for other in qkv])
            start = 2 * heads * key_dim + head * value_dim
            mixed.append(sum(w * o[start : start + value_dim] for w, o in zip(weights, qkv, strict=True)))
        out.append(torch.cat(mixed))
    return out


def pointwise(maps: dict[int, list[Tensor]], doc: Any, state: State, name: str) -> dict[int, list[Tensor]]:
    """Windows attend to windows by their tokens; whole feature maps are what is mixed."""
    heads, key_dim, value_dim = doc.heads, doc.point_key_dim, doc.value_dim
    qk = {
        w: linear(gelu(layer_norm(m[0], state, f"{name}.point_norm", 1e-5)), state, f"{name}.point_qk")
        for w, m in maps.items()
    }
    out = {}
    for w in maps:
        features = [z.clone() for z in maps[w][1:]]
        for head in range(heads):
            q = qk[w][head * key_dim : (head + 1) * key_dim]
            start = (heads + head) * key_dim
            weights = softmax([float(q @ qk[o][start : start + key_dim]) * doc.point_scale for o in maps])
            part = slice(head * value_dim, (head + 1) * value_dim)
            for t, feature in enumerate(features):
                feature[part] += sum(a * maps[o][1 + t][part] for a, o in zip(weights, maps, strict=True))
        out[w] = features
    return out


def inner(y: Tensor, doc: Any) -> Tensor:
    """The normalised input in the inner width: the channels `residual` names, or the first ones, zero beyond them."""
    out = torch.zeros(doc.heads * doc.value_dim, dtype=y.dtype)
    for channel in range(len(out)):
        source = channel if doc.residual is None else doc.residual[channel]
        if 0 <= source < len(y):
            out[channel] = y[source]
    return out


def uniform(
    helpers: ModuleType, windows: list[list[int]], embed: int, heads: int, key: int, value: int, **attn: Any
) -> Arch:
    """One attention shape everywhere; windows[s][i] is the window of stage s, block i, on grids of 8, 4, 2."""
    doc = {
        "heads": heads,
        "key_dim": key,
        "value_dim": value,
        "scale": key**-0.5,
        "point_key_dim": key,
        "point_scale": key**-0.5,
        "keep_rate": 1.0,
        "residual": None,
    } | attn
    stages = [
        {
            "embed_dim": embed,
            "blocks": [{"attn": doc | {"window": w}, "ffn": {"hidden": 4 * embed, "keep_rate": 1.0}} for w in stage],
        }
        for stage in windows
    ]
    return helpers.random_arch("sepvit", 0, stages=stages)


@pytest.mark.parametrize(
    "windows",
    [
        pytest.param([[2]], id="depthwise-and-pointwise"),
        pytest.param([[8]], id="one-window"),
        pytest.param([[2, 4]], id="grouped"),
        pytest.param([[4], [2, 4], [2]], id="as-published"),
    ],
)
@pytest.mark.parametrize(("heads", "key", "value"), [(3, 4, 4), (2, 5, 6), (2, 3, 4), (3, 4, 6), (1, 2, 12)])
def test_shapes_equal_the_reference(
    windows: list[list[int]], heads: int, key: int, value: int, helpers: ModuleType
) -> None:
    """heads * value equals the width (12), is narrower (8) and is wider (18)."""
    helpers.assert_equals_reference(reference, uniform(helpers, windows, 12, heads, key, value), 3)


@pytest.mark.parametrize("residual", [[11, 0, 3, -1, 5, 5, 2, 8], [-1] * 8])
@pytest.mark.parametrize("windows", [[[4]], [[8]]])
def test_explicit_residuals_equal_the_reference(
    residual: list[int], windows: list[list[int]], helpers: ModuleType
) -> None:
    helpers.assert_equals_reference(reference, uniform(helpers, windows, 12, 2, 3, 4, residual=residual), 4)


@pytest.mark.parametrize("rate", [0.3, 0.55, 0.9])
def test_kept_windows_equal_the_reference(rate: float, helpers: ModuleType) -> None:
    helpers.assert_equals_reference(reference, uniform(helpers, [[2, 4]], 12, 3, 4, 4, keep_rate=rate), 5)


@pytest.mark.parametrize("seed", range(12))
def test_irregular_networks_equal_the_reference(seed: int, helpers: ModuleType) -> None:
    helpers.assert_equals_reference(reference, helpers.random_arch("sepvit", seed), seed)


def test_layer_norms_are_the_official_ones() -> None:
    """The official code gives blocks and the last norm eps 1e-6; patch embeddings and window tokens keep PyTorch's."""
    found: dict[float, set[str]] = {}
    for name, module in search_spaces.create_model("sepvit_lite").named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            found.setdefault(module.eps, set()).add(re.sub(r"\d+", "N", name))
    assert found == {
        1e-5: {"stages.N.norm", "stages.N.blocks.N.attn.point_norm"},
        1e-6: {"stages.N.blocks.N.attn.norm", "stages.N.blocks.N.norm", "norm"},
    }


def test_window_tokens_only_where_there_are_windows() -> None:
    """At 224: stage 1 has 64 windows; stage 2 16 and 4; stage 3 4 in every other block, else 1; stage 4 one."""
    state = search_spaces.create_model("sepvit_lite").state_dict()
    found = {key.removesuffix(".attn.window_token"): value.shape[1] for key, value in state.items() if "token" in key}
    assert found == {
        "stages.0.blocks.0": 64,
        "stages.1.blocks.0": 16,
        "stages.1.blocks.1": 4,
        **{f"stages.2.blocks.{i}": 4 for i in (0, 2, 4)},
    }
    assert all(not value.any() for key, value in state.items() if "token" in key)  # zero at the start


@pytest.mark.parametrize("fault", [{"window": 3}, {"residual": [0]}, {"residual": [12] * 12}, {"residual": [-2] * 12}])
def test_impossible_attention_is_refused(fault: dict[str, Any], helpers: ModuleType) -> None:
    raw = helpers.document(uniform(helpers, [[4]], 12, 3, 4, 4))
    raw["stages"][0]["blocks"][0]["attn"] |= fault
    with pytest.raises(ArchError, match=next(iter(fault))):
        helpers.read(raw)
