"""Structured pruning of timm models outside the families, through torch-pruning's dependency graph.

A probe in a child process (`outside_probe`) comes first; `outside_graph` does the cutting.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from pruning.compensation import refit
from pruning.macs import count_macs
from pruning.outside_graph import (
    CutNetwork,
    OutsideError,
    first_line,
    fresh,
    head_dim,
    plain_attentions,
    set_head_dim,
)
from pruning.outside_probe import run_probe

ACTIVATION = 1 << 28
"""Values of a layer's output for all images that a network is refitted on, which run together: 1 GiB."""
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Criterion:
    """How units are ranked."""

    importance: Callable[[], tp.importance.Importance]
    """Builds torch-pruning's scorer."""
    gradients: bool = False
    """Whether it needs gradients."""
    ranked: bool = False
    """True: cut the units that lose least importance per MAC anywhere. False: cut the same share of every group
    (torch-pruning's default)."""


CRITERIA = {
    "taylor": Criterion(
        lambda: tp.importance.GroupTaylorImportance(normalizer=None, group_reduction="sum"), gradients=True, ranked=True
    ),
    "torch-pruning": Criterion(tp.importance.GroupTaylorImportance, gradients=True),
    "magnitude": Criterion(tp.importance.GroupMagnitudeImportance),
    "random": Criterion(tp.importance.RandomImportance),
}


@dataclass(frozen=True)
class LayerChange:
    """A convolution or linear layer, before and after."""

    name: str
    before: tuple[int, int]
    """Channels (in, out)."""
    after: tuple[int, int]
    """Channels (in, out)."""
    removed: float
    """Share of its weights that was cut, 0 to 1."""


@dataclass(frozen=True)
class OutsideResult:
    """What `prune_outside` did; MACs are of one image (see `count_macs`)."""

    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    minimum_macs: int
    """The fewest that could have been reached."""
    inner_only: str | None
    """None, or why only inner widths were cut (see `outside_probe.Probe`)."""
    layers: tuple[LayerChange, ...]
    """Every convolution and linear layer, cut or not."""
    refitted: int = 0
    """Layers that were refitted after the cuts."""
    refitted_on: int = 0
    """Images that they were refitted on."""


