"""Closed-form repair after a cut: every layer is refitted to write what it wrote before.

What is left of a network runs once over some images without labels. Each Linear and ungrouped Conv2d is fitted, by
ridge regression from what it reads now, to what the whole network writes there; the penalty draws it to the weights
that it has, and is chosen on images held out. Each BatchNorm takes the statistics of what it reads now, and the scale
and shift that come nearest to what it wrote. So a layer makes good what was cut from its own input and what the layers
before it could not. One that writes what it wrote stays as it is, to the bit.

Keys take over from the queries that were cut: where q is close to B q' of those that stay, they become k' = B^T k, so
that q'^T k' is close to q^T k. After GRAIL (arXiv 2602.23795) and CORP (arXiv 2602.05243), which refit the layers that
read a cut width from the whole network's own activations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.slicing import Origin
from pruning.units import with_all_tokens
from search_spaces import Arch, create_model
from search_spaces.gates import Gate, gates_of
from search_spaces.widths import Axis, Cat, Width, width_table

PIXELS = 512 * 64 * 64
"""Of all images together that a network is repaired on: 512 images of 64 px, 128 of 128."""
LEAST_IMAGES = 128
ROWS = 4096
"""Positions of all images that a layer is fitted on, as far as there are so many; and at least `ROWS_PER_INPUT`."""
ROWS_PER_INPUT = 8
VALUES = 1 << 24
"""Of a layer's inputs at all these positions, at most: a wide layer is fitted on fewer positions, so that its inputs or
they are some 4,000 at most, and with them the equations that it is fitted by."""
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.01, 1e-8)
"""Penalties that are tried, over the mean square of a layer's inputs."""
CLOSE = 1.05
"""The largest penalty is taken that misses at most so much of the least that any misses, on images held out."""
HELD_OUT = 4
"""Every image of so many chooses the penalty, from the first on."""
KEY_RIDGE = 1e-6
DEAD = 1e-4
"""A channel whose variance is below this share of what BatchNorm knows of it keeps its scale."""
LEAST_VARIANCE = 0.01
"""Of a channel's known variance that is left to it: a training would blow up what is dead."""
SAME = 1e-5
"""A layer that misses what it wrote by less, over the size of that, stays as it is."""
BATCH = 32


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys of one head, where some of its queries were cut."""

    gate: str
    """The whole network's gate on the queries."""
    head: int
    kept: Tensor
    """(kept,) int64: units of the gate that stay."""
    own: Tensor
    """(kept,) int64: where the cut layer writes their keys."""
    all: Tensor
    """(units,) int64: where the whole network's layer writes the keys of all units."""


@dataclass(frozen=True, eq=False)
class Source:
    """What a layer of the cut network should write."""

    path: str
    """The layer of the whole network."""
    rows: Tensor
    """(units,) int64: which of its outputs each is; -1 for a new one, which is left alone."""
    factor: float | Tensor = 1.0
    """That they are multiplied by, (units,)."""
    keys: tuple[Keys, ...] = ()


@dataclass(eq=False)
class _Target:
    """What the whole network writes at some positions of each image."""

    layout: tuple[int, ...]
    """Dimensions beside those of images and units."""
    index: Tensor
    """(B, p): the positions."""
    parts: list[Tensor] = field(default_factory=list)
    """(images, p, units) each."""

    @property
    def values(self) -> Tensor:
        return torch.cat(self.parts).flatten(0, 1)


