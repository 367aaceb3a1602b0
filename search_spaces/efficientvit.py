"""EfficientViT (Liu et al., CVPR 2023, Microsoft): sandwiches of FFNs around cascaded group attention.

All tensors are (B, C, H, W). Not MIT's EfficientViT (timm's efficientvit_b*, efficientvit_l*).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
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
    Kernel,
    Scale,
    StageSummary,
    attentions,
    check_downsamples,
    summarise,
)
from search_spaces.attention import AttentionBias, key, scale_rows
from search_spaces.counting import Tally
from search_spaces.gates import Gate
from search_spaces.grid import (
    OFFICIAL,
    ConvMixer,
    Merge,
    Mixer,
    Pyramid,
    count_mixer,
    count_pyramid,
    published_merge,
)
from search_spaces.layers import ConvNorm
from search_spaces.registry import Family, Variant, register
from search_spaces.space import KEEPS, Space, Values, per_stage
from search_spaces.widths import Axis, Cat, Width, boundary


class CascadeHead(Doc):
    """One head: it reads channels `offset` .. `offset + dim`, plus the output of the head before it."""

    offset: Annotated[int, Field(ge=0, le=8192)]
    dim: Dim
    key_dim: Dim
    value_dim: Dim
    kernel: Kernel
    scale: Scale


class Cascade(Doc):
    """Cascaded group attention in windows of `window` x `window`; head j's value width is head j + 1's dim."""

    window: Annotated[int, Field(ge=1, le=64)]
    heads: Annotated[tuple[CascadeHead, ...], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _cascade(self) -> Self:
        for j, (head, following) in enumerate(itertools.pairwise(self.heads)):
            if head.value_dim != following.dim:
                raise ValueError(
                    f"heads.{j}.value_dim is {head.value_dim} but head {j + 1}, which adds it, has dim {following.dim}"
                )
        return self


class EfficientVitBlock(Doc):
    """Mixers, attention, mixers (the paper's sandwich has N = 1 mixer on each side)."""

    before: Annotated[tuple[Mixer, ...], Field(max_length=4)]
    attn: Cascade | None
    after: Annotated[tuple[Mixer, ...], Field(max_length=4)]


class EfficientVitStage(Doc):
    embed_dim: Dim
    downsample: Merge | None
    blocks: Annotated[tuple[EfficientVitBlock, ...], Field(max_length=MAX_BLOCKS)]


class EfficientVitArch(Arch, family="efficientvit"):
    family: Literal["efficientvit"]
    distilled: bool
    stem: tuple[Dim, Dim, Dim]
    stages: Annotated[tuple[EfficientVitStage, ...], Field(min_length=1, max_length=MAX_STAGES)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_downsamples(self.stages)
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.blocks):
                for h, head in enumerate(block.attn.heads if block.attn else ()):
                    if head.offset + head.dim > stage.embed_dim:
                        raise ValueError(
                            f"stages.{i}.blocks.{j}.attn.heads.{h} reads channels {head.offset} to "
                            f"{head.offset + head.dim}, but embed_dim is {stage.embed_dim}"
                        )
        return self

    def _follow(self, raw: dict[str, Any], units: Mapping[str, np.ndarray]) -> None:
        """Heads read what is left of their channels; heads go from the last: each adds the output of the one before."""
        for i, stage in enumerate(raw["stages"]):
            embed = units.get(f"stages.{i}.embed", np.arange(stage["embed_dim"]))
            for j, block in enumerate(stage["blocks"]):
                heads = block["attn"]["heads"] if block["attn"] else []
                for head in heads:
                    start, end = (boundary(embed, unit) for unit in (head["offset"], head["offset"] + head["dim"]))
                    head |= {"offset": start, "dim": end - start}
                for head, following in itertools.pairwise(heads):
                    head["value_dim"] = following["dim"]
                del heads[len(units.get(f"stages.{i}.blocks.{j}.attn.heads", heads)) :]

    def _rescale(self, raw: dict[str, Any]) -> None:
        before, after = (-(-resolution // 16) for resolution in (self.resolution, raw["resolution"]))
        for attn in (block["attn"] for stage in raw["stages"] for block in stage["blocks"] if block["attn"]):
            per_side = -(-before // attn["window"])
            attn["window"] = -(-after // per_side)

    def summary(self) -> list[StageSummary]:
        rows = []
        for stage in self.stages:
            mixers = [m.ffn for b in stage.blocks for m in (*b.before, *b.after) if m.ffn]
            attns = [_mean_head(b.attn) for b in stage.blocks]
            rows.append(
                summarise(
                    stage.embed_dim,
                    attns,
                    [f.hidden for f in mixers],
                    [f.keep_rate for f in mixers],
                )
            )
        return rows


def _mean_head(cascade: Cascade | None) -> Attn | None:
    if cascade is None:
        return None
    heads, n = cascade.heads, len(cascade.heads)
    key_dim, value_dim = sum(h.key_dim for h in heads) // n, sum(h.value_dim for h in heads) // n
    return Attn(heads=n, key_dim=max(1, key_dim), value_dim=max(1, value_dim), scale=heads[0].scale)


class CascadedGroupAttention(nn.Module):
    """x + proj(relu(concat of the heads' outputs)); each head attends within a window.

    A grid no larger than the window is one window; otherwise it is padded at the right and bottom, cut into
    windows that join the batch, and cropped.
    """

    def __init__(self, name: str, doc: Cascade, embed: Width, grid: int) -> None:
        super().__init__()
        self.window = min(doc.window, grid)
        self.grid, self.heads = grid, doc.heads
        self.scales = [head.scale for head in doc.heads]
        self.per_side = -(-grid // self.window)
        tokens = self.window**2
        positions = tokens * self.per_side**2
        self.qkv, self.query = nn.ModuleList(), nn.ModuleList()
        self.q_gates, self.v_gates = nn.ModuleList(), nn.ModuleList()
        heads = Width(f"{name}.heads", len(doc.heads), kind="heads")
        values: list[Width] = []
        products: list[tuple[Axis, int]] = []
        for j, head in enumerate(doc.heads):
            dim = Width(f"{name}.heads.{j}.dim", head.dim, part_of=(embed.name, head.offset))
            qk = Width(f"{name}.heads.{j}.qk", head.key_dim, kind="qk")
            if j + 1 < len(doc.heads):
                read = (embed.name, doc.heads[j + 1].offset)
                values.append(Width(f"{name}.heads.{j + 1}.dim", head.value_dim, part_of=read))
            else:
                values.append(Width(f"{name}.heads.{j}.v", head.value_dim, kind="v"))
            self.qkv.append(ConvNorm(dim, Cat((qk, key(qk), values[-1])), positions))
            kernel = Width(f"{name}.heads.{j}.kernel", head.kernel, "crop")
            query = ConvNorm(qk, qk, positions, kernel=kernel, depthwise=True)
            query.query_scale = head.scale
            self.query.append(query)
            products.append((Cat((qk, values[-1])), positions * tokens))
            self.q_gates.append(Gate(qk, 1))
            self.v_gates.append(Gate(values[-1], 1, heads=(heads, j)))
        self.products = tuple(products)
        self.bias = AttentionBias(name, heads, self.window)
        self.act = nn.ReLU()
        self.proj = ConvNorm(Cat(tuple(values)), embed, positions, gamma=0.0)
        self.branch_gate = Gate(embed, 1, branch=name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch_gate(self._join(self._cascade(self._split(x))))
        return x + y

    def _cascade(self, x: Tensor) -> Tensor:
        bias: Tensor = self.bias()
        outputs: list[Tensor] = []
        for j, head in enumerate(self.heads):
            feature = x[:, head.offset : head.offset + head.dim]
            if outputs:
                feature = feature + outputs[-1]
            q, k, v = self.qkv[j](feature).split((head.key_dim, head.key_dim, head.value_dim), dim=1)
            q, k, v = self.q_gates[j](self.query[j](q)).flatten(2), k.flatten(2), v.flatten(2)
            if self.scales[j] != 1:
                q = q * self.scales[j]
            weights = (q.transpose(-2, -1) @ k + bias[j]).softmax(-1)
            mixed = (v @ weights.transpose(-2, -1)).view(-1, head.value_dim, self.window, self.window)
            outputs.append(self.v_gates[j](mixed))
        joined: Tensor = self.proj(self.act(torch.cat(outputs, 1)))
        return joined

    def _split(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * windows, C, w, w)."""
        if self.per_side == 1:
            return x
        pad, n, w = self.per_side * self.window - self.grid, self.per_side, self.window
        if pad:
            x = F.pad(x, (0, pad, 0, pad))
        windows = x.view(x.shape[0], -1, n, w, n, w).permute(0, 2, 4, 1, 3, 5)
        return windows.reshape(-1, x.shape[1], w, w)

    def _join(self, x: Tensor) -> Tensor:
        if self.per_side == 1:
            return x
        n, w = self.per_side, self.window
        grid = x.view(-1, n, n, x.shape[1], w, w).permute(0, 3, 1, 4, 2, 5).reshape(-1, x.shape[1], n * w, n * w)
        return grid[:, :, : self.grid, : self.grid]

    def folded(self) -> CascadedGroupAttention:
        for conv, scale in zip(self.query, self.scales, strict=True):
            scale_rows(conv, slice(None), scale)
        self.scales = [1.0] * len(self.scales)
        return self


class Block(nn.Module):
    def __init__(self, name: str, doc: EfficientVitBlock, embed: Width, grid: int) -> None:
        super().__init__()
        self.before = nn.Sequential(
            *(ConvMixer(f"{name}.before.{i}", m, embed, grid) for i, m in enumerate(doc.before))
        )
        self.attn = CascadedGroupAttention(f"{name}.attn", doc.attn, embed, grid) if doc.attn else None
        self.after = nn.Sequential(*(ConvMixer(f"{name}.after.{i}", m, embed, grid) for i, m in enumerate(doc.after)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.attn is not None:
            x = self.attn(x)
        y: Tensor = self.after(x)
        return y


def _count_block(tally: Tally, doc: EfficientVitBlock, embed: int, grid: int) -> None:
    for mixer in (*doc.before, *doc.after):
        count_mixer(tally, mixer, embed, grid)
    if doc.attn is None:
        return
    window = min(doc.attn.window, grid)
    tokens = window * window
    positions = tokens * (-(-grid // window)) ** 2
    for head in doc.attn.heads:
        tally.conv_norm(head.dim, 2 * head.key_dim + head.value_dim, positions)
        tally.depthwise_norm(head.key_dim, positions, head.kernel)
        tally.macs += (head.key_dim + head.value_dim) * positions * tokens
    tally.conv_norm(sum(head.value_dim for head in doc.attn.heads), embed, positions)
    tally.weights(0, others=len(doc.attn.heads) * tokens)


RENAME = (
    (r"^patch_embed\.conv(\d)\.", lambda m: f"stem.{2 * int(m[1]) - 2}."),
    (r"\.downsample\.res1\.0\.m\.", ".downsample.before.conv.branch."),
    (r"\.downsample\.res1\.1\.m\.", ".downsample.before.ffn."),
    (r"\.downsample\.res2\.0\.m\.", ".downsample.after.conv.branch."),
    (r"\.downsample\.res2\.1\.m\.", ".downsample.after.ffn."),
    (r"\.patchmerge\.conv1\.", ".expand."),
    (r"\.patchmerge\.conv2\.", ".conv."),
    (r"\.patchmerge\.conv3\.", ".project."),
    (r"\.patchmerge\.se\.", ".se."),
    (r"\.dw0\.m\.", ".before.0.conv.branch."),
    (r"\.ffn0\.m\.", ".before.0.ffn."),
    (r"\.dw1\.m\.", ".after.0.conv.branch."),
    (r"\.ffn1\.m\.", ".after.0.ffn."),
    (r"\.mixer\.m\.attn\.", ".attn."),
    (r"\.pw(\d)\.", r".fc\1."),
    (r"\.attention_biases$", ".bias.table"),
    (r"\.qkvs\.", ".qkv."),
    (r"\.dws\.", ".query."),
    (r"\.proj\.1\.", ".proj."),
    (r"^head\.(bn|linear)\.", r"head.cls.\1."),
    (r"\.bn\.", ".norm."),
    (r"(?<!^head\.cls)\.conv\.(weight|bias)$", r".linear.\1"),
)


def chunks(channels: int, parts: int) -> list[int]:
    """Split channels evenly; where that is impossible, in whole eights, larger ones first."""
    unit = 1 if channels % parts == 0 else next(u for u in (8, 4, 2, 1) if channels % u == 0 and channels // u >= parts)
    units, extra = divmod(channels // unit, parts)
    return [unit * (units + (i < extra)) for i in range(parts)]


def cascade(channels: int, heads: int, key_dim: int, kernels: Sequence[Kernel], window: int) -> Cascade:
    """The paper's attention: channels cut into `heads` chunks, values as wide as the next head's chunk."""
    dims = chunks(channels, heads)
    offsets = [sum(dims[:j]) for j in range(heads)]
    return Cascade(
        window=window,
        heads=tuple(
            CascadeHead(
                offset=offsets[j],
                dim=dims[j],
                key_dim=key_dim,
                value_dim=dims[j + 1] if j + 1 < heads else dims[j],
                kernel=kernels[j],
                scale=key_dim**-0.5,
            )
            for j in range(heads)
        ),
    )


def _arch(values: Values, num_classes: int) -> EfficientVitArch:
    """Paper section 3: windows of half the first grid (7 at 224), N mixers on either side of attention."""
    grid = -(-values["resolution"] // 16)
    window = max(1, -(-grid // 2))
    stages: list[EfficientVitStage] = []
    for s in (1, 2, 3):
        per_side, expansion = values[f"mix_s{s}"]
        embed = values[f"width_s{s}"]
        ffn = Ffn(hidden=int(embed * expansion), keep_rate=values[f"keep_s{s}"])
        mixers = (Mixer(conv=True, ffn=ffn),) * per_side
        attn = cascade(embed, values[f"heads_s{s}"], values["qk"], values["form"], window)
        block = EfficientVitBlock(before=mixers, attn=attn, after=mixers)
        downsample = published_merge(stages[-1].embed_dim, embed) if stages else None
        stages.append(
            EfficientVitStage(embed_dim=embed, downsample=downsample, blocks=(block,) * values[f"depth_s{s}"])
        )
    first = stages[0].embed_dim
    return EfficientVitArch(
        version=1,
        family="efficientvit",
        resolution=values["resolution"],
        num_classes=num_classes,
        distilled=False,
        stem=(first // 8, first // 4, first // 2),
        stages=tuple(stages),
    )


def _hold_all(raw: Any, documents: Sequence[Any]) -> None:
    """Head j is the widest head j of any document; a stage is at least as wide as each of its heads."""
    for i, stage in enumerate(raw["stages"]):
        for _, attn, _ in attentions([raw], i):
            for head, following in itertools.pairwise(attn["heads"]):
                following["dim"] = head["value_dim"] = max(head["value_dim"], following["dim"])
            stage["embed_dim"] = max(stage["embed_dim"], *(head["dim"] for head in attn["heads"]))
            for head in attn["heads"]:
                head["offset"] = min(head["offset"], stage["embed_dim"] - head["dim"])


MIX = ((1, 1.0), (1, 1.5), (1, 2.0), (1, 3.0), (1, 4.0), (2, 2.0), (2, 3.0))

SPACE = Space(
    options={
        "resolution": (128, 144, 160, 176, 192, 224, 256),
        "form": ((3, 3, 3, 3), (5, 5, 5, 5), (7, 5, 3, 3)),
        "qk": (8, 16, 32),
        **per_stage(
            "width",
            (32, 64, 96, 128, 160, 192, 224),
            (96, 128, 144, 192, 240, 256, 288),
            (128, 160, 192, 224, 256, 320, 384),
        ),
        **per_stage("depth", (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),
        **per_stage("heads", (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)),
        **per_stage("mix", MIX, MIX, MIX),
        **per_stage("keep", KEEPS, KEEPS, KEEPS),
    },
    arch=_arch,
)

WIDE: Sequence[Kernel] = (7, 5, 3, 3)
EVEN: Sequence[Kernel] = (5, 5, 5, 5)


def _variant(
    top1: float,
    width: tuple[int, int, int],
    depth: tuple[int, int, int],
    heads: tuple[int, int, int],
    kernels: Sequence[Kernel],
    timm: str,
) -> Variant:
    values = {
        "resolution": 224,
        "form": kernels,
        "qk": 16,
        **per_stage("width", *width),
        **per_stage("heads", *heads),
        **per_stage("depth", *depth),
        **per_stage("mix", *[(1, 2.0)] * 3),
        **per_stage("keep", *[1.0] * 3),
    }
    return Variant(values, top1, "EfficientViT, CVPR 2023, and its repository (300 epochs)", timm)


register(
    Family(
        name="efficientvit",
        build=lambda arch: Pyramid(arch, Block),
        count=lambda arch: count_pyramid(arch, _count_block),
        space=SPACE,
        rename=RENAME,
        official=lambda arch: (*OFFICIAL, *RENAME),
        hold_all=_hold_all,
        variants={
            "efficientvit_m0": _variant(63.2, (64, 128, 192), (1, 2, 3), (4, 4, 4), EVEN, "efficientvit_m0"),
            "efficientvit_m1": _variant(68.4, (128, 144, 192), (1, 2, 3), (2, 3, 3), WIDE, "efficientvit_m1"),
            "efficientvit_m2": _variant(70.8, (128, 192, 224), (1, 2, 3), (4, 3, 2), WIDE, "efficientvit_m2"),
            "efficientvit_m3": _variant(73.4, (128, 240, 320), (1, 2, 3), (4, 3, 4), EVEN, "efficientvit_m3"),
            "efficientvit_m4": _variant(74.3, (128, 256, 384), (1, 2, 3), (4, 4, 4), WIDE, "efficientvit_m4"),
            "efficientvit_m5": _variant(77.1, (192, 288, 384), (1, 3, 4), (3, 3, 4), WIDE, "efficientvit_m5"),
        },
    )
)
