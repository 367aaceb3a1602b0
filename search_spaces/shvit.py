"""SHViT (Yun and Ro, CVPR 2024, arXiv 2401.16456): single-head attention on part of the channels.

All tensors are (B, C, H, W). More than one head, free value widths and attention in any block are extensions the
search uses; the published networks have one head and values as wide as the attended part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from search_spaces.arch import (
    MAX_BLOCKS,
    MAX_STAGES,
    Arch,
    Attn,
    Dim,
    Doc,
    Ffn,
    Heads,
    Scale,
    StageSummary,
    attentions,
    check_downsamples,
    summarise,
)
from search_spaces.attention import attention_widths, qkv_axis, scale_rows
from search_spaces.counting import Tally
from search_spaces.gates import Gate
from search_spaces.grid import OFFICIAL, Merge, Pyramid, count_pyramid, published_merge
from search_spaces.layers import ConvNorm, FeedForward, GroupNorm, Residual
from search_spaces.registry import Family, Variant, register
from search_spaces.space import KEEPS, Space, Values, per_stage, with_attention
from search_spaces.widths import Cat, Each, Width, boundary, fixed


class PartialAttn(Doc):
    """Attention on the first `dim` channels; the others go straight to the output projection."""

    dim: Dim
    heads: Heads
    key_dim: Dim
    value_dim: Dim
    scale: Scale


class ShvitBlock(Doc):
    """A residual depthwise convolution, residual attention, a residual FFN; each may be absent."""

    conv: bool
    attn: PartialAttn | None
    ffn: Ffn | None


class ShvitStage(Doc):
    embed_dim: Dim
    downsample: Merge | None
    blocks: Annotated[tuple[ShvitBlock, ...], Field(max_length=MAX_BLOCKS)]


class ShvitArch(Arch, family="shvit"):
    family: Literal["shvit"]
    distilled: bool
    stem: tuple[Dim, Dim, Dim]
    stages: Annotated[tuple[ShvitStage, ...], Field(min_length=1, max_length=MAX_STAGES)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_downsamples(self.stages)
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.blocks):
                if block.attn and block.attn.dim > stage.embed_dim:
                    raise ValueError(
                        f"stages.{i}.blocks.{j}.attn.dim is {block.attn.dim}, more than embed_dim {stage.embed_dim}"
                    )
        return self

    def _follow(self, raw: dict[str, Any], units: Mapping[str, np.ndarray]) -> None:
        for i, stage in enumerate(raw["stages"]):
            for block in stage["blocks"]:
                if block["attn"] and f"stages.{i}.embed" in units:
                    block["attn"]["dim"] = boundary(units[f"stages.{i}.embed"], block["attn"]["dim"])

    def summary(self) -> list[StageSummary]:
        return [
            summarise(
                s.embed_dim,
                [_as_attn(b.attn) for b in s.blocks],
                [b.ffn.hidden for b in s.blocks if b.ffn],
                [b.ffn.keep_rate for b in s.blocks if b.ffn],
            )
            for s in self.stages
        ]


def _as_attn(doc: PartialAttn | None) -> Attn | None:
    if doc is None:
        return None
    return Attn(heads=doc.heads, key_dim=doc.key_dim, value_dim=doc.value_dim, scale=doc.scale)


class PartialAttention(nn.Module):
    """x + proj(relu([attention(norm(first dim channels)), other channels])); all positions, no bias."""

    def __init__(self, name: str, doc: PartialAttn, embed: Width, grid: int) -> None:
        super().__init__()
        heads, qk, v = attention_widths(name, doc)
        part = Width(f"{name}.dim", doc.dim, part_of=(embed.name, 0))
        rest = Width(f"{name}.rest", embed.size - doc.dim, part_of=(embed.name, doc.dim))
        tokens = grid * grid
        self.dims = (doc.dim, embed.size - doc.dim)
        self.heads, self.scale = doc.heads, doc.scale
        self.split = (doc.key_dim, doc.key_dim, doc.value_dim)
        self.norm = GroupNorm(part, tokens)
        self.qkv = ConvNorm(part, qkv_axis(heads, qk, v), tokens)
        self.qkv.query_scale = doc.scale
        self.act = nn.ReLU()
        self.proj = ConvNorm(Cat((Each(heads, v), rest)), embed, tokens, gamma=0.0)
        self.products = ((Each(heads, Cat((qk, v))), tokens * tokens),)
        self.q_gate = Gate(Each(heads, qk), *((1,) if doc.heads == 1 else (1, 2)))
        self.v_gate = Gate(Each(heads, v), 1, heads=(heads, None))
        self.branch_gate = Gate(embed, 1, branch=name)

    def forward(self, x: Tensor) -> Tensor:
        part, rest = x[:, : self.dims[0]], x[:, self.dims[0] :]
        qkv = self.qkv(self.norm(part)).flatten(2)
        if self.heads > 1:
            qkv = qkv.view(qkv.shape[0], self.heads, -1, qkv.shape[2])
        q, k, v = qkv.split(self.split, dim=-2)
        logits = self.q_gate(q).transpose(-2, -1) @ k
        if self.scale != 1:
            logits = logits * self.scale
        mixed = v @ logits.softmax(-1).transpose(-2, -1)
        mixed = self.v_gate(mixed.reshape(x.shape[0], -1, *x.shape[2:]))
        joined = torch.cat((mixed, rest), 1) if self.dims[1] else mixed
        y: Tensor = self.branch_gate(self.proj(self.act(joined)))
        return x + y

    def folded(self) -> PartialAttention:
        key_dim, per_head = self.split[0], sum(self.split)
        rows = torch.arange(self.heads)[:, None] * per_head + torch.arange(key_dim)
        scale_rows(self.qkv, rows.flatten(), self.scale)
        self.scale = 1.0
        return self


class Block(nn.Module):
    def __init__(self, name: str, doc: ShvitBlock, embed: Width, grid: int) -> None:
        super().__init__()
        conv = ConvNorm(embed, embed, grid * grid, kernel=fixed(3), depthwise=True, gamma=0.0) if doc.conv else None
        self.conv = Residual(conv, Gate(embed, 1, branch=f"{name}.conv")) if conv is not None else None
        self.attn = PartialAttention(f"{name}.attn", doc.attn, embed, grid) if doc.attn else None
        self.ffn = FeedForward(f"{name}.ffn", doc.ffn, embed, grid * grid, nn.ReLU) if doc.ffn else None

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.conv, self.attn, self.ffn):
            if part is not None:
                x = part(x)
        return x


def _count_block(tally: Tally, doc: ShvitBlock, embed: int, grid: int) -> None:
    tokens = grid * grid
    if doc.conv:
        tally.depthwise_norm(embed, tokens)
    if doc.attn is not None:
        heads, qk, v = doc.attn.heads, doc.attn.key_dim, doc.attn.value_dim
        tally.norm(doc.attn.dim, tokens)
        tally.conv_norm(doc.attn.dim, heads * (2 * qk + v), tokens)
        tally.conv_norm(heads * v + embed - doc.attn.dim, embed, tokens)
        tally.macs += heads * (qk + v) * tokens * tokens
    tally.feed_forward(doc.ffn, embed, tokens)


RENAME = (
    (r"^patch_embed\.(\d)\.", r"stem.\1."),
    (r"\.downsample\.0\.m\.", ".downsample.before.conv.branch."),
    (r"\.downsample\.1\.m\.", ".downsample.before.ffn."),
    (r"\.downsample\.2\.conv1\.", ".downsample.expand."),
    (r"\.downsample\.2\.conv2\.", ".downsample.conv."),
    (r"\.downsample\.2\.conv3\.", ".downsample.project."),
    (r"\.downsample\.2\.se\.", ".downsample.se."),
    (r"\.downsample\.3\.m\.", ".downsample.after.conv.branch."),
    (r"\.downsample\.4\.m\.", ".downsample.after.ffn."),
    (r"\.conv\.m\.", ".conv.branch."),
    (r"\.mixer\.m\.pre_norm\.", ".attn.norm."),
    (r"\.mixer\.m\.proj\.1\.", ".attn.proj."),
    (r"\.mixer\.m\.", ".attn."),
    (r"\.ffn\.m\.", ".ffn."),
    (r"\.pw(\d)\.", r".fc\1."),
    (r"^head\.bn\.", "head.cls.norm."),
    (r"^head\.l\.", "head.cls.linear."),
    (r"\.c\.", ".linear."),
    (r"\.bn\.", ".norm."),
)

PAPER_RATIO = 0.214


def _arch(values: Values, num_classes: int) -> ShvitArch:
    """Paper section 4: attention on a share `form` of the channels (0.214 is the paper's 1/4.67)."""
    stages: list[ShvitStage] = []
    for s in (1, 2, 3):
        expansion, share = values[f"mix_s{s}"]
        embed, heads, depth = values[f"width_s{s}"], values[f"heads_s{s}"], values[f"depth_s{s}"]
        dim = max(heads, round(values["form"] * embed))
        attn = PartialAttn(
            dim=dim,
            heads=heads,
            key_dim=values["qk"],
            value_dim=dim // heads,
            scale=values["qk"] ** -0.5,
        )
        ffn = Ffn(hidden=int(embed * expansion), keep_rate=values[f"keep_s{s}"])
        blocks = tuple(
            ShvitBlock(conv=True, attn=attn if has else None, ffn=ffn) for has in with_attention(depth, share)
        )
        downsample = published_merge(stages[-1].embed_dim, embed) if stages else None
        stages.append(ShvitStage(embed_dim=embed, downsample=downsample, blocks=blocks))
    first = stages[0].embed_dim
    return ShvitArch(
        version=1,
        family="shvit",
        resolution=values["resolution"],
        num_classes=num_classes,
        distilled=False,
        stem=(first // 8, first // 4, first // 2),
        stages=tuple(stages),
    )


def _hold_all(raw: Any, documents: Sequence[Any]) -> None:
    """A stage is as wide as the widest attended part beside the widest rest of any document."""
    for i, stage in enumerate(raw["stages"]):
        rest = [document["stages"][i]["embed_dim"] - attn["dim"] for _, attn, document in attentions(documents, i)]
        parts = [attn["dim"] for _, attn, _ in attentions([raw], i)]
        stage["embed_dim"] = max(stage["embed_dim"], max(parts, default=0) + max(rest, default=0))


MIX = ((1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0), (2.0, 0.5), (2.0, 0.0), (3.0, 0.0))

SPACE = Space(
    options={
        "resolution": (128, 144, 160, 192, 224, 256, 288),
        "form": (0.125, PAPER_RATIO, 0.333, 0.5),
        "qk": (8, 16, 32),
        **per_stage(
            "width",
            (32, 64, 96, 128, 160, 192, 224),
            (96, 128, 176, 224, 308, 336, 352),
            (128, 192, 256, 320, 384, 448, 512),
        ),
        **per_stage("depth", (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 6, 7)),
        **per_stage("heads", (1, 2, 4), (1, 2, 4), (1, 2, 4)),
        **per_stage("mix", MIX, MIX, MIX),
        **per_stage("keep", KEEPS, KEEPS, KEEPS),
    },
    arch=_arch,
)


def _variant(
    top1: float,
    width: tuple[int, int, int],
    depth: tuple[int, int, int],
    resolution: int,
    timm: str,
) -> Variant:
    values = {
        "resolution": resolution,
        "form": PAPER_RATIO,
        "qk": 16,
        **per_stage("width", *width),
        **per_stage("heads", *[1] * 3),
        **per_stage("depth", *depth),
        **per_stage("mix", (2.0, 0.0), (2.0, 1.0), (2.0, 1.0)),
        **per_stage("keep", *[1.0] * 3),
    }
    return Variant(values, top1, "SHViT, CVPR 2024, and its repository (300 epochs, not distilled)", timm)


register(
    Family(
        name="shvit",
        build=lambda arch: Pyramid(arch, Block),
        count=lambda arch: count_pyramid(arch, _count_block),
        space=SPACE,
        rename=RENAME,
        official=lambda arch: (*OFFICIAL, *RENAME),
        hold_all=_hold_all,
        variants={
            "shvit_s1": _variant(72.8, (128, 224, 320), (2, 4, 5), 224, "shvit_s1"),
            "shvit_s2": _variant(75.2, (128, 308, 448), (2, 4, 5), 224, "shvit_s2"),
            "shvit_s3": _variant(77.4, (192, 352, 448), (3, 5, 5), 224, "shvit_s3"),
            "shvit_s4": _variant(79.4, (224, 336, 448), (4, 7, 6), 256, "shvit_s4"),
        },
    )
)
