"""A timm model's layers and the channels that can only be cut together, by torch-pruning's dependency graph.

What is cut: every width the graph finds (channels, residual streams, FFN and squeeze-excite hidden dims), and the
head dims of timm's plain attention. Insides of other attention modules, and the classifier's outputs, stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from pruning.compensation import Source, is_fitted, outputs_of
from pruning.macs import count_macs

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
PlainAttention = Attention | WindowAttention
REASON_LENGTH = 300


class OutsideError(ValueError):
    """A model outside the families that cannot be loaded or pruned as asked, in one line."""


@dataclass(frozen=True)
class Group:
    """Units that can only be cut together with everything coupled to them."""

    root: nn.Module
    """The layer whose channels the units are: one in each of its `repeats` equal parts."""
    prune: Callable[..., nn.Module]
    """torch-pruning's function that cuts channels of the root."""
    coupled: tp.dependency.Group
    """Every layer and channel that goes with them."""
    size: int
    """Number of units."""
    repeats: int
    """Number of equal parts of the root's channels (convolution groups, heads)."""
    step: int
    """Number of units that a cut leaves a multiple of."""
    attention: PlainAttention | None
    """The attention whose head dims they are."""

    def bundles(self) -> list[int]:
        """How many units go at a time: to the next multiple of the step, then step by step down to one step."""
        if self.size <= self.step:
            return []
        first = self.size % self.step or self.step
        return [first] + [self.step] * ((self.size - first) // self.step - 1)

    def indices(self, units: Iterable[int]) -> list[int]:
        """The root's channels that these units are."""
        return [part * self.size + unit for part in range(self.repeats) for unit in units]


class CutNetwork:
    """A model and torch-pruning's dependency graph of it."""

    def __init__(self, model: nn.Module, images: Tensor, multiple_of: int, inner: bool) -> None:
        self.model, self.images, self.multiple_of, self.inner = fresh(model), images, multiple_of, inner
        self.names = {module: name for name, module in model.named_modules()}
        self.attentions = {attention.qkv: attention for attention in plain_attentions(model)}
        with_heads = [module for module in model.modules() if hasattr(module, "num_heads")]
        self.interiors = [i for m in with_heads if not (i := set(m.modules())) & {*with_heads} - {m}]
        timm_model: Any = model
        heads = timm_model.get_classifier()
        self.classifier = [
            layer
            for head in (heads if isinstance(heads, tuple | list) else [heads])
            for layer in head.modules()
            if isinstance(layer, LAYERS)
        ]
        tables = [table for module in with_heads for table in module.parameters(recurse=False)]
        self.graph = tp.DependencyGraph().build_dependency(model, (images,), ignored_params=tables, verbose=False)
        self.initial = {group.root: group.size for group in self.groups()}
        self.kept = {m: torch.arange(outputs_of(m)) for m in model.modules() if is_fitted(m)}
        self.dims = {attention: head_dim(attention) for attention in self.attentions.values()}

    def groups(self) -> list[Group]:
        """What can be cut, at the present widths."""
        found: list[Group] = []
        for coupled in self.graph.get_all_groups(ignored_layers=self.classifier, root_module_types=LAYERS):
            modules = {dep.target.module for dep, _ in coupled if dep.target.module in self.names}
            if self.inner and sum(self._produces(dep) for dep, _ in coupled) > 1:
                continue
            attention = next((self.attentions[m] for m in modules if m in self.attentions), None)
            inside = any(modules <= interior for interior in self.interiors)
            if not inside:
                root, prune = coupled[0].dep.target.module, coupled[0].dep.handler
                repeats = math.lcm(*(_channel_groups(m) for m in modules))
                step = self.multiple_of // math.gcd(self.multiple_of, repeats)
                attention = None
            elif attention is not None:
                # Rooted at the projection, units are numbered by head and dim; q, k and v follow from there.
                root, prune = attention.proj, tp.prune_linear_in_channels
                coupled = self.graph.get_pruning_group(root, prune, list(range(root.in_features)))
                repeats, step = attention.num_heads, self.multiple_of
            else:
                continue
            size = len(coupled[0].idxs) // repeats
            found.append(Group(root, prune, coupled, size, repeats, step, attention))
        return found

    def macs(self) -> int:
        """MACs of one image at the present widths."""
        return count_macs(fresh(self.model), self.images)[""]

    def cut(self, group: Group, units: Sequence[int]) -> None:
        """Remove units from every layer coupled to them."""
        dims = {attention: head_dim(attention) for attention in self.attentions.values()}
        with torch.no_grad():
            coupled = self.graph.get_pruning_group(group.root, group.prune, group.indices(units))
            self._note(coupled)
            coupled.prune()
            for attention, before in dims.items():
                if (after := head_dim(attention)) != before:
                    _scale_queries(attention, math.sqrt(after / before))
                    set_head_dim(attention, after)
        fresh(self.model)

    def cut_towards(self, goal: float, importance: tp.importance.Importance, ranked: bool) -> None:
        """Cut the least important bundles whose estimated MACs stay within what is over the goal, at least one."""
        macs = count_macs(fresh(self.model), self.images)
        candidates: list[tuple[float, int, float, Group, list[int]]] = []
        for group in self.groups():
            scores = self._scores(group, importance)
            order, cost, start = scores.argsort(), self._unit_macs(group, macs), 0
            for size in group.bundles():
                least = order[start : start + size]
                start += size
                lost = scores[least].sum().item() / (size * cost)
                cut = 1 - (group.size - start) / self.initial[group.root]
                candidates.append((lost if ranked else cut, len(candidates), size * cost, group, least.tolist()))
        chosen: dict[nn.Module, tuple[Group, list[int]]] = {}
        over = macs[""] - goal
        for _, _, saved, group, units in sorted(candidates, key=lambda c: c[:2]):
            if chosen and saved > over:
                break
            chosen.setdefault(group.root, (group, []))[1].extend(units)
            over -= saved
        for group, units in chosen.values():
            self.cut(group, units)

    def masked(self, images: Tensor, cuts: list[tuple[Group, list[int]]]) -> Tensor:
        """The output with everything `cuts` would remove set to zero, where it is computed and where it is used."""
        hooks, saved = [], []
        for group, units in cuts:
            for dep, indices in self.graph.get_pruning_group(group.root, group.prune, group.indices(units)):
                module = dep.target.module
                if isinstance(module, nn.Parameter):
                    saved.append((module, module.clone()))
                    module.index_fill_(dep.target.pruning_dim, torch.tensor(indices), 0)
                elif isinstance(module, NORMS) or self._outputs(dep):
                    hooks.append(module.register_forward_hook(_zero_output(indices)))
                elif isinstance(module, LAYERS):
                    hooks.append(module.register_forward_pre_hook(_zero_input(indices)))
        output: Tensor = fresh(self.model)(images)
        for hook in hooks:
            hook.remove()
        for parameter, value in reversed(saved):
            parameter.copy_(value)
        return output

    def sources(self) -> dict[str, Source]:
        """What each layer that can be refitted should write, in terms of the network before any cut."""
        found = {self.names[module]: Source(self.names[module], kept) for module, kept in self.kept.items()}
        for attention, before in self.dims.items():
            name, rows = self.names[attention.qkv], torch.ones(attention.qkv.out_features)
            rows[: len(rows) // 3] = math.sqrt(head_dim(attention) / before)
            found[name] = replace(found[name], factor=rows)
        return found

    def _note(self, coupled: tp.dependency.Group) -> None:
        """Remember which outputs of each layer stay."""
        gone: dict[nn.Module, set[int]] = {}
        for dep, indices in coupled:
            module = dep.target.module
            if module in self.kept and (self._outputs(dep) or isinstance(module, NORMS)):
                gone.setdefault(module, set()).update(indices)
        for module, units in gone.items():
            stays = torch.ones(len(self.kept[module]), dtype=torch.bool)
            stays[list(units)] = False
            self.kept[module] = self.kept[module][stays]

    def _outputs(self, dep: tp.dependency.Dependency) -> bool:
        """Whether output channels of a convolution or linear layer go."""
        return isinstance(dep.target.module, LAYERS) and self.graph.is_out_channel_pruning_fn(dep.handler)

    def _produces(self, dep: tp.dependency.Dependency) -> bool:
        """Whether they are channels of its own making, not a depthwise convolution's."""
        module = dep.target.module
        return self._outputs(dep) and (isinstance(module, nn.Linear) or module.groups in {1, _channel_groups(module)})

    def _scores(self, group: Group, importance: tp.importance.Importance) -> Tensor:
        """One importance per unit of the group."""
        scores: Tensor = importance(group.coupled).view(group.repeats, group.size).sum(0)
        if not scores.isfinite().all() or not scores.any():
            raise OutsideError(
                f"the importances of {self.names[group.root]}'s {group.size} units are all zero or not finite: no "
                "gradient reaches them, as behind zero-initialised scales; train the network first, or rank by "
                "magnitude"
            )
        return scores

    def _unit_macs(self, group: Group, macs: Mapping[str, int]) -> float:
        """MACs that go with one unit, other groups left as they are."""
        total = 0.0
        for dep, indices in group.coupled:
            layer = dep.target.module
            if isinstance(layer, LAYERS):
                graph = self.graph
                channels = graph.get_out_channels(layer) if self._outputs(dep) else graph.get_in_channels(layer)
                total += macs[self.names[layer]] * len(indices) / channels
        if group.attention is not None:
            inside = self.names[group.attention]
            total += macs[inside] - sum(macs.get(f"{inside}.{name}", 0) for name, _ in group.attention.named_children())
        return total / group.size


def plain_attentions(model: nn.Module) -> Iterator[PlainAttention]:
    """Attention modules whose head dims can be cut: nothing but q, k, v and the projection depends on them."""
    for module in model.modules():
        if isinstance(module, WindowAttention) or (
            isinstance(module, Attention)
            and module.gate is None
            and all(isinstance(norm, nn.Identity) for norm in (module.q_norm, module.k_norm, module.norm))
        ):
            yield module


def head_dim(attention: PlainAttention) -> int:
    """Its head dim, by the width of its projection."""
    return attention.qkv.out_features // (3 * attention.num_heads)


def set_head_dim(attention: PlainAttention, dim: int) -> None:
    """Set what follows the head dim in the attention's settings; its weights stay."""
    attention.scale = dim**-0.5
    if isinstance(attention, Attention):
        attention.head_dim, attention.attn_dim = dim, dim * attention.num_heads


def _scale_queries(attention: PlainAttention, factor: float) -> None:
    """Multiply q by a factor; the gradients follow, so that weight times gradient stays."""
    for parameter in attention.qkv.parameters():
        parameter[: len(parameter) // 3].mul_(factor)
        if parameter.grad is not None:
            parameter.grad[: len(parameter) // 3].div_(factor)


def _channel_groups(module: nn.Module) -> int:
    """Equal parts of a layer's channels that must stay equal."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups < module.out_channels:
        return module.groups
    return 1


def _zero_output(channels: list[int]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that sets output channels to zero."""
    return lambda module, _, output: _zero_channels(module, output, channels)


def _zero_input(channels: list[int]) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """A forward hook that sets input channels to zero."""
    return lambda module, inputs: _zero_channels(module, inputs[0], channels)


def _zero_channels(module: nn.Module, tensor: Tensor, channels: list[int]) -> Tensor:
    """A module's input or output with channels set to zero."""
    last = isinstance(module, nn.Linear) or (
        isinstance(module, nn.LayerNorm) and tensor.shape[-1:] == module.normalized_shape
    )
    return tensor.index_fill(-1 if last else 1, torch.tensor(channels), 0)


def fresh(model: nn.Module) -> nn.Module:
    """Eval mode by way of train mode, which empties timm's caches of attention biases."""
    return model.train().eval()


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not empty, cut to `REASON_LENGTH`; its class if there is none."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)[:REASON_LENGTH]
