"""EViT (Liang et al., ICLR 2022, arXiv 2202.07800): DeiT that drops or fuses the tokens its class token heeds least.

Or it merges those that are most alike (ToMe: Bolya et al., ICLR 2023, arXiv 2210.09461). With every keep rate at 1 it
is DeiT (Touvron et al., ICML 2021), whose weights all forms take. Tokens are (B, N, C), the class token first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from search_spaces.arch import MAX_BLOCKS, Arch, ArchError, Attn, Dim, Doc, Rate, StageSummary, kept, summarise
from search_spaces.attention import attend, attention_widths, key
from search_spaces.counting import Tally
from search_spaces.gates import Gate
from search_spaces.layers import RGB, Axes, Conv, LayerNorm, Linear, mlp
from search_spaces.network import Network
from search_spaces.registry import Family, TokenReduction, Variant, register
from search_spaces.space import KEEPS, Space, Values, per_stage, with_attention
from search_spaces.tokens import foremost, match, merge, take_tokens
from search_spaces.widths import Cat, Each, Width, fixed

LEAST_MERGED = 0.5
"""The lowest keep rate of merging: each token of one half is merged into one of the other at most."""

Guide = Literal["class row", "keys"]
"""What a reduction goes by: the class token's attention to the patches, or how alike their keys are."""


class Mlp(Doc):
    hidden: Dim


class EvitBlock(Doc):
    """Attention, then token reduction, then the MLP on what is left."""

    attn: Attn | None
    keep_rate: Rate
    """Share of patches kept: ceil(keep_rate * patches)."""
    fuse: bool
    """Whether the dropped tokens leave one token behind, their sum weighted by the class token's attention."""
    ffn: Mlp | None
    merge: Annotated[bool, Field(exclude_if=operator.not_)] = False
    """Whether the patches beyond are merged into those most like them, and none is dropped or fused. Documents have it
    where it is true."""


