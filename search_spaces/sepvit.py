"""SepViT (Li et al., 2022, arXiv 2203.15380): attention inside windows, then across windows through window tokens.

Grids are (B, H, W, C). Depthwise separable attention within a window is followed by pointwise attention between
the windows; grouped attention is the same on windows twice as wide. A stage with one window has plain attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from search_spaces.arch import (
    MAX_BLOCKS,
    MAX_STAGES,
    Arch,
    ArchError,
    Attn,
    Dim,
    Doc,
    Ffn,
    Heads,
    Rate,
    Scale,
    StageSummary,
    attentions,
    kept,
    summarise,
)
from search_spaces.attention import attend, attention_widths, key
from search_spaces.counting import Tally
from search_spaces.gates import Gate
from search_spaces.layers import RGB, Axes, Conv, LayerNorm, Linear, Residual, halved, mlp
from search_spaces.network import Network
from search_spaces.registry import Family, Variant, register
from search_spaces.space import KEEPS, Space, Values, per_stage
from search_spaces.tokens import flat_rows, on_strongest, strongest, take_tokens
from search_spaces.widths import Axis, Cat, Each, Width, fixed

TORCH_EPS = 1e-5
"""PyTorch's eps of a LayerNorm, which the official code keeps in patch embeddings and for window tokens."""


class SepAttn(Doc):
    """Separable attention: within windows, then across them."""

    window: Annotated[int, Field(ge=1, le=64)]
    """Side of a window, in positions of the grid."""
    heads: Heads
    key_dim: Dim
    value_dim: Dim
    scale: Scale
    point_key_dim: Dim
    """Of q and k of the attention across windows; unused where there is one window."""
    point_scale: Scale
    """Likewise."""
    keep_rate: Rate
    """Share of windows, by energy, that attend; the others pass."""
    residual: tuple[Annotated[int, Field(ge=-1, le=8191)], ...] | None
    """Which input channel the inner residual adds to each of the heads * value_dim inner channels (-1: none); None: in
    order."""


class SepVitBlock(Doc):
    attn: SepAttn | None
    ffn: Ffn | None


class SepVitStage(Doc):
    embed_dim: Dim
    blocks: Annotated[tuple[SepVitBlock, ...], Field(max_length=MAX_BLOCKS)]


