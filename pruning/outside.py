"""Structured pruning of timm models outside the five families, through torch-pruning's dependency graph.

Nothing is taken for granted about a model nobody here wrote: torch-pruning can hang on it, fail, or couple the
wrong channels and still run. So a trial in a child process, under a time limit, comes first: it builds the graph,
cuts a step, compares the cut network with the masked one, and cuts down to the smallest widths. Only then is the
caller's model touched.

What is cut: every width the graph finds (channels, residual streams, FFN and squeeze-excite hidden dims), and the
head dims of timm's plain attention. Insides of other attention modules, and the classifier's outputs, stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import search_spaces  # noqa: F401  (registers the families)
from search_spaces.registry import FAMILIES
from search_spaces.weights import not_fetched, offline_if_unreachable

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

TRIAL = [sys.executable, "-P", "-c", "from pruning.outside import answer_trial; answer_trial()"]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
TOLERANCE = 1e-6  # of the largest logit, in double precision
REASON_LENGTH = 300
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class OutsideError(ValueError):
    """A model outside the families that cannot be loaded or pruned as asked, in one line."""


@dataclass(frozen=True)
class Criterion:
    """How units are ranked.

    importance: builds torch-pruning's scorer. gradients: whether it needs them. ranked: True cuts the units that
    lose least importance per MAC anywhere; False cuts the same share of every group (torch-pruning's default).
    """

    importance: Callable[[], tp.importance.Importance]
    gradients: bool = False
    ranked: bool = False


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
    """Channels (in, out) of a convolution or linear layer before and after; removed: the share of its weights cut."""

    name: str
    before: tuple[int, int]
    after: tuple[int, int]
    removed: float


@dataclass(frozen=True)
class OutsideResult:
    """What `prune_outside` did.

    MACs are of one image (see `count_macs`). inner_only: None, or why only inner widths were cut (see `Trial`).
    layers: every convolution and linear layer, cut or not.
    """

    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    minimum_macs: int
    inner_only: str | None
    layers: tuple[LayerChange, ...]


def load_outside(name: str, num_classes: int | None, pretrained: bool) -> tuple[nn.Module, int]:
    """A timm model in eval mode, and its input resolution in pixels.

    Args:
        name: as in timm.list_models(), with or without a weights tag ("resnet18", "resnet18.a1_in1k").
        num_classes: None keeps the model's own.
        pretrained: with timm's pretrained weights, fetched or from its cache.

    Raises:
        OutsideError: unknown name or tag, no classifier, or weights that cannot be had (with the reason).
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(f'timm/{n}' for n in near)}?" if near else "timm.list_models() lists them"
        raise OutsideError(f"timm has no model {name!r}: {hint}")
    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    try:
        with offline_if_unreachable() if pretrained else contextlib.nullcontext():
            model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if pretrained:
            raise OutsideError(not_fetched(name, error, None)) from None
        raise OutsideError(f"timm could not build {name}: {_first_line(error)}") from None
    if not model.num_classes:
        raise OutsideError(f"timm/{name} has no classifier: give the number of classes")
    return model.eval(), model.pretrained_cfg["input_size"][-1]


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
        rounds: scores are computed anew in each; the MACs to cut are shared evenly among them.
        time_limit_s: for the trial in a child process, interpreter and imports included.
        progress: called after each round with (round, rounds, MACs).

    Raises:
        OutsideError: the trial failed or took too long, the target is not below the model's MACs or is below the
            reachable minimum, no batches, or importances that are NaN or all zero.
    """
    chosen = CRITERIA[criterion]
    name = model.pretrained_cfg["architecture"]
    images = torch.zeros(1, 3, resolution, resolution, device=next(model.parameters()).device)
    before, params_before, shapes = count_macs(_fresh(model), images)[""], _params(model), _shapes(model)
    if target_macs >= before:
        raise OutsideError(f"{target_macs / 1e6:.1f} M MACs are not below timm/{name}'s own {before / 1e6:.1f} M")
    trial = run_trial(name, resolution, model.num_classes, multiple_of, time_limit_s)
    if target_macs < trial.minimum_macs:
        raise OutsideError(
            f"timm/{name} cannot be cut to {target_macs / 1e6:.1f} M MACs: the reachable minimum is "
            f"{trial.minimum_macs / 1e6:.1f} M with widths of {multiple_of}"
            + (f" where only inner widths can be cut ({trial.inner_only})" if trial.inner_only else "")
        )
    network = _Network(model, images, multiple_of, inner=trial.inner_only is not None)
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
    changes = tuple(
        LayerChange(layer, shapes[layer][0], channels, 1 - weights / shapes[layer][1])
        for layer, (channels, weights) in _shapes(model).items()
    )
    return OutsideResult(before, now, params_before, _params(model), trial.minimum_macs, trial.inner_only, changes)


def resize_outside(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a pruned model's state dict into a fresh model of the same name, resizing its layers; returns the model."""
    for name, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, old in own.items():
                new = state.get(f"{name}.{key}" if name else key)
                if old is None or new is None or old.shape == new.shape:
                    continue
                own[key] = nn.Parameter(torch.empty_like(new)) if isinstance(old, nn.Parameter) else new.clone()
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.modules.conv._ConvNd):
            if module.groups == module.in_channels:
                module.groups = len(weight)
            module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_features = len(module.running_mean)
        elif isinstance(module, nn.LayerNorm) and weight is not None:
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.GroupNorm) and weight is not None:
            module.num_channels = len(weight)
    for attention in _plain_attentions(model):
        _set_head_dim(attention, _head_dim(attention))
    model.load_state_dict(state)
    return model


