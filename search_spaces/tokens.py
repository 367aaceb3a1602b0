"""Choosing tokens by a score, and working on the chosen ones only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TIE = 2.0**-20
"""Share of a score that each further position costs: 16 of float32's steps below 1. Equal tokens differ by 1 or 2."""


def foremost(scores: Tensor, keep: int) -> Tensor:
    """Positions (B, keep) of the largest of scores (B, N), none negative, largest first; of equal ones the first.

    Equal tokens, as in areas of one colour, have scores that differ in the last bits, by kernel, width and CPU. So a
    score loses the share `TIE` for each position before it; `TIE` is added first, so that no score is zero.
    """
    count = scores.shape[1]
    handicap = torch.arange(1, 1 - TIE * count, -TIE, dtype=torch.float32, device=scores.device)
    return ((scores + TIE) * handicap).topk(keep, dim=1).indices


def strongest(x: Tensor, keep: int) -> Tensor:
    """Positions in (B, N) of the `keep` tokens of largest L2 norm in x (B, N, C), strongest first."""
    return foremost(x.square().sum(-1), keep)


def flat_rows(index: Tensor, tokens: int) -> Tensor:
    """Row numbers in x.flatten(0, 1) of the tokens `index` (B, k) names in x (B, `tokens`, C): shape (B * k)."""
    offset = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * tokens
    return (index + offset).reshape(-1)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: x (B, N, C), index (B, k) -> (B, k, C)."""
    return x.flatten(0, 1).index_select(0, flat_rows(index, x.shape[1])).view(*index.shape, x.shape[-1])


def on_strongest(x: Tensor, keep: int, delta: Callable[[Tensor], Tensor]) -> Tensor:
    """Add delta(kept) to the `keep` strongest tokens of x (B, N, C); the others are unchanged."""
    rows = flat_rows(strongest(x, keep), x.shape[1])
    flat = x.flatten(0, 1)
    chosen = flat.index_select(0, rows)
    updated = chosen + delta(chosen.view(x.shape[0], keep, -1)).flatten(0, 1)
    return flat.index_put((rows,), updated).view_as(x)
