"""How much each unit of a network matters.

Taylor importance follows Molchanov et al. (CVPR 2019, arXiv 1906.10771): with a gate m = 1 on a unit's activations, the
loss changes by -dL/dm, to first order, when the unit goes. Gates of shape (B, units) give every sample's own gradient
in one backward pass. They sit behind BatchNorm, so its shift counts; a stage's width has gates on all that write to it,
which are summed with their sign, per sample, before the magnitude is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.units import Anatomy, Scores
from search_spaces.gates import Gate, gates_of
from search_spaces.widths import Axis, Entry, Width, places, widths_of

if TYPE_CHECKING:
    from torch_pruning.dependency import Group

Batches = Iterable[tuple[Tensor, Tensor]]
Criterion = Callable[[nn.Module, Anatomy, Batches, int], dict[str, np.ndarray]]
CRITERIA: dict[str, Criterion] = {}


class ImportanceError(ValueError):
    """Scores that cannot rank units, in one line."""


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Enter a function (model, its anatomy, (images, labels) batches, seed) -> scores under its name."""

    def enter(function: Criterion) -> Criterion:
        CRITERIA[name] = function
        return function

    return enter


def score(model: nn.Module, parts: Anatomy, batches: Batches, name: str, seed: int = 0) -> Scores:
    """Importance of every unit and residual branch by the criterion `name`, the model in eval mode.

    Raises:
        ImportanceError: scores that are not finite, or a residual branch that scores zero.
    """
    was_training = model.training
    model.eval()
    try:
        scores = CRITERIA[name](model, parts, batches, seed)
    finally:
        model.train(was_training)
    for width, values in scores.items():
        if not np.isfinite(values).all():
            raise ImportanceError(f"the importance of {width} is not finite: the loss or the weights overflow")
    branches = [gate.branch for gate in parts.gates.values() if gate.branch in scores]
    silent = [branch for branch in branches if not scores[branch].any()]
    if silent:
        raise ImportanceError(
            f"{silent[0]} has no effect on the loss ({len(silent)} of {len(branches)} residual branches): an untrained "
            "network, whose branches begin with a zero BatchNorm weight? Train it first"
        )
    return scores


