"""Whole networks: what `create_model` returns, their heads, their token schedule, and their form for inference."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from search_spaces.arch import Arch
    from search_spaces.checkpoints import Loaded


class Network(nn.Module):
    """A network of one of the families: (B, 3, R, R) -> (B, classes) logits."""

    arch: Arch
    loaded: Loaded | None = None
    """What became of the weights it was created with; None: it was created without."""
    untrained: list[str]
    """Names of tensors left random."""


class TwoHeads(Protocol):
    """A classifier that can return both of its heads' logits (ours, or that of timm's LeViT)."""

    distilled_training: bool


def _has_two_heads(module: nn.Module) -> TypeGuard[TwoHeads]:
    return hasattr(module, "distilled_training")


def heads_of(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """The logits (B, classes) of each of a network's heads, the class head first; their mean is what it returns.

    One call of `model`, which may be wrapped (DDP, compiled). Of timm's LeViT, training mode only has both.
    """
    heads = [module for module in model.modules() if _has_two_heads(module)]
    for head in heads:
        head.distilled_training = True
    try:
        out = model(images)
    finally:
        for head in heads:
            head.distilled_training = False
    return out if isinstance(out, tuple) else (out,)


class KeepsFewer(Protocol):
    """A network that keeps fewer tokens as its training goes on."""

    keep_progress: float
    """From 0 (all tokens) to 1 (the Arch's keep rates); used in training mode only."""
    training: bool

    def keep_at(self, progress: float) -> None:
        """Set the token counts of every block."""


def _keeps_fewer(module: nn.Module) -> TypeGuard[KeepsFewer]:
    return "keep_progress" in vars(module)  # hasattr would take a compiled wrapper for its network


def set_keep_progress(model: nn.Module, progress: float) -> None:
    """Set how far keep rates have come from 1 (at 0 and below) to the Arch's own (at 1 and above), in training mode.

    Eval mode, folding and export are always at the Arch's rates. Networks without such a schedule have nothing to set.
    Each new token count makes torch.compile compile again: compile after the schedule.
    """
    for module in model.modules():
        if _keeps_fewer(module):
            module.keep_progress = min(max(progress, 0.0), 1.0)
            if module.training:
                module.keep_at(module.keep_progress)


class Folds(Protocol):
    """A layer with a shorter form for inference."""

    def folded(self) -> nn.Module:
        """That form; the layers inside are folded already."""


def _folds(module: nn.Module) -> TypeGuard[Folds]:
    return hasattr(module, "folded")


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of the model for inference, in eval mode: same outputs, nothing left that inference does not need.

    BatchNorm is merged into its neighbour, bias tables are gathered, attention scales are merged into q.
    """
    return _fold(copy.deepcopy(model)).eval().requires_grad_(False)


def _fold(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    return module.folded() if _folds(module) else module