class EvitArch(Arch, family="evit"):
    family: Literal["evit"]
    patch_size: Annotated[int, Field(ge=4, le=64)]
    embed_dim: Dim
    blocks: Annotated[tuple[EvitBlock, ...], Field(min_length=1, max_length=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resolution % self.patch_size:
            raise ValueError(f"resolution {self.resolution} is not a multiple of patch_size {self.patch_size}")
        for i, block in enumerate(self.blocks):
            if block.keep_rate < 1 and block.attn is None:
                raise ValueError(f"blocks.{i}.keep_rate: a block without attention cannot rank tokens")
            if block.merge and block.fuse:
                raise ValueError(f"blocks.{i}: tokens are either merged or fused")
            if block.merge and block.keep_rate < LEAST_MERGED:
                raise ValueError(f"blocks.{i}.keep_rate: merging keeps at least half of the tokens ({LEAST_MERGED})")
        return self

    def summary(self) -> list[StageSummary]:
        """One row per run of blocks up to and including a reduction."""
        rows, run = [], []
        for i, block in enumerate(self.blocks):
            run.append(block)
            if block.keep_rate < 1 or i == len(self.blocks) - 1:
                hidden = [b.ffn.hidden for b in run if b.ffn]
                rows.append(summarise(self.embed_dim, [b.attn for b in run], hidden, [run[-1].keep_rate]))
                run = []
        return rows

    def token_counts(self) -> list[int]:
        """Tokens leaving each block, the class token not counted."""
        counts, tokens = [], (self.resolution // self.patch_size) ** 2
        for block in self.blocks:
            tokens = reduced(tokens, block)
            counts.append(tokens)
        return counts


def reduced(tokens: int, block: EvitBlock) -> int:
    """Patch tokens left by a block that `tokens` enter: ceil(keep_rate * tokens), one more if it fuses."""
    keep = kept(block.keep_rate, tokens)
    return keep if keep == tokens else keep + block.fuse


class Attention(nn.Module):
    """Multi-head self-attention; also returns what the block's reduction goes by."""

    def __init__(self, name: str, doc: Attn, embed: Width, tokens: int) -> None:
        super().__init__()
        heads, qk, v = attention_widths(name, doc)
        self.heads, self.scale = doc.heads, doc.scale
        self.dims = (doc.heads * doc.key_dim, doc.heads * doc.key_dim, doc.heads * doc.value_dim)
        self.qkv = Linear(embed, Cat((Each(heads, qk), Each(heads, key(qk)), Each(heads, v))), tokens)
        self.qkv.query_scale = doc.scale
        self.proj = Linear(Each(heads, v), embed, tokens)
        self.products = ((Each(heads, Cat((qk, v))), tokens * tokens),)
        self.q_gate = Gate(Each(heads, qk), 1, 3)
        self.v_gate = Gate(Each(heads, v), -1, heads=(heads, None))
        self.branch_gate = Gate(embed, -1, branch=name)

    def forward(self, x: Tensor, guide: Guide | None, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> (B, N, C) and, if asked for, means over heads: of the class row, (B, N - 1), or of the patches'
        keys, (B, N - 1, key_dim).

        sizes: how many patches each token stands for, (B, N); it is attended to as so many equal tokens would be.
        """
        parts = self.qkv(x).split(self.dims, dim=2)
        q, k, v = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        q, found = self.q_gate(q), None
        bias = None if sizes is None else sizes.log()[:, None, None]
        if guide == "class row":
            logits = (q @ k.transpose(-2, -1)) * self.scale
            weights = (logits if bias is None else logits + bias).softmax(-1)
            found, mixed = weights[:, :, 0, 1:].mean(1), weights @ v
        else:
            mixed = attend(q, k, v, self.scale, bias)
        if guide == "keys":
            found = k[:, :, 1:].mean(1)
        return self.branch_gate(self.proj(self.v_gate(mixed.transpose(1, 2).flatten(2)))), found


class Block(nn.Module):
    """(B, 1 + patches, C) -> (B, 1 + fewer, C), and the sizes of the tokens as `Attention` takes them."""

    rank: Callable[[int, bool], Tensor] | None
    """(tokens kept, whether the others are fused) -> the tokens (B, kept or all) by falling rank: what ranks them in
    training in place of the block's own class token. `oracle.with_oracle` sets it."""

    def __init__(self, name: str, doc: EvitBlock, embed: Width, patches: int) -> None:
        super().__init__()
        self.keep_rate, self.fuse, self.merge = doc.keep_rate, doc.fuse, doc.merge
        self.patches, self.keep = patches, kept(doc.keep_rate, patches)
        self.rank = None
        self.norm1 = LayerNorm(embed, patches + 1) if doc.attn else None
        self.attn = Attention(f"{name}.attn", doc.attn, embed, patches + 1) if doc.attn else None
        if doc.attn and doc.merge and self.keep < patches:
            even, odd = patches - patches // 2, patches // 2
            _, qk, _ = attention_widths(f"{name}.attn", doc.attn)
            self.products = ((qk, even * odd), (embed, even * (patches - self.keep)))
        left = reduced(patches, doc) + 1
        self.norm2 = LayerNorm(embed, left) if doc.ffn else None
        self.ffn = mlp(f"{name}.ffn", doc.ffn.hidden, embed, left) if doc.ffn else None

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        reduces = self.keep < self.patches
        guide: Guide | None = None if not reduces else "keys" if self.merge else "class row"
        x, found = self.attend(x, guide, sizes)
        if found is not None:
            x, sizes = self._merge(x, found, sizes) if self.merge else self._reduce(x, found, sizes)
        return self.feed(x), sizes

    def attend(self, x: Tensor, guide: Guide | None, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Residual attention, where the block has it: (B, N, C) -> same, and what `Attention` returns beside."""
        if self.attn is None or self.norm1 is None:
            return x, None
        y, found = self.attn(self.norm1(x), guide, sizes)
        return x + y, found

    def feed(self, x: Tensor) -> Tensor:
        """The residual MLP, where the block has one: (B, N, C) -> same."""
        if self.ffn is None or self.norm2 is None:
            return x
        y: Tensor = self.ffn(self.norm2(x))
        return x + y

    def _reduce(self, x: Tensor, scores: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """EViT, section 3.2: keep the class token and the best tokens, by falling score; fuse the rest into one."""
        if self.rank is not None and self.training:
            order = self.rank(self.keep, self.fuse)
        else:
            order = foremost(scores, self.patches if self.fuse else self.keep)
        parts = [x[:, :1], take_tokens(x, order[:, : self.keep] + 1)]
        if self.fuse:
            rest = order[:, self.keep :]
            parts.append(scores.gather(1, rest).unsqueeze(1) @ take_tokens(x, rest + 1))
        if sizes is not None:
            one = sizes[:, :1]
            sizes = torch.cat((one, sizes.gather(1, order[:, : self.keep] + 1), *([one] if self.fuse else [])), 1)
        return torch.cat(parts, 1), sizes

    def _merge(self, x: Tensor, keys: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """ToMe, section 3: the class token stays, patches are merged until `keep` are left."""
        sizes = x.new_ones(x.shape[:2]) if sizes is None else sizes
        patches, counts = merge(x[:, 1:], sizes[:, 1:], match(keys, self.patches, self.patches - self.keep))
        return torch.cat((x[:, :1], patches), 1), torch.cat((sizes[:, :1], counts), 1)


class Blocks(nn.Sequential):
    """(B, 1 + patches, C) -> (B, 1 + fewer, C)."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = None
        for block in self:
            x, sizes = block(x, sizes)
        return x


class Evit(Network):
    """(B, 3, R, R) -> (B, classes).

    In eval mode tokens are kept at the Arch's rates, in training as far towards them as `keep_progress` says
    (published: (epoch - 10) / 100, set in each iteration).
    """

    keep_progress: float
    """From 0 (all tokens) to 1 (the Arch's keep rates)."""

    def __init__(self, arch: EvitArch) -> None:
        super().__init__()
        embed = Width("embed", arch.embed_dim, kind="embed")
        side = arch.resolution // arch.patch_size
        self.patches = tokens = side * side
        self.keep_progress = 1.0
        patch = fixed(arch.patch_size)
        self.patch_embed = Conv(RGB, embed, patch, tokens, stride=arch.patch_size, padding=0, bias=True)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, arch.embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        one = fixed(1)
        self.axes: Axes = {
            "cls_token": (one, one, embed),
            "pos_embed": (one, Width("positions", tokens + 1, "resize"), embed),
        }
        self.entry_gate = Gate(embed, -1)
        self.blocks = Blocks()
        for i, doc in enumerate(arch.blocks):
            self.blocks.append(Block(f"blocks.{i}", doc, embed, tokens))
            tokens = reduced(tokens, doc)
        self.norm = LayerNorm(embed, positions=1)
        self.head = Linear(embed, Width("classes", arch.num_classes, "fixed"), positions=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(x))[:, 0]))
        return logits

    def each_block(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, 1 + patches, C), what enters the first block."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        y = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        entered: Tensor = self.entry_gate(y)
        return entered

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.keep_at(self.keep_progress if mode else 1.0)
        return self

    def keep_at(self, progress: float) -> None:
        """Token counts of every block, its rate at `progress` between 1 and its own, by half a cosine."""
        tokens, share = self.patches, (1 + math.cos(math.pi * progress)) / 2
        for block in self.each_block():
            block.patches, block.keep = tokens, kept(block.keep_rate + (1 - block.keep_rate) * share, tokens)
            tokens = block.keep + (block.fuse and block.keep < tokens)


def _count(arch: EvitArch) -> list[Tally]:
    """One row per run of blocks, as `EvitArch.summary`."""
    embed, tokens, tally = arch.embed_dim, (arch.resolution // arch.patch_size) ** 2, Tally()
    tally.weights(3 * arch.patch_size**2 * embed, tokens, embed * (tokens + 3))
    found = [tally]
    for i, doc in enumerate(arch.blocks):
        keep, left = kept(doc.keep_rate, tokens), reduced(tokens, doc)
        if doc.attn is not None:
            heads, qk, v = doc.attn.heads, doc.attn.key_dim, doc.attn.value_dim
            tally.norm_linear(embed, heads * (2 * qk + v), tokens + 1)
            tally.linear(heads * v, embed, tokens + 1)
            tally.macs += heads * (qk + v) * (tokens + 1) ** 2
            if doc.merge and keep < tokens:
                even, odd = tokens - tokens // 2, tokens // 2
                tally.macs += qk * even * odd + embed * even * (tokens - keep)
        if doc.ffn is not None:
            tally.norm_mlp(doc.ffn.hidden, embed, left + 1)
        tokens = left
        if doc.keep_rate < 1 and i < len(arch.blocks) - 1:
            tally = Tally()
            found.append(tally)
    tally.norm_linear(embed, arch.num_classes, 1)
    return found


RENAME = ((r"^patch_embed\.proj\.", "patch_embed."), (r"\.mlp\.", ".ffn."))


def _arch(values: Values, num_classes: int) -> EvitArch:
    """Four runs of blocks; the first three end in a reduction (after layers 3, 6 and 9 as published)."""
    dim = values["qk"]
    blocks: list[EvitBlock] = []
    for s in (1, 2, 3, 4):
        expansion, share = values[f"mix_s{s}"]
        depth = values[f"depth_s{s}"]
        attn = Attn(heads=values[f"heads_s{s}"], key_dim=dim, value_dim=dim, scale=dim**-0.5)
        ffn = Mlp(hidden=int(values["width_s1"] * expansion))
        for i, has in enumerate(with_attention(depth, share)):
            rate, form = values[f"keep_s{s}"] if s < 4 and i == depth - 1 else 1.0, values["form"]
            fuse, merge = (rate < 1 and form == way for way in ("fused", "merged"))
            rate = max(rate, LEAST_MERGED) if merge else rate
            blocks.append(EvitBlock(attn=attn if has else None, keep_rate=rate, fuse=fuse, ffn=ffn, merge=merge))
    return EvitArch(
        version=1,
        family="evit",
        resolution=values["resolution"],
        num_classes=num_classes,
        patch_size=16,
        embed_dim=values["width_s1"],
        blocks=tuple(blocks),
    )


MIX = ((2.0, 1.0), (3.0, 1.0), (3.5, 1.0), (4.0, 1.0), (3.0, 0.5), (4.0, 0.5), (4.0, 0.34))
HEADS = (2, 3, 4, 5, 6, 8, 12)

SPACE = Space(
    options={
        "resolution": (128, 160, 192, 224, 256, 288, 304),
        "form": ("merged", "fused", "dropped"),
        "qk": (32, 64),
        "width_s1": (128, 192, 256, 320, 384, 576, 768),
        **per_stage("depth", (1, 2, 3, 4, 5), (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3)),
        **per_stage("heads", HEADS, HEADS, HEADS, HEADS),
        **per_stage("mix", MIX, MIX, MIX, MIX),
        **per_stage("keep", KEEPS, KEEPS, KEEPS),
    },
    arch=_arch,
)


def _variant(
    width: int,
    heads: int,
    keep: float,
    form: str,
    top1: float | None,
    source: str,
    timm: str | None,
    reduced: bool,
) -> Variant:
    values = {
        "resolution": 224,
        "form": form,
        "qk": 64,
        "width_s1": width,
        **per_stage("depth", 4, 3, 3, 2),
        **per_stage("heads", *[heads] * 4),
        **per_stage("mix", *[(4.0, 1.0)] * 4),
        **per_stage("keep", *[keep] * 3),
    }
    return Variant(values, top1, source, timm, reduced)


SIZES = {"tiny": (192, 3, 72.2), "small": (384, 6, 79.8), "base": (768, 12, 81.8)}
KEPT = (90, 80, 70, 60, 50)
"""Published keep rates, in percent."""
REDUCED_TOP1 = {
    ("small", "fused"): {90: 79.8, 80: 79.8, 70: 79.5, 60: 78.9, 50: 78.5},
    ("small", "dropped"): {90: 79.9, 80: 79.7, 70: 79.4, 60: 79.1, 50: 78.4},
    ("base", "fused"): {70: 81.3},
}


def _variants() -> dict[str, Variant]:
    found = {
        f"deit_{size}": _variant(
            width,
            heads,
            1.0,
            "fused",
            top1,
            "DeiT, ICML 2021 (300 epochs)",
            f"deit_{size}_patch16_224",
            reduced=False,
        )
        for size, (width, heads, top1) in SIZES.items()
    }
    for size, (width, heads, _) in SIZES.items():
        for form, suffix in (("fused", ""), ("dropped", "_drop")):
            for keep in KEPT:
                top1 = REDUCED_TOP1.get((size, form), {}).get(keep)
                source = "EViT, ICLR 2022" + ("" if top1 else " (no top-1 found for this row)")
                found[f"evit_{size}_keep{keep}{suffix}"] = _variant(
                    width, heads, keep / 100, form, top1, source, None, reduced=True
                )
    return found


def _whole(arch: EvitArch) -> EvitArch:
    blocks = tuple(block.model_copy(update={"keep_rate": 1.0, "fuse": False, "merge": False}) for block in arch.blocks)
    return arch.model_copy(update={"blocks": blocks})


def _published_reductions(arch: EvitArch) -> list[str]:
    """DeiT-S and its reductions, the only size that is published both ways at several keep rates.

    Nothing is published for merging in three blocks: it counts as fusing.
    """
    suffix = "" if any(block.fuse or block.merge for block in arch.blocks) else "_drop"
    return ["deit_small", *(f"evit_small_keep{keep}{suffix}" for keep in KEPT)]


def _hold_all(raw: Any, documents: Sequence[Any]) -> None:
    if len({document["patch_size"] for document in documents}) != 1:
        raise ArchError("they do not have patches of one size")


register(
    Family(
        name="evit",
        build=Evit,
        count=_count,
        space=SPACE,
        earlier=replace(SPACE, options={**SPACE.options, "form": ("fused", "dropped")}),
        rename=RENAME,
        variants=_variants(),
        reduction=TokenReduction(_whole, _published_reductions),
        tokens=("cls_token", "pos_embed"),
        hold_all=_hold_all,
    )
)
