"""LeViT (Graham et al., ICCV 2021, arXiv 2104.01136): convolutional stem, three stages of attention with learned
biases, stages joined by strided attention. In linear form tokens are (B, N, C), in conv form (B, C, H, W); the
weights are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, Self

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
    Rate,
    StageSummary,
    check_downsamples,
    kept,
    summarise,
)
from search_spaces.attention import AttentionBias, attention_widths, key, qkv_axis, scale_rows
from search_spaces.counting import Tally
from search_spaces.gates import Gate
from search_spaces.layers import Classifier, ConvNorm, FeedForward, Form, LinearNorm, halved, pointwise, stem
from search_spaces.network import Network
from search_spaces.registry import Family, Rules, Variant, register
from search_spaces.space import KEEPS, Space, Values, per_stage, with_attention
from search_spaces.tokens import strongest, take_tokens
from search_spaces.widths import Cat, Each, Width


class LevitBlock(Doc):
    attn: Attn | None
    ffn: Ffn | None


class LevitDownsample(Doc):
    """Strided attention into the next stage, then an FFN at the new width."""

    attn: Attn
    ffn: Ffn | None


class LevitStage(Doc):
    """A downsampling (but for the first stage), then blocks."""

    embed_dim: Dim
    downsample: LevitDownsample | None
    keep_rate: Rate
    """Share of tokens kept for good at the stage's entry; below 1 in the last stage only, as nothing after it needs the
    grid."""
    blocks: Annotated[tuple[LevitBlock, ...], Field(max_length=MAX_BLOCKS)]


class LevitArch(Arch, family="levit"):
    family: Literal["levit"]
    form: Form
    distilled: bool
    stem: tuple[Dim, Dim, Dim]
    stages: Annotated[tuple[LevitStage, ...], Field(min_length=1, max_length=MAX_STAGES)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_downsamples(self.stages)
        for i, stage in enumerate(self.stages):
            if stage.keep_rate < 1 and i != len(self.stages) - 1:
                raise ValueError(f"stages.{i}.keep_rate: only the last stage can drop tokens")
        return self

    def summary(self) -> list[StageSummary]:
        return [
            summarise(
                s.embed_dim,
                [b.attn for b in s.blocks],
                [b.ffn.hidden for b in s.blocks if b.ffn],
                [s.keep_rate * (b.ffn.keep_rate if b.ffn else 1.0) for b in s.blocks],
            )
            for s in self.stages
        ]


class Attention(nn.Module):
    """x + proj(act(softmax(q k^T * scale + bias) v)); with `stride` 2 queries are strided and there is no residual.

    In linear form (B, N, C), in conv form (B, C, H, W). With `index` (B, k), x holds only those positions of the
    grid and the bias is gathered for them.
    """

    def __init__(
        self,
        name: str,
        doc: Attn,
        embed: Width,
        out: Width,
        grid: int,
        tokens: int,
        form: Form,
        stride: int = 1,
    ) -> None:
        super().__init__()
        heads, qk, v = attention_widths(name, doc)
        queries = tokens if stride == 1 else halved(grid) ** 2
        self.form, self.grid, self.stride, self.scale = form, grid, stride, doc.scale
        self.heads, self.key_dim, self.value_dim = doc.heads, doc.key_dim, doc.value_dim
        if stride == 1:
            self.qkv = pointwise(form, embed, qkv_axis(heads, qk, v), tokens)
            self.qkv.query_scale = doc.scale
        else:
            strided = partial(ConvNorm, stride=stride) if form == "conv" else LinearNorm
            self.q = strided(embed, Each(heads, qk), queries)
            self.q.query_scale = doc.scale
            self.kv = pointwise(form, embed, Each(heads, Cat((key(qk), v))), tokens)
        self.bias = AttentionBias(name, heads, grid, stride)
        self.act = nn.Hardswish()
        self.proj = pointwise(form, Each(heads, v), out, queries, gamma=0.0 if stride == 1 else 1.0)
        self.products = ((Each(heads, Cat((qk, v))), queries * tokens),)
        dim = -1 if form == "linear" else 1
        self.q_gate = Gate(Each(heads, qk), *((2, 3) if form == "linear" else (1, 2)))
        self.v_gate = Gate(Each(heads, v), dim, heads=(heads, None))
        self.out_gate = Gate(out, dim, branch=name if stride == 1 else None)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        if self.stride == 1:
            q, k, v = self._per_head(self.qkv(x), (self.key_dim, self.key_dim, self.value_dim))
        else:
            (q,) = self._per_head(self.q(self._strided(x) if self.form == "linear" else x), (self.key_dim,))
            k, v = self._per_head(self.kv(x), (self.key_dim, self.value_dim))
        q, bias = self.q_gate(q), self.bias()
        if index is not None:
            bias = self._bias_at(bias, index)
        if self.form == "linear":
            logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
            mixed = self._softmax(logits, bias) @ v.transpose(1, 2)
            joined = mixed.transpose(1, 2).flatten(2)
        else:
            logits = q.transpose(-2, -1) @ k
            mixed = v @ self._softmax(logits, bias).transpose(-2, -1)
            side = x.shape[2:] if self.stride == 1 else (halved(self.grid), halved(self.grid))
            joined = mixed.reshape(x.shape[0], -1, *side)
        y: Tensor = self.out_gate(self.proj(self.v_gate(self.act(joined))))
        return x + y if self.stride == 1 else y

    def _per_head(self, y: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Split a projection into (B, N, heads, dim) (linear form) or (B, heads, dim, N) (conv form)."""
        if self.form == "linear":
            parts: tuple[Tensor, ...] = y.view(*y.shape[:2], self.heads, -1).split(dims, dim=3)
        else:
            parts = y.flatten(2).view(y.shape[0], self.heads, -1, y.shape[2] * y.shape[3]).split(dims, dim=2)
        return parts

    def _strided(self, x: Tensor) -> Tensor:
        """Tokens of every stride-th row and column; in conv form the projection itself is strided."""
        grid = x.view(x.shape[0], self.grid, self.grid, -1)
        return grid[:, :: self.stride, :: self.stride].flatten(1, 2)

    def _softmax(self, logits: Tensor, bias: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return (logits + bias).softmax(-1)

    def _bias_at(self, bias: Tensor, index: Tensor) -> Tensor:
        """(heads, N, N) -> (B, heads, k, k) at each image's own positions."""
        pairs = index.unsqueeze(2) * bias.shape[-1] + index.unsqueeze(1)
        chosen = bias.flatten(1).index_select(1, pairs.flatten())
        return chosen.view(-1, *pairs.shape).transpose(0, 1)

    def folded(self) -> Attention:
        projection, per_head = (
            (self.qkv, 2 * self.key_dim + self.value_dim) if self.stride == 1 else (self.q, self.key_dim)
        )
        rows = torch.arange(self.heads)[:, None] * per_head + torch.arange(self.key_dim)
        scale_rows(projection, rows.flatten(), self.scale)
        self.scale = 1.0
        return self


class Block(nn.Module):
    """Residual attention, then residual FFN; either may be absent."""

    def __init__(self, name: str, doc: LevitBlock, embed: Width, grid: int, tokens: int, form: Form) -> None:
        super().__init__()
        self.attn = Attention(f"{name}.attn", doc.attn, embed, embed, grid, tokens, form) if doc.attn else None
        self.ffn = FeedForward(f"{name}.ffn", doc.ffn, embed, tokens, nn.Hardswish, form) if doc.ffn else None

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        if self.attn is not None:
            x = self.attn(x, index)
        return x if self.ffn is None else self.ffn(x)


class Downsample(nn.Module):
    """Strided attention to a grid of half the side, then a residual FFN."""

    def __init__(self, name: str, doc: LevitDownsample, inp: Width, out: Width, grid: int, form: Form) -> None:
        super().__init__()
        self.attn = Attention(f"{name}.attn", doc.attn, inp, out, grid, grid * grid, form, stride=2)
        tokens = halved(grid) ** 2
        self.ffn = FeedForward(f"{name}.ffn", doc.ffn, out, tokens, nn.Hardswish, form) if doc.ffn else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        return x if self.ffn is None else self.ffn(x)


class Stage(nn.Module):
    def __init__(
        self,
        name: str,
        doc: LevitStage,
        previous: Width | None,
        embed: Width,
        grid: int,
        form: Form,
    ) -> None:
        super().__init__()
        self.downsample = None
        if doc.downsample is not None and previous is not None:
            self.downsample = Downsample(f"{name}.downsample", doc.downsample, previous, embed, grid, form)
            grid = halved(grid)
        self.form, self.grid, self.keep = form, grid, kept(doc.keep_rate, grid * grid)
        self.blocks = nn.ModuleList(
            Block(f"{name}.blocks.{i}", block, embed, grid, self.keep, form) for i, block in enumerate(doc.blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        index = None
        if self.keep < self.grid**2:
            tokens = x if self.form == "linear" else x.flatten(2).transpose(1, 2)
            index = strongest(tokens, self.keep)
            x = take_tokens(tokens, index)
            x = x if self.form == "linear" else x.transpose(1, 2).unsqueeze(-1)
        for block in self.blocks:
            x = block(x, index)
        return x


class Levit(Network):
    """(B, 3, R, R) -> (B, classes)."""

    def __init__(self, arch: LevitArch) -> None:
        super().__init__()
        embeds = [Width(f"stages.{i}.embed", s.embed_dim, kind="embed") for i, s in enumerate(arch.stages)]
        self.form = arch.form
        self.stem = stem(arch.stem, embeds[0], arch.resolution, nn.Hardswish)
        grid = arch.resolution
        for _ in range(len(arch.stem) + 1):
            grid = halved(grid)
        self.stages = nn.ModuleList()
        for i, (doc, embed) in enumerate(zip(arch.stages, embeds, strict=True)):
            stage = Stage(f"stages.{i}", doc, embeds[i - 1] if i else None, embed, grid, arch.form)
            self.stages.append(stage)
            grid = stage.grid
        self.head = Classifier(embeds[-1], Width("classes", arch.num_classes, "fixed"), arch.distilled)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        if self.form == "linear":
            x = x.flatten(2).transpose(1, 2)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor | tuple[Tensor, Tensor] = self.head(x.mean(1) if self.form == "linear" else x.mean((2, 3)))
        return logits


RENAME = (
    (r"^stem\.conv(\d)\.", lambda m: f"stem.{2 * int(m[1]) - 2}."),
    (r"\.attn_downsample\.", ".attn."),
    (r"\.(q|proj)\.ln\.", r".\1."),
    (r"\.mlp\.ln(\d)\.", r".ffn.fc\1."),
    (r"\.attention_biases$", ".bias.table"),
    (r"^head\.(bn|linear)\.", r"head.cls.\1."),
    (r"^head_dist\.", "head.dist."),
    (r"\.bn\.", ".norm."),
)


def _official(arch: LevitArch) -> Rules:
    """facebookresearch/LeViT numbers its attentions, FFNs and downsamplings in one sequence."""
    places = []
    for s, stage in enumerate(arch.stages):
        if stage.downsample:
            places.append((r"\.", f"stages.{s}.downsample.attn."))
            if stage.downsample.ffn:
                places.append((r"\.m\.", f"stages.{s}.downsample.ffn."))
        for i, block in enumerate(stage.blocks):
            places += [(r"\.m\.", f"stages.{s}.blocks.{i}.{part}.") for part, doc in block if doc]
    return (
        *((rf"^blocks\.{number}{end}", place) for number, (end, place) in enumerate(places)),
        (r"^patch_embed\.(\d)\.", r"stem.\1."),
        (r"\.ffn\.0\.", ".ffn.fc1."),
        (r"\.ffn\.2\.", ".ffn.fc2."),
        (r"\.(q|proj)\.1\.", r".\1."),
        (r"\.attention_biases$", ".bias.table"),
        (r"^head\.", "head.cls."),
        (r"^head_dist\.", "head.dist."),
        (r"\.(c|l)\.", ".linear."),
        (r"\.bn\.", ".norm."),
    )


def _count(arch: LevitArch) -> list[Tally]:
    tally, embed = Tally(), arch.stages[0].embed_dim
    grid, found = tally.stem(arch.stem, embed, arch.resolution), []
    for stage in arch.stages:
        if stage.downsample is not None:
            _count_strided(tally, stage.downsample, embed, stage.embed_dim, grid)
            grid = halved(grid)
        embed, tokens = stage.embed_dim, kept(stage.keep_rate, grid * grid)
        for block in stage.blocks:
            if block.attn is not None:
                heads, qk, v = block.attn.heads, block.attn.key_dim, block.attn.value_dim
                tally.conv_norm(embed, heads * (2 * qk + v), tokens)
                tally.conv_norm(heads * v, embed, tokens)
                tally.weights(0, others=heads * grid * grid)
                tally.macs += heads * (qk + v) * tokens * tokens
            tally.feed_forward(block.ffn, embed, tokens)
        found.append(tally)
        tally = Tally()
    found[-1].classifier(embed, arch.num_classes, arch.distilled)
    return found


def _count_strided(tally: Tally, doc: LevitDownsample, inp: int, out: int, grid: int) -> None:
    heads, qk, v = doc.attn.heads, doc.attn.key_dim, doc.attn.value_dim
    tokens, queries = grid * grid, halved(grid) ** 2
    tally.conv_norm(inp, heads * qk, queries)
    tally.conv_norm(inp, heads * (qk + v), tokens)
    tally.conv_norm(heads * v, out, queries)
    tally.weights(0, others=heads * tokens)
    tally.macs += heads * (qk + v) * queries * tokens
    tally.feed_forward(doc.ffn, out, queries)


def _arch(values: Values, num_classes: int) -> LevitArch:
    """Paper section 3: V twice (strided: four times) as wide as K, strided heads = width / key_dim."""
    key_dim = values["qk"]
    stages: list[LevitStage] = []
    for s in (1, 2, 3):
        expansion, share = values[f"mix_s{s}"]
        embed, keep = values[f"width_s{s}"], values[f"keep_s{s}"]
        last = s == 3
        attn = Attn(heads=values[f"heads_s{s}"], key_dim=key_dim, value_dim=2 * key_dim, scale=key_dim**-0.5)
        ffn = Ffn(hidden=int(embed * expansion), keep_rate=1.0 if last else keep)
        downsample = None
        if stages:
            strided = Attn(
                heads=max(1, stages[-1].embed_dim // key_dim),
                key_dim=key_dim,
                value_dim=4 * key_dim,
                scale=key_dim**-0.5,
            )
            downsample = LevitDownsample(attn=strided, ffn=Ffn(hidden=2 * embed, keep_rate=1.0))
        blocks = tuple(
            LevitBlock(attn=attn if has else None, ffn=ffn) for has in with_attention(values[f"depth_s{s}"], share)
        )
        stages.append(
            LevitStage(
                embed_dim=embed,
                downsample=downsample,
                keep_rate=keep if last else 1.0,
                blocks=blocks,
            )
        )
    first = stages[0].embed_dim
    return LevitArch(
        version=1,
        family="levit",
        resolution=values["resolution"],
        num_classes=num_classes,
        form=values["form"],
        distilled=True,
        stem=(first // 8, first // 4, first // 2),
        stages=tuple(stages),
    )


MIX = ((1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0), (2.0, 0.5), (2.0, 0.0))

SPACE = Space(
    options={
        "resolution": (128, 144, 160, 176, 192, 224, 256),
        "form": ("linear", "conv"),
        "qk": (8, 16, 32),
        **per_stage(
            "width",
            (64, 96, 128, 160, 192, 256, 384),
            (96, 128, 192, 256, 288, 384, 512),
            (128, 192, 256, 320, 384, 512, 768),
        ),
        **per_stage("depth", (1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),
        **per_stage("heads", (2, 3, 4, 5, 6, 8), (2, 3, 4, 5, 6, 8, 9), (3, 4, 5, 6, 8, 10, 12)),
        **per_stage("mix", MIX, MIX, MIX),
        **per_stage("keep", KEEPS, KEEPS, KEEPS),
    },
    arch=_arch,
)


def _variant(
    top1: float,
    width: tuple[int, int, int],
    qk: int,
    heads: tuple[int, int, int],
    depth: tuple[int, int, int],
    timm: str,
) -> Variant:
    values = {
        "resolution": 224,
        "form": "linear",
        "qk": qk,
        **per_stage("width", *width),
        **per_stage("heads", *heads),
        **per_stage("depth", *depth),
        **per_stage("mix", *[(2.0, 1.0)] * 3),
        **per_stage("keep", *[1.0] * 3),
    }
    return Variant(values, top1, "LeViT, ICCV 2021, tables 2 and 3 (1000 epochs, distilled)", timm)


register(
    Family(
        name="levit",
        build=Levit,
        count=_count,
        space=SPACE,
        rename=RENAME,
        official=_official,
        as_published=lambda arch: arch.replace(form="linear"),
        variants={
            "levit_128s": _variant(76.6, (128, 256, 384), 16, (4, 6, 8), (2, 3, 4), "levit_128s"),
            "levit_128": _variant(78.6, (128, 256, 384), 16, (4, 8, 12), (4, 4, 4), "levit_128"),
            "levit_192": _variant(80.0, (192, 288, 384), 32, (3, 5, 6), (4, 4, 4), "levit_192"),
            "levit_256": _variant(81.6, (256, 384, 512), 32, (4, 6, 8), (4, 4, 4), "levit_256"),
            "levit_384": _variant(82.6, (384, 512, 768), 32, (6, 9, 12), (4, 4, 4), "levit_384"),
        },
    )
)