def count_macs(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Multiply-accumulates per module name ("" is the whole model), of one forward pass.

    Half of the FLOPs torch's FlopCounterMode counts: convolutions, matrix products and scaled_dot_product_attention.
    Not counted: elementwise operations, normalisation, pooling, softmax, and kernels torch does not know.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    minimum_macs: the fewest MACs that can be reached. inner_only: None where every width can be cut, else why only
    those with a single producing layer can (FFN hidden dims, head dims), not the residual streams.
    """

    minimum_macs: int
    inner_only: str | None


def run_trial(name: str, resolution: int, num_classes: int, multiple_of: int, time_limit_s: float) -> Trial:
    """Try to prune timm/NAME in a child process.

    Raises:
        OutsideError: it took longer, failed, or gave a network that does not compute what the masked one computes.
    """
    own = next((ours for f in FAMILIES.values() for ours, v in f.variants.items() if v.timm == name), None)
    hint = f"; our own {own} can be pruned: vitnas prune --model {own}" if own else ""
    request = {"name": name, "resolution": resolution, "num_classes": num_classes, "multiple_of": multiple_of}
    request |= {"time_limit_s": time_limit_s, "fallback": own is None, "parent": os.getpid()}
    try:
        child = subprocess.run(
            TRIAL,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=time_limit_s,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
    except subprocess.TimeoutExpired as late:
        stage = _last_line((late.stdout or b"").decode()) or "load"
        raise OutsideError(f"torch-pruning could not {stage} timm/{name} within {time_limit_s:g} s{hint}") from None
    answer = _last_line(child.stdout)
    if child.returncode == 0:
        return Trial(**json.loads(answer))
    if child.returncode < 0:
        reason = f"killed by {signal.Signals(-child.returncode).name}, often for want of memory"
    else:
        reason = _last_line(child.stderr)[:REASON_LENGTH]
    raise OutsideError(f"torch-pruning could not {answer or 'load'} timm/{name} ({reason}){hint}")


def answer_trial() -> None:
    """The child's end of `run_trial`: stages on stdout, one a line, then the Trial; an error ends it.

    With `fallback` a model that fails is tried again with its inner widths only.
    """
    request = json.loads(sys.stdin.read())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request.pop("parent"):
        sys.exit("the parent died")
    signal.alarm(math.ceil(request.pop("time_limit_s")) + 1)  # elsewhere than on Linux it dies this late
    with contextlib.suppress(OSError):  # a graph that never ends takes 100 MB a second: this process is to die of it
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)  # on a busy machine its small convolutions wait fifty times as long for a second
    fallback, failed, answers = request.pop("fallback"), None, sys.stdout
    for inner in (False, True) if fallback else (False,):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                minimum = _trial(**request, inner=inner, stage=lambda text: print(text, file=answers, flush=True))
            print(json.dumps({"minimum_macs": minimum, "inner_only": failed}))
            return
        except Exception as error:
            failed = failed or (
                str(error) if isinstance(error, OutsideError) else f"{type(error).__name__}: {_first_line(error)}"
            )
    sys.exit(failed)


def _trial(
    name: str, resolution: int, num_classes: int, multiple_of: int, inner: bool, stage: Callable[[str], None]
) -> int:
    """Cut a step off every group and compare with the masked network, then cut to the floor; returns MACs there."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).double()
    _randomise(model)
    images = torch.randn(1, 3, resolution, resolution, dtype=torch.double)
    stage("build the graph of")
    network = _Network(model, images, multiple_of, inner)
    stage("cut")
    cuts = [(g, torch.randperm(g.size)[: g.bundles()[0]].tolist()) for g in network.groups() if g.bundles()]
    if not cuts:
        raise OutsideError(f"no width can be cut to a smaller multiple of {multiple_of}")
    with _without_statistics(), torch.no_grad():
        expected = network.masked(images, cuts)
        for group, units in cuts:
            network.cut(group, units)
        got = model(images)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if not difference < TOLERANCE:
        raise OutsideError(
            f"the cut network differs from the masked one by {difference:.2g} of its largest logit: the graph couples "
            "the wrong channels, or statistics run over the channels cut"
        )
    for group in network.groups():
        if group.bundles():
            network.cut(group, torch.randperm(group.size)[: sum(group.bundles())].tolist())
    return network.macs()


@dataclass(frozen=True)
class _Group:
    """Units that can only be cut together with everything coupled to them.

    A unit is one channel in each of `repeats` equal parts (convolution groups, heads) of the root's channels.
    coupled: torch-pruning's group of all of them. step: units a cut leaves a multiple of.
    """

    root: nn.Module
    prune: Callable
    coupled: tp.dependency.Group
    size: int
    repeats: int
    step: int
    attention: nn.Module | None

    def bundles(self) -> list[int]:
        """How many units go at a time: to the next multiple of the step, then step by step down to one step."""
        if self.size <= self.step:
            return []
        first = self.size % self.step or self.step
        return [first] + [self.step] * ((self.size - first) // self.step - 1)

    def indices(self, units: Iterable[int]) -> list[int]:
        return [part * self.size + unit for part in range(self.repeats) for unit in units]


class _Network:
    """A model and torch-pruning's dependency graph of it."""

    def __init__(self, model: nn.Module, images: Tensor, multiple_of: int, inner: bool):
        self.model, self.images, self.multiple_of, self.inner = _fresh(model), images, multiple_of, inner
        self.names = {module: name for name, module in model.named_modules()}
        self.attentions = {attention.qkv: attention for attention in _plain_attentions(model)}
        with_heads = [module for module in model.modules() if hasattr(module, "num_heads")]
        self.interiors = [i for m in with_heads if not (i := set(m.modules())) & {*with_heads} - {m}]
        heads = model.get_classifier()
        self.classifier = [
            layer
            for head in (heads if isinstance(heads, tuple | list) else [heads])
            for layer in head.modules()
            if isinstance(layer, LAYERS)
        ]
        tables = [table for module in with_heads for table in module.parameters(recurse=False)]
        self.graph = tp.DependencyGraph().build_dependency(model, (images,), ignored_params=tables, verbose=False)
        self.initial = {group.root: group.size for group in self.groups()}

    def groups(self) -> list[_Group]:
        """What can be cut, at the present widths."""
        found = []
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
            found.append(_Group(root, prune, coupled, size, repeats, step, attention))
        return found

    def macs(self) -> int:
        """MACs of one image at the present widths."""
        return count_macs(_fresh(self.model), self.images)[""]

    def cut(self, group: _Group, units: Sequence[int]) -> None:
        """Remove units from every layer coupled to them."""
        dims = {attention: _head_dim(attention) for attention in self.attentions.values()}
        with torch.no_grad():
            self.graph.get_pruning_group(group.root, group.prune, group.indices(units)).prune()
            for attention, before in dims.items():
                if (after := _head_dim(attention)) != before:
                    _scale_queries(attention, math.sqrt(after / before))
                    _set_head_dim(attention, after)
        _fresh(self.model)

    def cut_towards(self, goal: float, importance: tp.importance.Importance, ranked: bool) -> None:
        """Cut the least important bundles whose estimated MACs stay within what is over the goal, at least one."""
        macs = count_macs(_fresh(self.model), self.images)
        candidates = []
        for group in self.groups():
            scores = self._scores(group, importance)
            order, cost, start = scores.argsort(), self._unit_macs(group, macs), 0
            for size in group.bundles():
                units = order[start : start + size]
                start += size
                lost = scores[units].sum().item() / (size * cost)
                cut = 1 - (group.size - start) / self.initial[group.root]
                candidates.append((lost if ranked else cut, len(candidates), size * cost, group, units.tolist()))
        chosen: dict[nn.Module, tuple[_Group, list[int]]] = {}
        over = macs[""] - goal
        for _, _, cost, group, units in sorted(candidates, key=lambda c: c[:2]):
            if chosen and cost > over:
                break
            chosen.setdefault(group.root, (group, []))[1].extend(units)
            over -= cost
        for group, units in chosen.values():
            self.cut(group, units)

    def masked(self, images: Tensor, cuts: list[tuple[_Group, list[int]]]) -> Tensor:
        """The output with everything `cuts` would remove set to zero, where it is computed and where it is used."""
        hooks, saved = [], []
        for group, units in cuts:
            for dep, indices in self.graph.get_pruning_group(group.root, group.prune, group.indices(units)):
                module = dep.target.module
                if isinstance(module, nn.Parameter):
                    saved.append((module, module.clone()))
                    module.index_fill_(dep.target.pruning_dim, torch.tensor(indices), 0)
                elif isinstance(module, NORMS) or self._outputs(dep):
                    hooks.append(module.register_forward_hook(lambda m, _, y, i=indices: _zero_channels(m, y, i)))
                elif isinstance(module, LAYERS):
                    hooks.append(module.register_forward_pre_hook(lambda m, x, i=indices: _zero_channels(m, *x, i)))
        output = _fresh(self.model)(images)
        for hook in hooks:
            hook.remove()
        for parameter, value in reversed(saved):
            parameter.copy_(value)
        return output

    def _outputs(self, dep: tp.dependency.Dependency) -> bool:
        """Whether output channels of a convolution or linear layer go."""
        return isinstance(dep.target.module, LAYERS) and self.graph.is_out_channel_pruning_fn(dep.handler)

    def _produces(self, dep: tp.dependency.Dependency) -> bool:
        """Whether they are channels of its own making, not a depthwise convolution's."""
        module = dep.target.module
        return self._outputs(dep) and (isinstance(module, nn.Linear) or module.groups in {1, _channel_groups(module)})

    def _scores(self, group: _Group, importance: tp.importance.Importance) -> Tensor:
        """One importance per unit of the group."""
        scores = importance(group.coupled).view(group.repeats, group.size).sum(0)
        if not scores.isfinite().all() or not scores.any():
            raise OutsideError(
                f"the importances of {self.names[group.root]}'s {group.size} units are all zero or not finite: no "
                "gradient reaches them, as behind zero-initialised scales; train the network first, or rank by "
                "magnitude"
            )
        return scores

    def _unit_macs(self, group: _Group, macs: Mapping[str, int]) -> float:
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


def _plain_attentions(model: nn.Module) -> Iterator[nn.Module]:
    """Attention modules whose head dims can be cut: nothing but q, k, v and the projection depends on them."""
    for module in model.modules():
        if isinstance(module, WindowAttention) or (
            isinstance(module, Attention)
            and module.gate is None
            and all(isinstance(norm, nn.Identity) for norm in (module.q_norm, module.k_norm, module.norm))
        ):
            yield module


def _head_dim(attention: nn.Module) -> int:
    return attention.qkv.out_features // (3 * attention.num_heads)


def _set_head_dim(attention: nn.Module, head_dim: int) -> None:
    attention.head_dim, attention.attn_dim = head_dim, head_dim * attention.num_heads
    attention.scale = head_dim**-0.5


def _scale_queries(attention: nn.Module, factor: float) -> None:
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


def _zero_channels(module: nn.Module, tensor: Tensor, channels: list[int]) -> Tensor:
    """A module's input or output with channels set to zero."""
    last = isinstance(module, nn.Linear) or (
        isinstance(module, nn.LayerNorm) and tensor.shape[-1:] == module.normalized_shape
    )
    return tensor.index_fill(-1 if last else 1, torch.tensor(channels), 0)


@contextlib.contextmanager
def _without_statistics() -> Iterator[None]:
    """Layer and group normalisation reduced to their scale and bias: statistics over cut channels cannot agree."""

    def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return x if weight is None else x * weight + (0 if bias is None else bias)

    def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        channels = (-1, *[1] * (x.ndim - 2))
        return x if weight is None else x * weight.view(channels) + bias.view(channels)

    with mock.patch.object(F, "layer_norm", layer_norm), mock.patch.object(F, "group_norm", group_norm):
        yield


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Make scales, biases and running statistics ordinary: as built, zero scales would hide whole branches."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(0, 0.1)
            else:
                tensor.uniform_(0.5, 1.5)


def _fresh(model: nn.Module) -> nn.Module:
    """Eval mode by way of train mode, which empties timm's caches of attention biases."""
    return model.train().eval()


def _gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gradients of the cross entropy summed over the batches' means."""
    model.zero_grad(set_to_none=True)
    empty = True
    for images, labels in batches:
        F.cross_entropy(_fresh(model)(images), labels).backward()
        empty = False
    if empty:
        raise OutsideError("no images to compute importances from")


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _shapes(model: nn.Module) -> dict[str, tuple[tuple[int, int], int]]:
    """Layer name -> ((in, out) channels, number of weights)."""
    shapes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            linear = isinstance(layer, nn.Linear)
            channels = (layer.in_features, layer.out_features) if linear else (layer.in_channels, layer.out_channels)
            shapes[name] = channels, _params(layer)
    return shapes


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :REASON_LENGTH
    ]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
