"""A family in one file: a plain vision transformer of one width, whose FFNs run on the strongest tokens only.

It shows, and a test proves, that nothing outside of this file has to know a family by name. Tokens are (B, N, C).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from search_spaces.arch import MAX_BLOCKS, Arch, Attn, Dim, Doc, Ffn, StageSummary, kept, summarise
from search_spaces.attention import attend, attention_widths, key
from search_spaces.gates import Gate
from search_spaces.layers import RGB, Conv, LayerNorm, Linear, mlp
from search_spaces.network import Network
from search_spaces.registry import Family, Variant, register
from search_spaces.space import KEEPS, Space, Values, per_stage, with_attention
from search_spaces.tokens import on_strongest
from search_spaces.widths import Cat, Each, Width, fixed

PATCH = 8


class ToyBlock(Doc):
    attn: Attn | None
    ffn: Ffn | None


class ToyArch(Arch, family="toy"):
    family: Literal["toy"]
    embed_dim: Dim
    blocks: Annotated[tuple[ToyBlock, ...], Field(min_length=1, max_length=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.resolution % PATCH:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {PATCH}")
        return self

    def summary(self) -> list[StageSummary]:
        ffns = [block.ffn for block in self.blocks if block.ffn]
        attns = [block.attn for block in self.blocks]
        return [summarise(self.embed_dim, attns, [f.hidden for f in ffns], [f.keep_rate for f in ffns])]


class Attention(nn.Module):
    """x + proj(softmax(q k^T * scale) v) of the normalised x."""

    def __init__(self, name: str, doc: Attn, embed: Width, tokens: int) -> None:
        super().__init__()
        heads, qk, v = attention_widths(name, doc)
        self.heads, self.scale = doc.heads, doc.scale
        self.dims = (doc.heads * doc.key_dim, doc.heads * doc.key_dim, doc.heads * doc.value_dim)
        self.norm = LayerNorm(embed, tokens)
        self.qkv = Linear(embed, Cat((Each(heads, qk), Each(heads, key(qk)), Each(heads, v))), tokens)
        self.qkv.query_scale = doc.scale
        self.proj = Linear(Each(heads, v), embed, tokens)
        self.products = ((Each(heads, Cat((qk, v))), tokens * tokens),)
        self.q_gate = Gate(Each(heads, qk), 1, 3)
        self.v_gate = Gate(Each(heads, v), -1, heads=(heads, None))
        self.branch_gate = Gate(embed, -1, branch=name)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).split(self.dims, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = attend(self.q_gate(q), k, v, self.scale).transpose(1, 2).flatten(2)
        return x + self.branch_gate(self.proj(self.v_gate(mixed)))


class Mlp(nn.Module):
    """Residual FFN on the tokens that it keeps."""

    def __init__(self, name: str, doc: Ffn, embed: Width, tokens: int) -> None:
        super().__init__()
        self.keep = kept(doc.keep_rate, tokens)
        self.norm = LayerNorm(embed, self.keep)
        self.layers = mlp(name, doc.hidden, embed, self.keep)

    def forward(self, x: Tensor) -> Tensor:
        return on_strongest(x, self.keep, lambda rows: self.layers(self.norm(rows)))


class Toy(Network):
    """(B, 3, R, R) -> (B, classes)."""

    def __init__(self, arch: ToyArch) -> None:
        super().__init__()
        embed, tokens = Width("embed", arch.embed_dim, kind="embed"), (arch.resolution // PATCH) ** 2
        self.patch_embed = Conv(RGB, embed, fixed(PATCH), tokens, stride=PATCH, padding=0, bias=True)
        self.entry_gate = Gate(embed, -1)
        self.blocks = nn.ModuleList()
        for i, doc in enumerate(arch.blocks):
            block = nn.ModuleDict()
            if doc.attn:
                block["attn"] = Attention(f"blocks.{i}.attn", doc.attn, embed, tokens)
            if doc.ffn:
                block["ffn"] = Mlp(f"blocks.{i}.ffn", doc.ffn, embed, tokens)
            self.blocks.append(block)
        self.norm = LayerNorm(embed, positions=1)
        self.head = Linear(embed, Width("classes", arch.num_classes, "fixed"), positions=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry_gate(self.patch_embed(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            for branch in block.values():
                x = branch(x)
        return self.head(self.norm(x.mean(1)))


def _arch(values: Values, num_classes: int) -> ToyArch:
    embed, dim, (expansion, share) = values["width_s1"], values["qk"], values["mix_s1"]
    attn = Attn(heads=values["heads_s1"], key_dim=dim, value_dim=dim, scale=dim**-0.5)
    ffn = Ffn(hidden=int(embed * expansion), keep_rate=values["keep_s1"])
    blocks = (ToyBlock(attn=attn if has else None, ffn=ffn) for has in with_attention(values["depth_s1"], share))
    return ToyArch(
        version=1,
        family="toy",
        resolution=values["resolution"],
        num_classes=num_classes,
        embed_dim=embed,
        blocks=tuple(blocks),
    )


SPACE = Space(
    options={
        "resolution": (32, 64, 96),
        "qk": (8, 16),
        **per_stage("width", (16, 32, 64)),
        **per_stage("depth", (1, 2, 3)),
        **per_stage("heads", (1, 2, 4)),
        **per_stage("mix", ((2.0, 1.0), (4.0, 1.0), (4.0, 0.5))),
        **per_stage("keep", KEEPS),
    },
    arch=_arch,
)


def _variant(width: int, top1: float) -> Variant:
    values = {
        "resolution": 32,
        "qk": 16,
        **per_stage("width", width),
        **per_stage("depth", 2),
        **per_stage("heads", 2),
        **per_stage("mix", (2.0, 1.0)),
        **per_stage("keep", 1.0),
    }
    return Variant(values, top1, "invented")


register(
    Family(
        name="toy",
        build=Toy,
        space=SPACE,
        variants={"toy_small": _variant(16, 10.0), "toy_medium": _variant(32, 20.0), "toy_large": _variant(64, 29.0)},
    )
)
