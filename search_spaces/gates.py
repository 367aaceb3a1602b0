"""Gates: where units and residual branches can be silenced or weighed. They are the identity until a mask is set."""

from __future__ import annotations

import re

from torch import Tensor, nn

from search_spaces.widths import Axis, Each, Width


class Gate(nn.Module):
    """Multiply the units of `axis` by a mask, if one is set."""

    axis: Axis
    dims: tuple[int, ...]
    """Dimensions that the units lie along: one, or two for the heads and the units of an `Each`."""
    branch: str | None
    """Path of the residual branch whose output this is; its first dimension is that of the images."""
    heads: tuple[Width, int | None] | None
    """The heads that fall silent with all their units here, and which one it is where each head has its own gate."""
    mask: Tensor | None
    """(B or 1, *units); where windows have joined the batch, those of an image follow one another."""
    drop_path: float
    """Chance, in training, that an image goes without the branch."""

    def __init__(
        self, axis: Axis, *dims: int, branch: str | None = None, heads: tuple[Width, int | None] | None = None
    ) -> None:
        super().__init__()
        self.axis, self.dims, self.branch, self.heads = axis, dims, branch, heads
        self.mask = None
        self.drop_path = 0.0

    @property
    def units(self) -> tuple[int, ...]:
        """Shape of one image's mask."""
        return (self.axis.outer.size, self.axis.inner.size) if isinstance(self.axis, Each) else (self.axis.size,)

    @property
    def width(self) -> Width:
        """The width whose units, or units within each head, the mask has.

        Raises:
            TypeError: units of several widths.
        """
        width = self.axis.inner if isinstance(self.axis, Each) else self.axis
        if not isinstance(width, Width):
            raise TypeError(f"a gate on {width} is on several widths")
        return width

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_path and self.training:
            keep = 1 - self.drop_path
            x = x * x.new_empty((len(x), *[1] * (x.ndim - 1))).bernoulli_(keep).div_(keep)
        if self.mask is None:
            return x
        shape = [1] * x.ndim
        for dim in self.dims:
            shape[dim] = x.shape[dim]
        mask = self.mask.reshape(len(self.mask), *shape[1:])
        return x * (mask if len(mask) == 1 else mask.repeat_interleave(len(x) // len(mask), 0))

    def folded(self) -> nn.Identity:
        return nn.Identity()


def gates_of(model: nn.Module) -> dict[str, Gate]:
    """A network's gates by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Set stochastic depth (Huang et al., ECCV 2016) at the residual branches, in training mode; 0 turns it off.

    As in DeiT and Swin, the chance to drop rises evenly from 0 at the first block to `rate` at the last, is the same
    for a block's branches, and what is kept is scaled by 1 / (1 - chance). A downsampling counts as a block. Each
    image draws for itself from torch's generator.

    Raises:
        ValueError: a rate outside 0 <= rate < 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop path {rate} is not at least 0 and below 1")
    blocks = {gate: _block_of(gate.branch) for gate in gates_of(model).values() if gate.branch is not None}
    order = list(dict.fromkeys(blocks.values()))
    for gate, block in blocks.items():
        gate.drop_path = rate * order.index(block) / max(1, len(order) - 1)


def _block_of(branch: str) -> str:
    found = re.match(r"(stages\.\d+\.)?(blocks\.\d+|downsample)", branch)
    if found is None:
        raise ValueError(f"the branch {branch} is in no block")
    return found[0]
