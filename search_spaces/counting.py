"""Parameters and multiply-accumulates from the document alone: what the width table of the built network has, for a
search that looks at thousands of Archs. A test holds the two to each other, for every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search_spaces.arch import Ffn, kept

NORM_MACS = 5
"""Multiply-accumulates per element of a norm that cannot fold away (fvcore's count, in the published figures)."""


@dataclass
class Tally:
    """Of a network, or of a part of it, as its layers are added; see `layers` for each layer."""

    params: int = 0
    """Trainable parameters."""
    macs: int = 0
    """Multiply-accumulates per image, by the rules of `widths.Table.macs`."""

    def weights(self, number: int, positions: int = 0, others: int = 0) -> None:
        """`number` weights that multiply at `positions` positions, and `others` that multiply at none."""
        self.params += number + others
        self.macs += number * positions

    def linear(self, inp: int, out: int, positions: int) -> None:
        """A projection with bias."""
        self.weights(inp * out, positions, out)

    def conv_norm(self, inp: int, out: int, positions: int, kernel: int = 1) -> None:
        """A projection or convolution without bias, then BatchNorm."""
        self.weights(inp * out * kernel * kernel, positions, 2 * out)

    def depthwise_norm(self, channels: int, positions: int, kernel: int = 3) -> None:
        """A depthwise convolution without bias, then BatchNorm."""
        self.conv_norm(1, channels, positions, kernel)

    def norm(self, width: int, positions: int) -> None:
        """LayerNorm or GroupNorm."""
        self.weights(width, NORM_MACS * positions, width)

    def feed_forward(self, doc: Ffn | None, embed: int, tokens: int) -> None:
        """`layers.FeedForward`, where there is one."""
        if doc is not None:
            keep = kept(doc.keep_rate, tokens)
            self.conv_norm(embed, doc.hidden, keep)
            self.conv_norm(doc.hidden, embed, keep)

    def norm_linear(self, inp: int, out: int, positions: int) -> None:
        """LayerNorm, then a projection with bias."""
        self.norm(inp, positions)
        self.linear(inp, out, positions)

    def norm_mlp(self, hidden: int, embed: int, positions: int) -> None:
        """LayerNorm, then `layers.mlp`."""
        self.norm_linear(embed, hidden, positions)
        self.linear(hidden, embed, positions)

    def stem(self, hidden: Sequence[int], embed: int, resolution: int) -> int:
        """`layers.stem`; returns the side of its grid."""
        inp, grid = 3, resolution
        for out in (*hidden, embed):
            grid = -(-grid // 2)
            self.conv_norm(inp, out, grid * grid, kernel=3)
            inp = out
        return grid

    def classifier(self, embed: int, classes: int, distilled: bool) -> None:
        """`layers.Classifier`."""
        for _ in range(1 + distilled):
            self.weights(embed * classes, 1, classes + 2 * embed)


def total(tallies: Sequence[Tally]) -> Tally:
    """The sum of the parts of a network."""
    return Tally(sum(each.params for each in tallies), sum(each.macs for each in tallies))