def images_for(resolution: int) -> int:
    """How many images a network is repaired on."""
    return max(LEAST_IMAGES, PIXELS // resolution**2)


def compensate(
    parent: Arch,
    weights: Mapping[str, Tensor],
    child: Arch,
    state: Mapping[str, Tensor],
    origins: Mapping[str, Origin],
    images: Tensor,
) -> tuple[dict[str, Tensor], int]:
    """A cut network's state dict, repaired, and how many layers were.

    Tokens are not dropped or merged meanwhile: two networks would choose different ones.

    Args:
        parent, weights: the network that it was cut from.
        child, state: the cut network; as large an input.
        origins: of the child's tensors, by name.
        images: (B, 3, R, R), on the device to work on.
    """
    whole, cut = (
        create_model(with_all_tokens(arch)).to(images).eval().requires_grad_(False) for arch in (parent, child)
    )
    whole.load_state_dict(dict(weights))
    cut.load_state_dict(dict(state))
    changed = refit(whole, cut, sources(whole, cut, origins), images)
    return {name: value.cpu() for name, value in cut.state_dict().items()}, changed


def sources(whole: nn.Module, cut: nn.Module, origins: Mapping[str, Origin]) -> dict[str, Source]:
    """What every layer of a cut network of one of our families should write, by its path."""
    ours, theirs = ({entry.name: entry for entry in width_table(model).entries} for model in (cut, whole))
    gates = {gate.width.name: name for name, gate in gates_of(whole).items()}
    modules, found = dict(cut.named_modules()), {}
    for name, origin in origins.items():
        path, _, last = name.rpartition(".")
        if last == "weight" and is_fitted(modules[path]):
            rows = torch.from_numpy(origin.rows).long().clamp(min=-1)
            keys = _keys(ours[name].axes[0], theirs[origin.name].axes[0], rows, gates)
            factor = 1.0 if origin.factor is None else torch.from_numpy(origin.factor)
            found[path] = Source(origin.name.rpartition(".")[0], rows, factor, keys)
    return found


def is_fitted(module: nn.Module) -> bool:
    """Whether `refit` can fit a layer."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    if isinstance(module, nn.Conv2d):
        plain = type(module).forward is nn.Conv2d.forward and module.padding_mode == "zeros"
        return plain and module.groups == 1 and not isinstance(module.padding, str)
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine and module.running_mean is not None


def outputs_of(module: nn.Module) -> int:
    """How many outputs a layer that `refit` can fit has."""
    return len(module.get_parameter("weight"))


def _keys(ours: Axis, theirs: Axis, rows: Tensor, gates: Mapping[str, str]) -> tuple[Keys, ...]:
    """The heads that keep some of their keys."""
    places = list(_units(theirs))
    runs: dict[tuple[str, int], list[int]] = {}
    for at, (width, head, _) in enumerate(places):
        if _writes_keys(width):
            runs.setdefault((width.name, head), []).append(at)
    kept: dict[tuple[str, int], list[int]] = {}
    for at, (row, (width, _, _)) in enumerate(zip(rows.tolist(), _units(ours), strict=True)):
        if row >= 0 and _writes_keys(width):
            kept.setdefault((places[row][0].name, places[row][1]), []).append(at)
    found = []
    for (name, head), own in kept.items():
        everywhere = runs[name, head]
        if len(own) < len(everywhere) and name in gates:
            units = [places[row][2] for row in rows[own].tolist()]
            found.append(Keys(gates[name], head, torch.tensor(units), torch.tensor(own), torch.tensor(everywhere)))
    return tuple(found)


def _writes_keys(width: Width) -> bool:
    return width.kind == "qk" and width.grown == "zero"


def _units(axis: Axis, head: int = 0) -> Iterator[tuple[Width, int, int]]:
    """Width, head and unit at each position of an axis."""
    if isinstance(axis, Width):
        yield from ((axis, head, unit) for unit in range(axis.size))
    elif isinstance(axis, Cat):
        for part in axis.parts:
            yield from _units(part, head)
    else:
        for outer in range(axis.outer.size):
            yield from _units(axis.inner, outer)


@torch.no_grad()
def refit(whole: nn.Module, cut: nn.Module, sources: Mapping[str, Source], images: Tensor) -> int:
    """Refit the layers of `cut` in place, from its input on; returns how many were. Both are in eval mode.

    A layer whose positions are not those of its source (other windows) is left alone.
    """
    targets = _observe(whole, cut, sources, images)
    changed: list[str] = []

    def before(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        target = targets.pop(path, None)
        if target is None:
            return
        x = inputs[0]
        known = (sources[path].rows >= 0).to(x.device)
        whole_of = sum(map(len, target.parts)) == len(images)  # not where a layer is called more than once
        if whole_of and _layout_of(module, x, len(images)) == target.layout and known.any():
            fitted = _fit(module, _read(module, x, target.index), target.values[:, known], known, len(images))
            changed.extend([path] * fitted)

    modules = dict(cut.named_modules())
    handles = [modules[path].register_forward_pre_hook(functools.partial(before, path)) for path in sources]
    try:
        cut(images)
    finally:
        for handle in handles:
            handle.remove()
    return len(changed)


def _observe(whole: nn.Module, cut: nn.Module, sources: Mapping[str, Source], images: Tensor) -> dict[str, _Target]:
    """Run the whole network: what each layer of the cut one should write, by its path."""
    modules, theirs = dict(cut.named_modules()), dict(whole.named_modules())
    targets: dict[str, _Target] = {}
    queries: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    start = 0

    def after(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        source, part = sources[path], min(BATCH, len(images) - start)
        if len(output) % part:
            return  # nothing of images
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            output = _normed(module, inputs[0])  # timm's have an activation behind
        rows = _rows(_units_last(module, output), part)
        if path not in targets:
            width = _inputs(modules[path])
            wanted = min(max(ROWS, ROWS_PER_INPUT * width), VALUES // width)
            index = _positions(rows.shape[1], len(images), wanted, generator).to(rows.device)
            targets[path] = _Target(_beside(module, output, part), index)
        target = targets[path]
        rows = _taken(rows, target.index[start : start + part])
        target.parts.append(rows if source.keys else rows[..., source.rows.clamp(min=0).to(rows.device)])

    def at_gate(name: str, gate: Gate, inputs: tuple[Tensor, ...]) -> None:
        q = inputs[0].movedim(gate.dims, list(range(-len(gate.dims), 0)))
        q = q.reshape(-1, *(gate.units if len(gate.units) == 2 else (1, *gate.units))).double()
        gram = torch.einsum("nhi,nhj->hij", q, q)
        queries[name] = queries[name] + gram if name in queries else gram

    gated = {keys.gate for source in sources.values() for keys in source.keys}
    handles = [theirs[s.path].register_forward_hook(functools.partial(after, path)) for path, s in sources.items()]
    for name, gate in gates_of(whole).items():
        if name in gated:
            handles.append(gate.register_forward_pre_hook(functools.partial(at_gate, name)))
    try:
        for batch in images.split(BATCH):
            whole(batch)
            start += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, target in targets.items():
        source = sources[path]
        if source.keys:
            scale = _scale_after(whole, source.path)
            target.parts = [_with_keys(torch.cat(target.parts), source, scale, queries)]
        if not isinstance(source.factor, float):
            target.parts = [part * source.factor.to(part) for part in target.parts]
    return targets


def _scale_after(whole: nn.Module, path: str) -> Tensor | None:
    """What the BatchNorm behind a layer multiplies by; None: there is none."""
    beside, _, last = path.rpartition(".")
    norm = getattr(whole.get_submodule(beside), "norm", None)
    if last != "linear" or not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_var is None:
        return None
    return norm.weight / (norm.running_var + norm.eps).sqrt()


def _with_keys(values: Tensor, source: Source, scale: Tensor | None, queries: Mapping[str, Tensor]) -> Tensor:
    """The whole layer's outputs -> those wanted, keys mixed to stand in for those that were cut."""
    found = values[..., source.rows.clamp(min=0).to(values.device)]
    for keys in source.keys:
        gram = queries[keys.gate][keys.head]
        among = gram[keys.kept][:, keys.kept]
        among.diagonal().add_(KEY_RIDGE * among.diagonal().mean() + 1e-30)
        mixed = torch.linalg.solve(among, gram[keys.kept]).to(values)
        if scale is not None:
            ours, theirs = scale[source.rows[keys.own]], scale[keys.all]
            mixed = torch.where(ours[:, None].abs() > 1e-12, mixed * theirs / ours[:, None], 0.0)
        found[..., keys.own] = values[..., keys.all] @ mixed.T
    return found


# Rows of activations


def _units_last(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads or writes, (N, C, H, W) or (N, ..., C), as (N, ..., C)."""
    return x.movedim(1, -1) if isinstance(module, nn.Conv2d | nn.BatchNorm2d) else x


def _beside(module: nn.Module, x: Tensor, images: int) -> tuple[int, ...]:
    """Dimensions of activations beside those of images and units; windows have joined the batch."""
    return len(x) // images, *_units_last(module, x).shape[1:-1]


def _rows(x: Tensor, images: int) -> Tensor:
    """Activations (N, ..., C) as (B, positions, C)."""
    return x.reshape(images, -1, x.shape[-1])


def _positions(count: int, images: int, wanted: int, generator: torch.Generator) -> Tensor:
    """(B, p) of so many positions: all of them, or so that `wanted` rows come together."""
    each = -(-wanted // images)
    if each >= count:
        return torch.arange(count).expand(images, -1)
    return torch.randint(count, (images, each), generator=generator)


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def _inputs(module: nn.Module) -> int:
    """How many inputs an output of a layer is made of."""
    return module.weight[0].numel() if isinstance(module, nn.Linear | nn.Conv2d) else 1


def _layout_of(module: nn.Module, x: Tensor, images: int) -> tuple[int, ...]:
    """`_beside` of what a layer writes for an input."""
    if not isinstance(module, nn.Conv2d):
        return _beside(module, x, images)
    sides = zip(x.shape[2:], module.kernel_size, module.dilation, module.stride, _padding(module), strict=True)
    return len(x) // images, *((n + 2 * pad - d * (kernel - 1) - 1) // s + 1 for n, kernel, d, s, pad in sides)


def _normed(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What a BatchNorm makes of its input in eval mode."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(module.padding, str):
        raise TypeError("a convolution with padding by name is not refitted")
    return module.padding


def _read(module: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    """What a layer reads for its outputs at some positions: (B * p, inputs)."""
    images = len(index)
    if not isinstance(module, nn.Conv2d):
        return _taken(_rows(_units_last(module, x), images), index).flatten(0, 1)
    if module.kernel_size == (1, 1) and not any(_padding(module)):
        strided = x[..., :: module.stride[0], :: module.stride[1]]
        return _taken(_rows(_units_last(module, strided), images), index).flatten(0, 1)
    found, joined = [], len(x) // images
    batch = min(BATCH, max(1, VALUES // (_inputs(module) * math.prod(_layout_of(module, x, images)))))
    for start in range(0, images, batch):
        part = x[start * joined : (start + batch) * joined]
        patches = F.unfold(part, module.kernel_size, module.dilation, _padding(module), module.stride).transpose(1, 2)
        found.append(_taken(_rows(patches, len(part) // joined), index[start : start + batch]))
    return torch.cat(found).flatten(0, 1)


# Fitting


def _fit(module: nn.Module, x: Tensor, wanted: Tensor, known: Tensor, images: int) -> bool:
    """Fit a layer's known outputs to (rows, known) `wanted`; returns whether it was changed."""
    x, wanted = x.double(), wanted.double()
    if isinstance(module, nn.Linear | nn.Conv2d):
        return _fit_weight(module, x, wanted, known, images)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return _fit_norm(module, x[:, known], wanted, known)
    raise TypeError(f"{type(module).__name__} is not refitted")


def _fit_weight(module: nn.Linear | nn.Conv2d, x: Tensor, wanted: Tensor, known: Tensor, images: int) -> bool:
    """Fit by ridge regression; a constant goes into the bias or, without one, is left to the BatchNorm behind."""
    weight = module.weight.flatten(1)[known].double()
    middle, aim = x.mean(0), wanted.mean(0)
    x, wanted = x - middle, wanted - aim
    missed = wanted - x @ weight.T
    constant = None if module.bias is None else aim - weight @ middle - module.bias[known]
    worst = missed.square().mean() + (0 if constant is None else constant.square().mean())
    if not worst.isfinite() or worst <= SAME**2 * (wanted.square().mean() + aim.square().mean()):
        return False
    step = _ridge(x, missed, (torch.arange(images) % HELD_OUT == 0).repeat_interleave(len(x) // images).to(x.device))
    if not step.any() and (constant is None or not constant.any()):
        return False
    weight = weight + step
    module.weight.view(len(module.weight), -1)[known] = weight.to(module.weight)
    if module.bias is not None:
        module.bias[known] = (aim - weight @ middle).to(module.bias)
    return True


def _ridge(x: Tensor, missed: Tensor, held_out: Tensor) -> Tensor:
    """The step (outputs, inputs) that makes good what is missed. held_out: (rows,), those that choose the penalty."""
    held, aim = x[held_out], missed[held_out]
    steps = _solutions(x[~held_out], missed[~held_out], RIDGES)
    left = [(aim - held @ step).square().sum().item() for step in steps]
    if min(left) >= aim.square().sum().item():
        return x.new_zeros(missed.shape[1], x.shape[1])
    ridge = next(ridge for ridge, each in zip(RIDGES, left, strict=True) if each <= CLOSE * min(left))
    return next(_solutions(x, missed, (ridge,))).T


def _solutions(x: Tensor, missed: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
    """The steps (inputs, outputs) for each penalty, by as many equations as there are inputs or rows, whichever are
    fewer."""
    wide = x.shape[1] > len(x)
    gram, target = (x @ x.T, missed) if wide else (x.T @ x, x.T @ missed)
    mean_square = x.square().sum() / x.shape[1]
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for ridge in ridges:
        found: Tensor = torch.linalg.solve(gram + one * (ridge * mean_square + 1e-30), target)
        yield x.T @ found if wide else found


def _fit_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, wanted: Tensor, known: Tensor) -> bool:
    """Take the statistics of (rows, known) x, and the scale and shift of least squares; returns whether it changed."""
    mean_now, var_now = norm.running_mean, norm.running_var
    if mean_now is None or var_now is None:
        return False
    scale = (norm.weight / (var_now + norm.eps).sqrt())[known]
    missed = wanted - (x - mean_now[known]) * scale - norm.bias[known]
    worst = missed.square().mean()
    if not worst.isfinite() or worst <= SAME**2 * wanted.square().mean():
        return False
    var, mean = torch.var_mean(x, 0, correction=0)
    aim, known_var = wanted.mean(0), var_now[known].double()
    slope = ((x - mean) * (wanted - aim)).mean(0) / var.clamp(min=1e-30)
    slope = torch.where(var > DEAD * known_var, slope, scale.double())
    var = var.maximum(LEAST_VARIANCE * known_var)
    mean_now[known], var_now[known] = mean.to(mean_now), var.to(var_now)
    norm.weight[known] = (slope * (var + norm.eps).sqrt()).to(norm.weight)
    norm.bias[known] = aim.to(norm.bias)
    return True