@criterion("taylor")
def taylor(model: nn.Module, parts: Anatomy, batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """Mean over samples of |dL/dm|: predicts the mean absolute change of a sample's loss."""
    return _over_samples(model, batches, Tensor.abs)


@criterion("taylor2")
def taylor2(model: nn.Module, parts: Anatomy, batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """Mean over samples of (dL/dm)^2 (Molchanov et al., equation 8, on gates)."""
    return _over_samples(model, batches, Tensor.square)


@criterion("features")
def features(model: nn.Module, parts: Anatomy, batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """How much the classifier's inputs change when a unit goes, to first order and without labels: the mean over
    samples of |v . df/dm|, where v has random signs: on average 0.7 to 1 times the length of df/dm."""
    generator = torch.Generator().manual_seed(seed)

    def signed(images: Tensor, _: Tensor) -> Tensor:
        _, found = read(images)
        signs = torch.randint(2, found.shape, generator=generator).to(found) * 2 - 1
        return (found * signs).sum()

    with features_of(model, parts) as read:
        return _over_samples(model, batches, Tensor.abs, signed)


@contextmanager
def features_of(model: nn.Module, parts: Anatomy) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """A function that runs the model, and gives its logits and the inputs of its classifiers: (B, 3, R, R) ->
    (B, classes), (B, features)."""
    paths = [e.name.rpartition(".")[0] for e in parts.table.entries if e.trainable and _is_classifier(e)]
    kept: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[path] = inputs[0]

    def read(images: Tensor) -> tuple[Tensor, Tensor]:
        kept.clear()
        logits = model(images)
        return logits, torch.cat(list(kept.values()), 1)

    handles = [model.get_submodule(path).register_forward_pre_hook(partial(keep, path)) for path in paths]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _is_classifier(entry: Entry) -> bool:
    return len(entry.axes) == 2 and isinstance(entry.axes[0], Width) and entry.axes[0].name == "classes"


@criterion("magnitude")
def magnitude(model: nn.Module, parts: Anatomy, batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """L2 norm of all weights a unit indexes (biases and norms apart), or that a branch holds."""
    return {name: np.sqrt(total) for name, total in _over_weights(model, parts, Tensor.square).items()}


@criterion("random")
def random(model: nn.Module, parts: Anatomy, batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """Uniform random scores: the control."""
    source = np.random.default_rng(seed)
    return {width: source.random(shape) for width, shape in _shapes(parts).items()}


@criterion("torch-pruning")
def torch_pruning(model: nn.Module, parts: Anatomy, batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """torch-pruning's GroupTaylorImportance with its defaults, on groups made from our width table.

    Its default divides by each group's mean, so units of different groups are not comparable, and it does not count
    BatchNorm. It knows no residual branches and no cascades: those and their heads score the sum of |w dL/dw| over
    their weights, over the mean such branch or head.
    """
    from torch_pruning.pruner.importance import GroupTaylorImportance

    _accumulate_gradients(model, batches)
    scorer, scores = GroupTaylorImportance(normalizer=None), {}
    effect = _over_weights(model, parts, _taylor_of_weight)
    apart = {knob.width for knob in parts.knobs if knob.kind == "blocks" or knob.from_last}
    for width, shape in _shapes(parts).items():
        if width in apart:
            scores[width] = effect[width]
        else:
            group = _group(model, parts, width, shape)
            scores[width] = scorer(group)[: int(np.prod(shape))].cpu().numpy().astype(np.float64).reshape(shape)
    model.zero_grad(set_to_none=True)
    branches = [scores[knob.width] for knob in parts.knobs if knob.kind == "blocks"]
    return {
        width: values / ((np.mean(branches) if values.ndim == 0 else values.mean()) or 1.0)
        for width, values in scores.items()
    }


def _taylor_of_weight(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs()


def gate_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, total: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """dL/dm of every unit for each sample: width name -> (B, units) or (B, heads, units), branch path -> (B).

    The model is in eval mode, so that samples do not meet in BatchNorm.

    Args:
        total: (images, labels) -> L summed over the samples, by one forward pass; None: their cross-entropy.
    """
    gates = gates_of(model)
    masks = []
    for gate in gates.values():
        mask = torch.ones(len(images), *gate.units, device=images.device, dtype=images.dtype, requires_grad=True)
        gate.mask = mask
        masks.append(mask)
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        loss = F.cross_entropy(model(images), labels, reduction="sum") if total is None else total(images, labels)
        gradients = torch.autograd.grad(loss, masks)
    finally:
        for gate in gates.values():
            gate.mask = None
        for parameter in trainable:
            parameter.requires_grad_(True)
    sizes = {gate.axis.name: gate.axis.size for gate in gates.values() if isinstance(gate.axis, Width)}
    found: dict[str, Tensor] = {}
    for gate, gradient in zip(gates.values(), gradients, strict=True):
        for name, value in _shares(gate, gradient, sizes):
            found[name] = found[name] + value if name in found else value
    return found


def _shares(gate: Gate, gradient: Tensor, sizes: Mapping[str, int]) -> Iterable[tuple[str, Tensor]]:
    """What a gate's gradient (B, *units) says of widths of these `sizes`, of heads and of its branch."""
    width = gate.width
    if width.part_of is None:
        yield width.name, gradient
    else:
        whole, start = width.part_of
        yield whole, F.pad(gradient, (start, sizes[whole] - start - width.size))
    if gate.heads is not None:
        heads, which = gate.heads
        each = gradient.sum(-1)
        yield heads.name, each if which is None else F.pad(each[:, None], (which, heads.size - which - 1))
    if gate.branch is not None:
        yield gate.branch, gradient.sum(-1)


def _over_samples(
    model: nn.Module,
    batches: Batches,
    magnitude: Callable[[Tensor], Tensor],
    total: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, np.ndarray]:
    totals: dict[str, Tensor] = {}
    count = 0
    for images, labels in batches:
        for name, values in gate_gradients(model, images, labels, total).items():
            share = magnitude(values.double()).sum(0)
            totals[name] = totals[name] + share if name in totals else share
        count += len(images)
    return {name: (total / count).cpu().numpy() for name, total in totals.items()}


def _shapes(parts: Anatomy) -> dict[str, tuple[int, ...]]:
    """Shape of each width's scores; () for a residual branch."""
    sizes = parts.sizes
    shapes: dict[str, tuple[int, ...]] = {}
    for knob in parts.knobs:
        if knob.kind == "blocks":
            shapes[knob.width] = ()
        else:
            shapes[knob.width] = (knob.rows, sizes[knob.width]) if knob.rows > 1 else (sizes[knob.width],)
    return shapes


def _over_weights(model: nn.Module, parts: Anatomy, effect: Callable[[Tensor], Tensor]) -> dict[str, np.ndarray]:
    """Sum of an effect over the weights that each unit indexes, and that each branch or head of a cascade holds."""
    weights = dict(model.named_parameters())
    sums = {width: np.zeros(shape) for width, shape in _shapes(parts).items()}
    branches = [knob.width for knob in parts.knobs if knob.kind == "blocks"]
    for entry in parts.table.entries:
        if not entry.trainable or len(entry.axes) < 2:
            continue
        effects = effect(weights[entry.name]).detach().double().cpu()
        for branch in branches:
            if entry.name.startswith(f"{branch}."):
                sums[branch] += effects.sum().numpy()
        for dim, axis in enumerate(entry.axes):
            along = effects.transpose(0, dim).flatten(1).sum(1).numpy()
            for width in _wholes(axis) & sums.keys():
                rows, units = places(axis, width)
                there = units >= 0
                where = (rows[there], units[there]) if sums[width].ndim == 2 else units[there]
                np.add.at(sums[width], where, along[there])
    for knob in parts.knobs:
        if knob.from_last:
            for head in range(knob.size):
                inside = [total.sum() for width, total in sums.items() if width.startswith(f"{knob.width}.{head}.")]
                sums[knob.width][head] += sum(inside)
    return sums


def _wholes(axis: Axis) -> set[str]:
    """Names of the widths along an axis, those that tied ones are part of among them."""
    return {width.part_of[0] if width.part_of else width.name for width in widths_of(axis)}


def _accumulate_gradients(model: nn.Module, batches: Batches) -> None:
    """Gradients of the mean loss of every batch, summed."""
    model.zero_grad(set_to_none=True)
    for images, labels in batches:
        torch.autograd.backward(F.cross_entropy(model(images), labels))


def _group(model: nn.Module, parts: Anatomy, width: str, shape: tuple[int, ...]) -> Group:
    """All units of a width as a group of torch-pruning's, the layer with most of them first."""
    from torch_pruning.dependency import Dependency, Group, Node
    from torch_pruning.pruner import function

    handlers = {
        nn.Linear: (function.prune_linear_out_channels, function.prune_linear_in_channels),
        nn.Conv2d: (function.prune_conv_out_channels, function.prune_conv_in_channels),
        nn.LayerNorm: (function.prune_layernorm_out_channels,),
    }
    items = []
    for entry in parts.table.entries:
        path, _, last = entry.name.rpartition(".")
        module = model.get_submodule(path)
        functions = next((found for kind, found in handlers.items() if isinstance(module, kind)), ())
        if last != "weight" or (isinstance(module, nn.Conv2d) and module.groups > 1):
            continue
        for axis, handler in zip(entry.axes, functions, strict=False):
            rows, units = places(axis, width)
            there = np.flatnonzero(units >= 0)
            if there.size:
                roots = rows[there] * shape[-1] + units[there] if len(shape) == 2 else units[there]
                node = Node(module, None, entry.name)
                items.append((Dependency(handler, handler, node, node), there.tolist(), roots.tolist()))
    group = Group()
    for i, (dependency, taken, roots) in enumerate(sorted(items, key=lambda item: -len(item[1]))):
        group.add_dep(dependency, taken)
        group[i].root_idxs = roots
    return group