class SepVitArch(Arch, family="sepvit"):
    width_fields: ClassVar[Mapping[str, str]] = {**Arch.width_fields, "point_qk": "point_key_dim"}

    family: Literal["sepvit"]
    stages: Annotated[tuple[SepVitStage, ...], Field(min_length=1, max_length=MAX_STAGES)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for i, (stage, grid) in enumerate(zip(self.stages, grids(self.resolution, len(self.stages)), strict=True)):
            for j, block in enumerate(stage.blocks):
                where = f"stages.{i}.blocks.{j}.attn"
                if block.attn is None:
                    continue
                if grid % block.attn.window:
                    raise ValueError(f"{where}.window {block.attn.window} does not divide the {grid} x {grid} grid")
                if block.attn.residual is not None:
                    inner = block.attn.heads * block.attn.value_dim
                    if len(block.attn.residual) != inner or max(block.attn.residual) >= stage.embed_dim:
                        raise ValueError(f"{where}.residual names one channel below embed_dim for each of {inner}")
        return self

    def _follow(self, raw: dict[str, Any], units: Mapping[str, np.ndarray]) -> None:
        for i, (stage, changed) in enumerate(zip(self.stages, raw["stages"], strict=True)):
            embed = units.get(f"stages.{i}.embed", np.arange(stage.embed_dim))
            place = {int(channel): ours for ours, channel in enumerate(embed) if channel >= 0}
            for j, (block, attn) in enumerate(zip(stage.blocks, (b["attn"] for b in changed["blocks"]), strict=True)):
                if block.attn is None:
                    continue
                name = f"stages.{i}.blocks.{j}.attn"
                heads = units.get(f"{name}.heads", np.arange(block.attn.heads))
                inner = units.get(f"{name}.v", np.arange(block.attn.value_dim))
                sources = inner_sources(block.attn, stage.embed_dim).reshape(block.attn.heads, -1)
                kept = [(h, inner[h] if inner.ndim == 2 else inner) for h in heads]
                channels = [sources[h][u] if u >= 0 else -1 for h, row in kept for u in row]
                residual = tuple(place.get(int(channel), -1) for channel in channels)
                attn["residual"] = None if residual == tuple(in_order(len(residual), len(embed))) else residual

    def _rescale(self, raw: dict[str, Any]) -> None:
        sides = (grids(resolution, len(self.stages)) for resolution in (self.resolution, raw["resolution"]))
        for i, (stage, before, after) in enumerate(zip(raw["stages"], *sides, strict=True)):
            for attn in (block["attn"] for block in stage["blocks"] if block["attn"]):
                per_side = before // attn["window"]
                if after % per_side:
                    what = (
                        f"the {after} x {after} grid of stages.{i} cannot be cut into {per_side} x {per_side} windows"
                    )
                    raise ArchError(f"resolution {raw['resolution']}: {what}")
                attn["window"] = after // per_side

    def summary(self) -> list[StageSummary]:
        return [
            summarise(
                s.embed_dim,
                [_as_attn(b.attn) for b in s.blocks],
                [b.ffn.hidden for b in s.blocks if b.ffn],
                [b.ffn.keep_rate if b.ffn else 1.0 for b in s.blocks],
            )
            for s in self.stages
        ]


def in_order(inner: int, embed: int) -> np.ndarray:
    """The input channel of each of `inner` inner channels taken in order; -1 beyond the last."""
    channels = np.arange(inner)
    return np.where(channels < embed, channels, -1)


def inner_sources(doc: SepAttn, embed: int) -> np.ndarray:
    """Which input channel the inner residual adds to each inner channel; -1 for none."""
    return in_order(doc.heads * doc.value_dim, embed) if doc.residual is None else np.array(doc.residual)


def _inner_sources(arch: SepVitArch, stage: int, block: int) -> np.ndarray:
    attn = arch.stages[stage].blocks[block].attn
    return inner_sources(attn, arch.stages[stage].embed_dim) if attn else np.zeros(0, dtype=np.int64)


def _as_attn(doc: SepAttn | None) -> Attn | None:
    if doc is None:
        return None
    return Attn(heads=doc.heads, key_dim=doc.key_dim, value_dim=doc.value_dim, scale=doc.scale)


def grids(resolution: int, stages: int) -> list[int]:
    """Side of each stage's grid: a stride of 4, then of 2 per stage."""
    sides = [-(-resolution // 4)]
    for _ in range(stages - 1):
        sides.append(halved(sides[-1]))
    return sides


class SeparableAttention(nn.Module):
    """norm, attention within windows, attention across windows, projection; added to the input.

    (B, W, M*M, C) windows in and out. Both attentions have an inner residual: the first adds the normalised input,
    the second its own input.
    """

    products: tuple[tuple[Axis, int], ...]
    source: Tensor
    """Which of the input's channels, and a zero behind them, the first inner residual adds; only if the Arch says."""

    def __init__(self, name: str, doc: SepAttn, embed: Width, grid: int) -> None:
        super().__init__()
        heads, qk, v = attention_widths(name, doc)
        inner = Each(heads, v)
        count, area = (grid // doc.window) ** 2, doc.window**2
        self.doc, self.windows, self.keep = doc, count, kept(doc.keep_rate, count)
        self.separable = count > 1
        tokens = area + self.separable
        self.scale, self.point_scale = doc.scale, doc.point_scale
        self.dims = (doc.heads * doc.key_dim, doc.heads * doc.key_dim, inner.size)
        self.norm = LayerNorm(embed, self.keep * tokens)
        self.qkv = Linear(embed, Cat((Each(heads, qk), Each(heads, key(qk)), inner)), self.keep * tokens)
        self.proj = Linear(inner, embed, self.keep * area)
        self.proj.terms = 1 + self.separable
        self.qkv.query_scale = doc.scale
        self.products = ((Each(heads, Cat((qk, v))), self.keep * tokens * tokens),)
        self.q_gate = Gate(Each(heads, qk), 2, 4)
        self.v_gate = Gate(inner, -1, heads=(heads, None))
        self.branch_gate = Gate(embed, -1, branch=name)
        if self.separable:
            one = fixed(1)
            self.window_token = nn.Parameter(torch.zeros(1, count, 1, embed.size))
            self.axes: Axes = {"window_token": (one, Width(f"{name}.windows", count, "resize"), one, embed)}
            point_qk = Width(f"{name}.point_qk", doc.point_key_dim, kind="qk")
            point = Each(heads, point_qk)
            self.point_norm = LayerNorm(inner, self.keep, TORCH_EPS)
            self.point_qk = Linear(inner, Cat((point, Each(heads, key(point_qk)))), self.keep)
            self.point_qk.query_scale = doc.point_scale
            self.point_gate = Gate(point, 1, 3)
            self.products += ((point, self.keep**2), (inner, self.keep**2 * area))
        if doc.residual is not None:
            source = torch.tensor([c if c >= 0 else embed.size for c in doc.residual], device="cpu")
            self.register_buffer("source", source, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        token = self.window_token.expand(x.shape[0], -1, -1, -1) if self.separable else None
        if token is None or self.keep == self.windows:
            return x + self._attend(x, token)
        flat = x.flatten(2)
        index = strongest(flat, self.keep)
        rows = flat_rows(index, self.windows)
        chosen = flat.flatten(0, 1).index_select(0, rows).view(x.shape[0], self.keep, *x.shape[2:])
        chosen = chosen + self._attend(chosen, take_tokens(token.squeeze(2), index).unsqueeze(2))
        return flat.flatten(0, 1).index_put((rows,), chosen.flatten(2).flatten(0, 1)).view_as(x)

    def _attend(self, x: Tensor, token: Tensor | None) -> Tensor:
        y = self.norm(x if token is None else torch.cat((token, x), 2))
        parts = self.qkv(y).split(self.dims, dim=3)
        q, k, v = (part.view(*part.shape[:3], self.doc.heads, -1).transpose(2, 3) for part in parts)
        z: Tensor = self.v_gate(attend(self.q_gate(q), k, v, self.scale).transpose(2, 3).flatten(3) + self._inner(y))
        if token is not None:
            z = self._across(z[:, :, 0], z[:, :, 1:])
        out: Tensor = self.branch_gate(self.proj(z))
        return out

    def _across(self, token: Tensor, z: Tensor) -> Tensor:
        """Pointwise attention: window tokens (B, W, E) mix whole feature maps (B, W, M*M, E)."""
        heads, (b, w, area, _) = self.doc.heads, z.shape
        q, k = self.point_qk(F.gelu(self.point_norm(token))).chunk(2, dim=2)
        q, k = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k))
        values = z.view(*z.shape[:3], heads, -1).permute(0, 3, 1, 2, 4).flatten(3)
        weights = ((self.point_gate(q) @ k.transpose(-2, -1)) * self.point_scale).softmax(-1)
        mixed: Tensor = (weights @ values).view(b, heads, w, area, -1).permute(0, 2, 3, 1, 4).flatten(3)
        return mixed + z

    def _inner(self, y: Tensor) -> Tensor:
        """The normalised input brought to the inner width."""
        inner = self.dims[2]
        if self.doc.residual is not None:
            return F.pad(y, (0, 1)).index_select(3, self.source)
        if inner == y.shape[3]:
            return y
        return y[..., :inner] if inner < y.shape[3] else F.pad(y, (0, inner - y.shape[3]))


class Block(nn.Module):
    """(B, H, W, C) -> same."""

    def __init__(self, name: str, doc: SepVitBlock, embed: Width, grid: int) -> None:
        super().__init__()
        tokens = grid * grid
        self.attn = SeparableAttention(f"{name}.attn", doc.attn, embed, grid) if doc.attn else None
        self.norm: LayerNorm | None = None
        self.ffn: nn.Sequential | None = None
        if doc.ffn:
            self.keep, self.tokens = kept(doc.ffn.keep_rate, tokens), tokens
            self.norm = LayerNorm(embed, self.keep)
            self.ffn = mlp(f"{name}.ffn", doc.ffn.hidden, embed, self.keep)

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = _in_windows(self.attn, x)
        if self.ffn is None or self.norm is None:
            return x
        norm, ffn = self.norm, self.ffn
        if self.keep == self.tokens:
            y: Tensor = ffn(norm(x))
            return x + y
        return on_strongest(x.flatten(1, 2), self.keep, lambda rows: ffn(norm(rows))).view_as(x)


def _in_windows(attn: SeparableAttention, x: Tensor) -> Tensor:
    """Cut (B, H, W, C) into the attention's windows and join them again."""
    (b, h, w, c), m = x.shape, attn.doc.window
    if m == h:
        whole: Tensor = attn(x.view(b, 1, h * w, c))
        return whole.view_as(x)
    n = h // m
    windows: Tensor = attn(x.view(b, n, m, n, m, c).transpose(2, 3).reshape(b, n * n, m * m, c))
    return windows.view(b, n, n, m, m, c).transpose(2, 3).reshape(b, h, w, c)


class Stage(nn.Module):
    """Overlapping patch embedding, blocks, and a depthwise position encoding after the first block."""

    def __init__(self, name: str, doc: SepVitStage, previous: Width | None, embed: Width, grid: int) -> None:
        super().__init__()
        kernel, stride = (7, 4) if previous is None else (3, 2)
        positions = grid * grid
        self.patch_embed = Conv(previous or RGB, embed, fixed(kernel), positions, stride=stride, bias=True)
        self.norm = LayerNorm(embed, positions, TORCH_EPS)
        self.blocks = nn.ModuleList(Block(f"{name}.blocks.{i}", b, embed, grid) for i, b in enumerate(doc.blocks))
        if doc.blocks:
            conv = Conv(embed, embed, fixed(3), positions, depthwise=True, bias=True)
            self.position = Residual(conv, Gate(embed, 1))
        self.entry_gate = Gate(embed, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.entry_gate(self.norm(self.patch_embed(x).permute(0, 2, 3, 1)))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0:
                x = self.position(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x.permute(0, 3, 1, 2)


class SepVit(Network):
    """(B, 3, R, R) -> (B, classes)."""

    def __init__(self, arch: SepVitArch) -> None:
        super().__init__()
        embeds = [Width(f"stages.{i}.embed", s.embed_dim, kind="embed") for i, s in enumerate(arch.stages)]
        sides = grids(arch.resolution, len(arch.stages))
        self.stages = nn.Sequential(
            *(
                Stage(f"stages.{i}", doc, embeds[i - 1] if i else None, embeds[i], sides[i])
                for i, doc in enumerate(arch.stages)
            )
        )
        self.norm = LayerNorm(embeds[-1], sides[-1] ** 2)
        self.head = Linear(embeds[-1], Width("classes", arch.num_classes, "fixed"), positions=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stages(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(x.mean(1))
        return logits


def _count(arch: SepVitArch) -> list[Tally]:
    found, inp, kernel = list[Tally](), 3, 7
    for stage, grid in zip(arch.stages, grids(arch.resolution, len(arch.stages)), strict=True):
        found.append(tally := Tally())
        embed, positions = stage.embed_dim, grid * grid
        tally.linear(inp * kernel * kernel, embed, positions)
        tally.norm(embed, positions)
        if stage.blocks:
            tally.linear(9, embed, positions)
        for block in stage.blocks:
            if block.attn is not None:
                _count_attention(tally, block.attn, embed, grid)
            if block.ffn is not None:
                tally.norm_mlp(block.ffn.hidden, embed, kept(block.ffn.keep_rate, positions))
        inp, kernel = embed, 3
    found[-1].norm(inp, positions)
    found[-1].linear(inp, arch.num_classes, 1)
    return found


def _count_attention(tally: Tally, doc: SepAttn, embed: int, grid: int) -> None:
    count, area, inner = (grid // doc.window) ** 2, doc.window**2, doc.heads * doc.value_dim
    keep, tokens = kept(doc.keep_rate, count), area + (count > 1)
    tally.norm_linear(embed, 2 * doc.heads * doc.key_dim + inner, keep * tokens)
    tally.linear(inner, embed, keep * area)
    tally.macs += doc.heads * (doc.key_dim + doc.value_dim) * keep * tokens * tokens
    if count > 1:
        tally.weights(0, others=count * embed)
        tally.norm_linear(inner, 2 * doc.heads * doc.point_key_dim, keep)
        tally.macs += (doc.heads * doc.point_key_dim + inner * area) * keep * keep


OFFICIAL = (
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.patch_embed."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.norm."),
    (r"^pos_block\.(\d+)\.proj\.0\.", r"stages.\1.position.branch."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.norm1\.", ".attn.norm."),
    (r"\.norm2\.", ".norm."),
    (r"\.mlp\.", ".ffn."),
    (r"\.DSA_qkv\.", ".qkv."),
    (r"\.PSA_qk\.", ".point_qk."),
    (r"\.win_tokens_norm\.", ".point_norm."),
    (r"\.win_tokens$", ".attn.window_token"),
)


def _arch(values: Values, num_classes: int) -> SepVitArch:
    """Windows of resolution / 32 (7 at 224); grouped attention doubles them where the grid allows."""
    small, dim = values["resolution"] // 32, values["qk"]
    stages: list[SepVitStage] = []
    for s, grid in enumerate(grids(values["resolution"], 4), 1):
        expansion, pattern = values[f"mix_s{s}"]
        embed, keep, target = values[f"width_s{s}"], values[f"keep_s{s}"], values["form"]
        ffn = Ffn(hidden=int(embed * expansion), keep_rate=keep if target != "windows" else 1.0)
        blocks = []
        for i in range(values[f"depth_s{s}"]):
            grouped = pattern == "grouped" or (pattern == "alternate" and i % 2 == 1)
            window = min(2 * small if grouped else small, grid)
            attn = SepAttn(
                window=window,
                heads=values[f"heads_s{s}"],
                key_dim=dim,
                value_dim=dim,
                scale=dim**-0.5,
                point_key_dim=dim,
                point_scale=dim**-0.5,
                keep_rate=keep if target != "ffn" and window < grid else 1.0,
                residual=None,
            )
            blocks.append(SepVitBlock(attn=attn, ffn=ffn))
        stages.append(SepVitStage(embed_dim=embed, blocks=tuple(blocks)))
    return SepVitArch(
        version=1,
        family="sepvit",
        resolution=values["resolution"],
        num_classes=num_classes,
        stages=tuple(stages),
    )


MIX = (
    (2.0, "alternate"),
    (2.0, "windows"),
    (3.0, "alternate"),
    (3.0, "windows"),
    (4.0, "alternate"),
    (4.0, "windows"),
    (4.0, "grouped"),
)

SPACE = Space(
    options={
        "resolution": (96, 128, 160, 192, 224, 256),
        "form": ("ffn", "windows", "both"),
        "qk": (16, 32),
        **per_stage(
            "width",
            (16, 32, 48, 64, 96, 128),
            (32, 64, 96, 128, 192, 256),
            (64, 128, 192, 256, 384, 512),
            (128, 256, 384, 512, 768, 1024),
        ),
        **per_stage("depth", (1, 2), (1, 2, 3), (1, 2, 4, 6, 8, 10, 14), (1, 2, 3)),
        **per_stage("heads", (1, 2, 3, 4), (1, 2, 3, 4, 6, 8), (2, 4, 6, 8, 12, 16), (4, 8, 12, 16, 24, 32)),
        **per_stage("mix", MIX, MIX, MIX, MIX),
        **per_stage("keep", KEEPS, KEEPS, KEEPS, KEEPS),
    },
    arch=_arch,
)


def _variant(top1: float, width: int, depth: tuple[int, int, int, int], source: str) -> Variant:
    values = {
        "resolution": 224,
        "form": "ffn",
        "qk": 32,
        **per_stage("width", *(width * 2**s for s in range(4))),
        **per_stage("heads", *(width // 32 * 2**s for s in range(4))),
        **per_stage("depth", *depth),
        **per_stage("mix", *[(4.0, "alternate")] * 4),
        **per_stage("keep", *[1.0] * 4),
    }
    return Variant(values, top1, source)


def _hold_all(raw: Any, documents: Sequence[Any]) -> None:
    """As many windows a side as any has, for a window token belongs to its place; inner residuals in order."""
    sides = grids(raw["resolution"], len(raw["stages"]))
    for i, grid in enumerate(sides):
        for j, attn, _ in attentions([raw], i):
            windows = [
                grids(document["resolution"], len(document["stages"]))[i] // other["window"]
                for block, other, document in attentions(documents, i)
                if block == j
            ]
            attn["window"] = grid // max(windows)
            attn["residual"] = None


PAPER = "SepViT, arXiv 2203.15380, repository table (300 epochs)"

register(
    Family(
        name="sepvit",
        build=SepVit,
        count=_count,
        space=SPACE,
        official=lambda arch: OFFICIAL,
        tokens=("window_token",),
        ordered=("heads", "v"),
        inner_sources=_inner_sources,
        hold_all=_hold_all,
        variants={
            "sepvit_lite": _variant(72.3, 32, (1, 2, 6, 2), PAPER + "; this top-1 is unverified"),
            "sepvit_tiny": _variant(82.7, 96, (1, 2, 6, 2), PAPER),
            "sepvit_small": _variant(83.6, 96, (1, 2, 14, 2), PAPER),
            "sepvit_base": _variant(84.2, 128, (1, 2, 14, 2), PAPER),
        },
    )
)
