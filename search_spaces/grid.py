"""What EfficientViT and SHViT share: a pyramid of (B, C, H, W) stages, convolution-and-FFN mixers, and patch merging
by an inverted residual with squeeze-excite."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from search_spaces.arch import Dim, Doc, Ffn
from search_spaces.counting import Tally
from search_spaces.gates import Gate
from search_spaces.layers import ONE, Classifier, ConvNorm, FeedForward, Residual, SqueezeExcite, halved, stem
from search_spaces.network import Network
from search_spaces.registry import Rules
from search_spaces.widths import Width, fixed


class Mixer(Doc):
    """A residual 3x3 depthwise convolution, then a residual FFN; either may be absent."""

    conv: bool
    ffn: Ffn | None


class Merge(Doc):
    """Patch merging between stages: a mixer, a stride-2 inverted residual with squeeze-excite, a mixer."""

    before: Mixer
    hidden: Dim
    squeezed: Dim | None
    after: Mixer


class ConvMixer(nn.Module):
    """A `Mixer` on (B, C, H, W)."""

    def __init__(self, name: str, doc: Mixer, embed: Width, grid: int, gamma: float = 0.0) -> None:
        super().__init__()
        tokens = grid * grid
        conv = ConvNorm(embed, embed, tokens, kernel=fixed(3), depthwise=True, gamma=gamma) if doc.conv else None
        self.conv = Residual(conv, Gate(embed, 1, branch=f"{name}.conv")) if conv is not None else None
        self.ffn = FeedForward(f"{name}.ffn", doc.ffn, embed, tokens, nn.ReLU) if doc.ffn else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        return x if self.ffn is None else self.ffn(x)


class PatchMerging(nn.Module):
    """(B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)); built whether or not the width changes."""

    def __init__(self, name: str, doc: Merge, inp: Width, out: Width, grid: int) -> None:
        super().__init__()
        hidden, half = Width(f"{name}.hidden", doc.hidden, kind="ffn"), halved(grid)
        self.before = ConvMixer(f"{name}.before", doc.before, inp, grid, gamma=1.0)
        self.expand = ConvNorm(inp, hidden, grid * grid)
        self.conv = ConvNorm(hidden, hidden, half * half, kernel=fixed(3), stride=2, depthwise=True)
        self.gate, self.entry_gate = Gate(hidden, 1), Gate(out, 1)
        self.se = None
        if doc.squeezed:
            self.se = SqueezeExcite(hidden, Width(f"{name}.squeezed", doc.squeezed, grown="positive", kind="ffn"))
        self.project = ConvNorm(hidden, out, half * half, kernel=ONE)
        self.after = ConvMixer(f"{name}.after", doc.after, out, half, gamma=1.0)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.act(self.conv(self.act(self.expand(self.before(x))))))
        if self.se is not None:
            x = self.se(x)
        y: Tensor = self.after(self.entry_gate(self.project(x)))
        return y


def published_merge(inp: int, out: int) -> Merge:
    """Both papers' subsampling: FFN ratio 2 on either side, expansion 4, squeeze-excite ratio 1/4 (in eights)."""
    squeezed = (inp + 4) // 8 * 8
    return Merge(
        before=Mixer(conv=True, ffn=Ffn(hidden=2 * inp, keep_rate=1.0)),
        hidden=4 * inp,
        squeezed=max(8, squeezed),
        after=Mixer(conv=True, ffn=Ffn(hidden=2 * out, keep_rate=1.0)),
    )


def _place(found: re.Match[str]) -> str:
    """The official code puts a stage's downsampling, in three parts, before its blocks in one sequence."""
    stage, number = int(found[1]) - 1, int(found[2])
    if stage and number < 3:
        return f"stages.{stage}.downsample.{number}."
    return f"stages.{stage}.blocks.{number - 3 if stage else number}."


OFFICIAL: Rules = (
    (r"^patch_embed\.(\d)\.", r"stem.\1."),
    (r"^blocks(\d)\.(\d+)\.", _place),
    (r"\.downsample\.0\.0\.m\.", ".downsample.before.conv.branch."),
    (r"\.downsample\.0\.1\.m\.", ".downsample.before.ffn."),
    (r"\.downsample\.1\.conv1\.", ".downsample.expand."),
    (r"\.downsample\.1\.conv2\.", ".downsample.conv."),
    (r"\.downsample\.1\.conv3\.", ".downsample.project."),
    (r"\.downsample\.1\.se\.", ".downsample.se."),
    (r"\.downsample\.2\.0\.m\.", ".downsample.after.conv.branch."),
    (r"\.downsample\.2\.1\.m\.", ".downsample.after.ffn."),
    (r"^head\.", "head.cls."),
    (r"^head_dist\.", "head.dist."),
    (r"\.(c|l)\.", ".linear."),
)
"""For what the official repositories of both families name alike; a family's own rules follow."""


