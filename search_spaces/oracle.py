"""EViT's oracle (Liang et al., ICLR 2022): a trained network of the same depth chooses the tokens that another keeps
while it trains, and lends it its weights to begin with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from search_spaces.arch import ArchError
from search_spaces.evit import Evit
from search_spaces.tokens import foremost


@contextmanager
def with_oracle(model: nn.Module, oracle: nn.Module) -> Iterator[None]:
    """While it lasts, training forwards of `model` rank tokens at each reduction by the class attention of `oracle`.

    The oracle (DeiT or EViT, all tokens kept, in eval mode, without gradients) sees each batch first. A fused token
    ranks by the sum of what the oracle gives the patches in it, and is weighted by the network's own attention. In
    eval mode the network ranks for itself. It can last a training or a step; copy the network (EMA) outside it, for a
    copy made inside holds the oracle.

    Raises:
        ArchError: one of the two is no EViT, the network merges tokens, they differ in depth, patches or resolution, or
            a block of the oracle whose attention is needed has none.
    """
    student, chooser = _evit(model, "the network"), _evit(oracle, "the oracle")
    chooser.eval()
    _check(student, chooser)
    rows: dict[int, Tensor] = {}

    def look(_student: nn.Module, inputs: tuple[Tensor]) -> None:
        reducing = [i for i, block in enumerate(student.each_block()) if block.keep < block.patches]
        if student.training and reducing:
            rows.clear()
            rows.update(class_attention(chooser, inputs[0], reducing))

    handle = student.register_forward_pre_hook(look)
    for i, block in enumerate(student.each_block()):
        block.rank = partial(_rank, rows, i)
    try:
        yield
    finally:
        handle.remove()
        for block in student.each_block():
            block.rank = None


def start_from(model: nn.Module, oracle: nn.Module) -> list[str]:
    """Copy the oracle's tensors into `model` where names and shapes agree; returns the names of those left as they
    were."""
    student, weights = _evit(model, "the network"), _evit(oracle, "the oracle").state_dict()
    own = student.state_dict()
    shared = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    student.load_state_dict(own | shared)
    return [name for name in own if name not in shared]


@torch.no_grad()
def class_attention(network: Evit, images: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """The class token's attention (B, patches) to every patch, mean over heads, in some blocks; no token is dropped."""
    x, rows = network.tokens(images), {}
    for i, block in enumerate(network.each_block()[: max(layers) + 1]):
        x, scores = block.attend(x, "class row" if i in layers else None)
        if scores is not None:
            rows[i] = scores
        x = block.feed(x)
    return rows


def _rank(rows: dict[int, Tensor], layer: int, keep: int, fuse: bool) -> Tensor:
    """Tokens by falling attention in `layer`, all if the rest are fused, else `keep`; the rows of later layers then
    follow the tokens."""
    row = rows.pop(layer)
    order = foremost(row, row.shape[1] if fuse else keep)
    for later, row in rows.items():
        sorted_row = row.gather(1, order)
        rest = [sorted_row[:, keep:].sum(1, keepdim=True)] if fuse else []
        rows[later] = torch.cat((sorted_row[:, :keep], *rest), 1)
    return order


def _evit(model: nn.Module, what: str) -> Evit:
    """The EViT in a model that may be wrapped (DDP, compiled)."""
    found = next((module for module in model.modules() if isinstance(module, Evit)), None)
    if found is None:
        raise ArchError(f"{what} is no EViT or DeiT: only they rank tokens by a class token")
    return found


def _check(student: Evit, oracle: Evit) -> None:
    if len(student.blocks) != len(oracle.blocks):
        raise ArchError(f"the oracle has {len(oracle.blocks)} blocks, the network {len(student.blocks)}")
    if (student.patches, student.patch_embed.kernel_size) != (oracle.patches, oracle.patch_embed.kernel_size):
        raise ArchError("the oracle's resolution or patches are not the network's")
    for i, (block, theirs) in enumerate(zip(student.each_block(), oracle.each_block(), strict=True)):
        if block.merge and block.keep_rate < 1:
            raise ArchError(f"blocks.{i} of the network merges the tokens that are alike: an oracle ranks none for it")
        if block.keep_rate < 1 and theirs.attn is None:
            raise ArchError(f"blocks.{i} of the oracle has no attention to rank tokens by")
