"""Choosing tokens by a score, working on the chosen ones only, and merging those that are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TIE = 2.0**-20
"""Share of a score that each further position costs: 16 of float32's steps below 1. Equal tokens differ by 1 or 2."""


def foremost(scores: Tensor, keep: int) -> Tensor:
    """Positions (B, keep) of the largest of scores (B, N), none negative, largest first; of equal ones the first.

    Equal tokens, as in areas of one colour, have scores that differ in the last bits, by kernel, width and CPU. So a
    score loses the share `TIE` for each position before it; `TIE` is added first, so that no score is zero.
    """
    return _untied(scores).topk(keep, dim=1).indices


def _untied(scores: Tensor) -> Tensor:
    """Scores (..., N) of which equal ones fall with their position."""
    number = int(scores.shape[-1])  # a constant in every graph
    handicap = torch.arange(1, 1 - TIE * number, -TIE, dtype=torch.float32, device=scores.device)
    return (scores + TIE) * handicap


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


@dataclass(frozen=True)
class Match:
    """Which tokens merge into which. Of N tokens the even positions (0, 2, ...) receive, the odd ones may be merged."""

    merged: Tensor
    """(B, r): which of the odd ones are merged."""
    into: Tensor
    """(B, r): into which of the even ones."""
    left: Tensor | None
    """(B, N // 2 - r): which of the odd ones stay, in their order; None: none does."""


def match(keys: Tensor, tokens: int, count: int) -> Match:
    """ToMe's bipartite soft matching (Bolya et al., ICLR 2023, section 3): each odd token is linked to the even token
    whose key has the largest cosine similarity to its own, and the `count` closest pairs merge. Of equals the first.

    keys: (B, `tokens`, D), the class token left out; count is tokens // 2 at most.
    """
    units = F.normalize(keys, dim=2)
    alike = 1 + units[:, 1::2] @ units[:, ::2].transpose(1, 2)
    into = _untied(alike).argmax(2)
    order = foremost(alike.amax(2), tokens // 2)
    merged = order[:, :count]
    left = order[:, count:].sort(1).values if count < tokens // 2 else None
    return Match(merged, into.gather(1, merged), left)


def merge(x: Tensor, sizes: Tensor, found: Match) -> tuple[Tensor, Tensor]:
    """Merge tokens x (B, N, C) that stand for `sizes` (B, N) patches each: the mean weighted by size.

    Returns:
        (B, N - r, C), the odd ones that are left before the even ones, and their sizes (B, N - r).
    """
    odd, even, odd_sizes, even_sizes = x[:, 1::2], x[:, ::2], sizes[:, 1::2], sizes[:, ::2]
    places = torch.arange(even.shape[1], device=x.device)
    weights = (found.into.unsqueeze(1) == places[:, None]).to(x.dtype) * odd_sizes.gather(1, found.merged).unsqueeze(1)
    totals = even_sizes + weights.sum(2)
    means = (even * even_sizes.unsqueeze(2) + weights @ take_tokens(odd, found.merged)) / totals.unsqueeze(2)
    if found.left is None:
        return means, totals
    left, left_sizes = take_tokens(odd, found.left), odd_sizes.gather(1, found.left)
    return torch.cat((left, means), 1), torch.cat((left_sizes, totals), 1)