def load_outside(name: str, num_classes: int | None) -> tuple[nn.Module, int]:
    """A timm model with random weights in eval mode, and its input resolution in pixels.

    Args:
        name: as in timm.list_models(), with or without a weights tag ("resnet18", "resnet18.a1_in1k").
        num_classes: None keeps the model's own.

    Raises:
        OutsideError: unknown name or tag, or no classifier.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(f'timm/{n}' for n in near)}?" if near else "timm.list_models() lists them"
        raise OutsideError(f"timm has no model {name!r}: {hint}")
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model = timm.create_model(name, **kwargs)
    except Exception as error:
        raise OutsideError(f"timm could not build {name}: {first_line(error)}") from None
    if not model.num_classes:
        raise OutsideError(f"timm/{name} has no classifier: give the number of classes")
    config: Any = model.pretrained_cfg
    return model.eval(), int(config["input_size"][-1])


def prune_outside(
    model: nn.Module,
    resolution: int,
    loss_batches: Batches,
    target_macs: int,
    criterion: str,
    multiple_of: int,
    rounds: int,
    time_limit_s: float = 60,
    progress: Callable[[int, int, int], None] = lambda *_: None,
    inputs: Tensor | None = None,
) -> OutsideResult:
    """Cut a model of `load_outside`, in place, until it has `target_macs` MACs or fewer.

    Criteria (scores are torch-pruning's own; its Taylor scores never count BatchNorm's parameters):
        "taylor": GroupTaylorImportance(normalizer=None, group_reduction="sum"), |w * dL/dw| of the loss summed over
            the batches, added up over a group's layers and ranked over the whole network by importance per MAC.
        "torch-pruning": GroupTaylorImportance with its defaults (mean over the layers, divided by the group's
            mean) and its pruner's default, the same share of every group.
        "magnitude": GroupMagnitudeImportance with its defaults, "random": RandomImportance (torch's generator);
            both cut the same share of every group.

    Attention keeps its scale: cutting head dims leaves softmax's logits those of the masked network. The scale
    attribute follows the new head dim, as scaled_dot_product_attention has it built in, and q's weights absorb
    the difference, so that fused and unfused attention agree.

    Args:
        model: on one device, every parameter requiring gradients; in eval mode afterwards.
        resolution: side of the input images (B, 3, R, R) in pixels.
        loss_batches: called once a round for (images, labels) batches on the model's device; the loss is cross
            entropy. Not called for criteria without gradients.
        multiple_of: widths become multiples of this and at least this (head dims are counted per head); a width
            already at or below it stays.
        rounds: scores are computed again in each; the MACs to cut are shared evenly among them.
        time_limit_s: for the probe in a child process, interpreter and imports included.
        progress: called after each round with (round, rounds, MACs).
        inputs: images (B, 3, R, R) in random order that the layers are refitted on after all cuts (see
            `pruning.compensation`), so many of them as `ACTIVATION` allows; None: they are not.

    Raises:
        OutsideError: the probe failed or took too long, the target is not below the model's MACs or is below the
            reachable minimum, no batches, or importances that are NaN or all zero.
    """
    chosen = CRITERIA[criterion]
    timm_model: Any = model
    name, classes = timm_model.pretrained_cfg["architecture"], timm_model.num_classes
    images = torch.zeros(1, 3, resolution, resolution, device=next(model.parameters()).device)
    before, params_before, shapes = count_macs(fresh(model), images)[""], _params(model), _shapes(model)
    if target_macs >= before:
        raise OutsideError(f"{target_macs / 1e6:.1f} M MACs are not below timm/{name}'s own {before / 1e6:.1f} M")
    probe = run_probe(name, resolution, classes, multiple_of, time_limit_s)
    if target_macs < probe.minimum_macs:
        raise OutsideError(
            f"timm/{name} cannot be cut to {target_macs / 1e6:.1f} M MACs: the reachable minimum is "
            f"{probe.minimum_macs / 1e6:.1f} M with widths of {multiple_of}"
            + (f" where only inner widths can be cut ({probe.inner_only})" if probe.inner_only else "")
        )
    dense = None if inputs is None else copy.deepcopy(fresh(model))
    if inputs is not None:
        inputs = inputs[: max(1, ACTIVATION // _largest(model, images))]
    network = CutNetwork(model, images, multiple_of, inner=probe.inner_only is not None)
    now, importance = before, chosen.importance()
    for done in range(1, rounds + 1):
        goal = before - (before - target_macs) * done / rounds
        if chosen.gradients and now > goal:
            _gradients(model, loss_batches())
        while now > goal:
            network.cut_towards(goal, importance, chosen.ranked)
            if (after := network.macs()) >= now:
                raise OutsideError(f"torch-pruning cut nothing more from timm/{name} at {now / 1e6:.1f} M MACs")
            now = after
        progress(done, rounds, now)
    model.zero_grad(set_to_none=True)
    refitted, refitted_on = 0, 0
    if dense is not None and inputs is not None:
        refitted, refitted_on = refit(dense, fresh(model), network.sources(), inputs), len(inputs)
    changes = tuple(
        LayerChange(layer, shapes[layer][0], channels, 1 - weights / shapes[layer][1])
        for layer, (channels, weights) in _shapes(model).items()
    )
    return OutsideResult(
        before,
        now,
        params_before,
        _params(model),
        probe.minimum_macs,
        probe.inner_only,
        changes,
        refitted,
        refitted_on,
    )


def resize_outside(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a pruned model's state dict into a fresh model of the same name, resizing its layers; returns the model."""
    for name, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, old in own.items():
                new = state.get(f"{name}.{key}" if name else key)
                if old is None or new is None or old.shape == new.shape:
                    continue
                own[key] = nn.Parameter(torch.empty_like(new)) if isinstance(old, nn.Parameter) else new.clone()
        _follow_weights(module)
    for attention in plain_attentions(model):
        set_head_dim(attention, head_dim(attention))
    model.load_state_dict(state)
    return model


def _follow_weights(module: nn.Module) -> None:
    """Set a layer's sizes to those of its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.in_channels:
            module.groups = len(module.weight)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.affine:
        module.num_channels = len(module.weight)


def _gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gradients of the cross entropy summed over the batches' means."""
    model.zero_grad(set_to_none=True)
    empty = True
    for images, labels in batches:
        torch.autograd.backward(F.cross_entropy(fresh(model)(images), labels))
        empty = False
    if empty:
        raise OutsideError("no images to compute importances from")


def _largest(model: nn.Module, images: Tensor) -> int:
    """Values of the largest output of a layer for one image."""
    sizes: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    handles = [m.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel())) for m in layers]
    try:
        with torch.no_grad():
            fresh(model)(images)
    finally:
        for handle in handles:
            handle.remove()
    return max(sizes) // len(images)


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _shapes(model: nn.Module) -> dict[str, tuple[tuple[int, int], int]]:
    """Layer name -> ((in, out) channels, number of weights)."""
    shapes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[name] = (layer.in_features, layer.out_features), _params(layer)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            shapes[name] = (layer.in_channels, layer.out_channels), _params(layer)
    return shapes