BlockType = Callable[[str, Any, Width, int], nn.Module]
"""(path, document, the stage's width, side of the grid) -> a block, (B, C, H, W) -> same."""


class PyramidStage(Protocol):
    """A document of a stage."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def downsample(self) -> Merge | None: ...
    @property
    def blocks(self) -> Sequence[Any]: ...


class PyramidArch(Protocol):
    """An Arch that `Pyramid` builds."""

    @property
    def resolution(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def distilled(self) -> bool: ...
    @property
    def stem(self) -> tuple[int, ...]: ...
    @property
    def stages(self) -> Sequence[PyramidStage]: ...


class Stage(nn.Module):
    """Patch merging (but for the first stage), then blocks."""

    def __init__(
        self, name: str, doc: PyramidStage, previous: Width | None, embed: Width, grid: int, block: BlockType
    ) -> None:
        super().__init__()
        self.downsample = None
        if doc.downsample is not None and previous is not None:
            self.downsample = PatchMerging(f"{name}.downsample", doc.downsample, previous, embed, grid)
            grid = halved(grid)
        self.grid = grid
        self.blocks = nn.Sequential(*(block(f"{name}.blocks.{i}", b, embed, grid) for i, b in enumerate(doc.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        y: Tensor = self.blocks(x)
        return y


def count_mixer(tally: Tally, doc: Mixer, embed: int, grid: int) -> None:
    """Add a `ConvMixer`."""
    if doc.conv:
        tally.depthwise_norm(embed, grid * grid)
    tally.feed_forward(doc.ffn, embed, grid * grid)


def _count_merge(tally: Tally, doc: Merge, inp: int, out: int, grid: int) -> None:
    half = halved(grid)
    count_mixer(tally, doc.before, inp, grid)
    tally.conv_norm(inp, doc.hidden, grid * grid)
    tally.depthwise_norm(doc.hidden, half * half)
    if doc.squeezed:
        tally.linear(doc.hidden, doc.squeezed, 1)
        tally.linear(doc.squeezed, doc.hidden, 1)
    tally.conv_norm(doc.hidden, out, half * half)
    count_mixer(tally, doc.after, out, half)


def count_pyramid(arch: PyramidArch, count_block: Callable[[Tally, Any, int, int], None]) -> list[Tally]:
    """Count a `Pyramid`. count_block: (tally, document, the stage's width, side of the grid), adds a block."""
    tally, embed = Tally(), arch.stages[0].embed_dim
    grid, found = tally.stem(arch.stem, embed, arch.resolution), []
    for stage in arch.stages:
        if stage.downsample is not None:
            _count_merge(tally, stage.downsample, embed, stage.embed_dim, grid)
            grid = halved(grid)
        embed = stage.embed_dim
        for block in stage.blocks:
            count_block(tally, block, embed, grid)
        found.append(tally)
        tally = Tally()
    found[-1].classifier(embed, arch.num_classes, arch.distilled)
    return found


class Pyramid(Network):
    """Stem, stages of `block`s, mean over the grid, classifier: (B, 3, R, R) -> (B, classes)."""

    def __init__(self, arch: PyramidArch, block: BlockType) -> None:
        super().__init__()
        embeds = [Width(f"stages.{i}.embed", s.embed_dim, kind="embed") for i, s in enumerate(arch.stages)]
        self.stem = stem(arch.stem, embeds[0], arch.resolution, nn.ReLU)
        grid = arch.resolution
        for _ in range(len(arch.stem) + 1):
            grid = halved(grid)
        self.stages = nn.Sequential()
        for i, (doc, embed) in enumerate(zip(arch.stages, embeds, strict=True)):
            stage = Stage(f"stages.{i}", doc, embeds[i - 1] if i else None, embed, grid, block)
            self.stages.append(stage)
            grid = stage.grid
        self.head = Classifier(embeds[-1], Width("classes", arch.num_classes, "fixed"), arch.distilled)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits: Tensor | tuple[Tensor, Tensor] = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits
