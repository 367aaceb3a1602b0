"""Weight sharing: one network owns the weights of a whole space, and every candidate runs on parts of its memory.

A candidate takes the first units of every width, the first blocks of every stage, and the corner of every bias table.
Where that is a strided view of the owner's tensor, the candidate's parameter is that view, its gradient the same view
of the owner's gradient, its running statistics the owner's own. Where it is not (query, key and value rows, heads of
fewer units), it is a copy, refreshed before and added or written back after: no gradient and no BatchNorm update is
lost. (Views that autograd goes through, handed to functional_call, cost 1.4 to 2.7 times the network alone, these 1.06
to 1.14: every slice's backward pass fills a tensor of the owner's size.)

Training follows the sandwich rule: the largest candidate learns from the labels, the smallest and two random ones from
its soft output (Yu and Huang, ICCV 2019; Yu et al., BigNAS, ECCV 2020), and BatchNorm is calibrated anew for each
candidate that is judged.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed
from torch import Tensor, nn

from nas.data.batches import Batch
from nas.errors import TrainingError, UserError
from nas.files import replace_file
from nas.training.engine import Accuracy, batches_for, evaluate, out_of_memory
from pruning.slicing import significant
from search_spaces import Arch, ArchError, table
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS, PER_STAGE, random_params
from search_spaces.widths import Axis, Cat, Each, Entry, Width, width_table

_log = logging.getLogger(__name__)
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
WARMUP = 0.05
RANDOM = 2
"""Random candidates a step."""
CALIBRATED = (nn.BatchNorm1d, nn.BatchNorm2d)


# The owner of the weights


def maximum(archs: Sequence[Arch]) -> Arch:
    """The smallest Arch whose weights hold those of all `archs`, width by width, with every branch of every block.

    It is a store, not a network to run: EfficientViT's head j holds the widest head j of any of them, and SHViT's
    stages are as wide as the widest attended part beside the widest rest.

    Raises:
        UserError: several families, numbers of classes or of stages, or a structure that no one store can hold.
    """
    kinds = {(arch.family, arch.num_classes, len(getattr(arch, "stages", ()))) for arch in archs}
    if len(kinds) != 1:
        raise UserError("networks that share weights are of one family, number of classes and number of stages")
    documents = [arch.model_dump(mode="json") for arch in archs]
    raw = reduce(_larger, documents)
    hold_all = FAMILIES[archs[0].family].hold_all
    try:
        if hold_all is not None:
            hold_all(raw, documents)
        return Arch.from_json(json.dumps(raw))
    except ArchError as error:
        raise UserError(f"these networks cannot share weights: {error}") from None


def _larger(a: Any, b: Any) -> Any:
    """Two documents' larger widths, longer lists and all branches; of texts the first."""
    if a is None or b is None:
        return a if b is None else b
    if isinstance(a, dict):
        return {key: _larger(a.get(key), b.get(key)) for key in a | b}
    if isinstance(a, list):
        return [_larger(x, y) for x, y in itertools.zip_longest(a, b)]
    return a if isinstance(a, str) else max(a, b)


# A candidate on the owner's memory

View = Callable[[Tensor, int], Tensor]


def _whole(tensor: Tensor, dim: int) -> Tensor:
    return tensor


def _run(start: int, size: int, inner: View = _whole) -> View:
    return lambda tensor, dim: inner(tensor.narrow(dim, start, size), dim)


def _each(outer: int, size: int, heads: int, inner: View) -> View:
    return lambda tensor, dim: inner(tensor.unflatten(dim, (outer, size)).narrow(dim, 0, heads), dim + 1)


def _corner(start: int, side: int, corner: int) -> View:
    def view(tensor: Tensor, dim: int) -> Tensor:
        square = tensor.narrow(dim, start, side * side).unflatten(dim, (side, side))
        return square.narrow(dim, 0, corner).narrow(dim + 1, 0, corner)

    return view


def pieces(ours: Axis, theirs: Axis) -> list[tuple[View, View]]:
    """Views of a candidate's axis and of the owner's that hold the same units: together, the candidate's whole axis.

    Raises:
        ValueError: the candidate's axis is larger, or of another structure.
    """
    if _sizes(ours) == _sizes(theirs):
        return [(_whole, _whole)]
    if isinstance(ours, Width) and isinstance(theirs, Width):
        if ours.size > theirs.size or ours.rule == "fixed":
            raise ValueError(f"{ours.name or 'a fixed axis'} is {ours.size}, the supernet has {theirs.size}")
        if ours.rule == "resize":
            side, corner = math.isqrt(theirs.size), math.isqrt(ours.size)
            first = theirs.size - side**2
            if ours.size - corner**2 != first:
                raise ValueError(f"{ours.name}: {ours.size} positions are no corner of {theirs.size}")
            token = [(_run(0, first), _run(0, first))] if first else []
            return [*token, (_corner(first, corner, corner), _corner(first, side, corner))]
        start = (theirs.size - ours.size) // 2 if ours.rule == "crop" else 0
        return [(_whole, _run(start, ours.size))]
    if isinstance(ours, Cat) and isinstance(theirs, Cat) and len(ours.parts) <= len(theirs.parts):
        found, start, begins = [], 0, 0
        for a, b in zip(ours.parts, theirs.parts, strict=False):
            found += [(_run(start, a.size, f), _run(begins, b.size, g)) for f, g in pieces(a, b)]
            start, begins = start + a.size, begins + b.size
        return found
    if isinstance(ours, Each) and isinstance(theirs, Each) and ours.outer.size <= theirs.outer.size:
        heads = ours.outer.size
        return [
            (_each(heads, ours.inner.size, heads, f), _each(theirs.outer.size, theirs.inner.size, heads, g))
            for f, g in pieces(ours.inner, theirs.inner)
        ]
    raise ValueError(f"the axes of {ours} and {theirs} differ in structure, or the supernet's is smaller")


def _sizes(axis: Axis) -> Any:
    if isinstance(axis, Width):
        return axis.size
    return tuple(map(_sizes, axis.parts)) if isinstance(axis, Cat) else (_sizes(axis.outer), _sizes(axis.inner))


class Candidate:
    """A network of an Arch on the owner's memory: `begin`, forward and backward passes of `model`, `finish`.

    own_statistics: BatchNorm has statistics of its own, not the owner's.
    """

    def __init__(
        self, arch: Arch, owner: nn.Module, entries: Mapping[str, Entry], own_statistics: bool = False
    ) -> None:
        with torch.device("meta"):
            self.model = FAMILIES[arch.family].build(arch)
        self.resolution = arch.resolution
        self._taken: tuple[list[Tensor], list[Tensor]] = [], []
        self._added: tuple[list[Tensor], list[Tensor]] = [], []
        self._written: tuple[list[Tensor], list[Tensor]] = [], []
        self._gradients: list[Tensor] = []
        parameters, buffers = dict(owner.named_parameters()), dict(owner.named_buffers())
        modules, device = dict(self.model.named_modules()), next(iter(parameters.values())).device
        for entry in width_table(self.model).entries:
            path, _, last = entry.name.rpartition(".")
            try:
                part = _Part(entry, entries[entry.name])
            except (ValueError, KeyError) as error:
                raise UserError(f"this {arch.family} is not part of the supernet: {entry.name}: {error}") from None
            if entry.trainable:
                modules[path]._parameters[last] = self._parameter(parameters[entry.name], part)
            elif own_statistics:
                modules[path]._buffers[last] = torch.zeros(entry.shape, dtype=buffers[entry.name].dtype, device=device)
            else:
                modules[path]._buffers[last] = self._buffer(buffers[entry.name], part)
        for module in modules.values():
            for name in module._non_persistent_buffers_set:
                module._buffers[name] = module._buffers[name].to(device)

    def _parameter(self, owned: nn.Parameter, part: _Part) -> nn.Parameter:
        memory, values = part.of(owned.detach())
        parameter = nn.Parameter(memory)
        parameter.grad, gradients = part.of(owned.grad)
        _extend(self._taken, values)
        _extend(self._added, [(theirs, mine) for mine, theirs in gradients])
        self._gradients += [parameter.grad] if gradients else []
        return parameter

    def _buffer(self, owned: Tensor, part: _Part) -> Tensor:
        memory, values = part.of(owned)
        _extend(self._taken, values)
        _extend(self._written, [(theirs, mine) for mine, theirs in values])
        return memory

    @torch.no_grad()
    def begin(self) -> None:
        """Bring what is copied up to date."""
        if self._taken[0]:
            torch._foreach_copy_(*self._taken)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the owner the gradients and running statistics of what is copied."""
        if self._added[0]:
            torch._foreach_add_(*self._added)
            torch._foreach_zero_(self._gradients)
        if self._written[0]:
            torch._foreach_copy_(*self._written)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) of any S -> (B, classes)."""
        return self.model(resized(images, self.resolution))


class _Part:
    """The part of an owner's tensor that a candidate's is.

    Raises:
        ValueError: the candidate's is larger, or of another structure.
    """

    def __init__(self, entry: Entry, owned: Entry) -> None:
        ours, theirs = significant(entry.axes), significant(owned.axes)
        self._shape, self._sizes = entry.shape, [axis.size for axis in theirs]
        self._flat = [axis.size for axis in ours]
        axes = [pieces(a, b) for a, b in zip(ours, theirs, strict=True)]
        self._views = [([f for f, _ in part], [g for _, g in part]) for part in itertools.product(*axes)]

    def of(self, owned: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The candidate's tensor in the owner's memory where one view can be it; else a tensor of zeros, and all pairs
        of (a part of it, the same part of the owner's)."""
        whole = owned.view(self._sizes)
        if len(self._views) == 1:
            try:
                return _seen(whole, self._views[0][1]).view(self._shape), []
            except RuntimeError:  # the strides do not allow this shape
                pass
        copy = torch.zeros(self._flat, dtype=owned.dtype, device=owned.device)
        return copy.view(self._shape), [(_seen(copy, mine), _seen(whole, theirs)) for mine, theirs in self._views]


def _seen(tensor: Tensor, views: Sequence[View]) -> Tensor:
    for dim in reversed(range(len(views))):
        tensor = views[dim](tensor, dim)
    return tensor


def _extend(lists: tuple[list[Tensor], list[Tensor]], pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for first, second in pairs:
        lists[0].append(first)
        lists[1].append(second)


def resized(images: Tensor, resolution: int) -> Tensor:
    """Images (B, 3, S, S) at S = `resolution`."""
    if images.shape[-1] == resolution:
        return images
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)


# The supernet


class Supernet:
    """Shared weights of all candidates between `smallest` and `largest`.

    draw: a generator -> a random candidate. The weights are `owner`'s, untrained at first.
    """

    def __init__(
        self, owner: Arch, smallest: Arch, largest: Arch, draw: Callable[[np.random.Generator], Arch], seed: int = 0
    ) -> None:
        random_seed(seed)
        self.arch, self.smallest, self.largest = owner, smallest, largest
        self.owner = FAMILIES[owner.family].build(owner)
        self._entries = {entry.name: entry for entry in width_table(self.owner).entries}
        self._draw, self._random = draw, np.random.default_rng(seed)
        self.to("cpu")

    @classmethod
    def among(cls, archs: Sequence[Arch], seed: int = 0) -> Self:
        """A supernet of some networks; the smallest and the largest are those of fewest and most MACs."""
        ordered = sorted(archs, key=lambda arch: table(arch).macs())
        return cls(maximum(archs), ordered[0], ordered[-1], lambda rng: archs[rng.integers(len(archs))], seed)

    @classmethod
    def over(cls, family: str, num_classes: int, resolution: int | None = None, seed: int = 0) -> Self:
        """A supernet of a family's whole search space, each network at its own resolution or all at one.

        Raises:
            UserError: a resolution that the family cannot take.
        """

        def decode(params: Mapping[str, int]) -> Arch:
            arch = FAMILIES[family].space.decode(params, num_classes)
            try:
                return arch if resolution is None else arch.at(resolution)
            except ArchError as error:
                raise UserError(f"no supernet of {family} at {resolution} pixels: {error}") from None

        smallest, largest = (_extreme(family, decode, sign) for sign in (-1, 1))
        return cls(
            maximum([decode(params) for params in _cover(family, largest)]),
            decode(smallest),
            decode(largest),
            lambda rng: decode(random_params(rng)),
            seed,
        )

    def to(self, device: str | torch.device) -> None:
        """Move the weights."""
        self.owner.to(device)
        for parameter in self.owner.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._kept: dict[Arch, Candidate] = {}

    @property
    def device(self) -> torch.device:
        return next(self.owner.parameters()).device

    def candidate(self, arch: Arch) -> Candidate:
        """A network on the shared weights, gradients and running statistics.

        Raises:
            UserError: it has a part or a width that the owner has not.
        """
        if arch in self._kept:
            return self._kept[arch]
        found = Candidate(arch, self.owner, self._entries)
        if arch in (self.smallest, self.largest):
            self._kept[arch] = found
        return found

    def step(self, images: Tensor, labels: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Leave the gradients of one sandwich at the owner's parameters.

        Args:
            parts: in which the images come, for want of memory.

        Returns:
            The largest candidate's loss on the labels, and the others' mean cross-entropy to its output.
        """
        torch._foreach_zero_([parameter.grad for parameter in self.owner.parameters()])
        others = [self.smallest, *(self._draw(self._random) for _ in range(RANDOM))]
        pieces = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        found = [self._sandwich(others, *piece, len(labels)) for piece in pieces]
        loss, other = torch.stack([torch.stack(each) for each in found]).sum(0)
        return loss, other

    def _sandwich(self, others: Sequence[Arch], images: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Losses of some of a step's `total` images, weighted by their share."""
        share = len(labels) / total
        logits, loss = self._learn(
            self.largest,
            images,
            lambda logits: share * F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING),
        )
        wanted = logits.softmax(1)
        losses = [
            self._learn(arch, images, lambda logits: share * F.cross_entropy(logits, wanted))[1] for arch in others
        ]
        return loss, torch.stack(losses).mean()

    def _step_within_memory(self, images: Tensor, labels: Tensor) -> Tensor:
        """As `step`; where memory does not suffice its images come in twice as many parts, from then on. The largest
        candidate's loss."""
        while True:
            try:
                return self.step(images, labels, min(self._parts, len(labels) // 2))[0]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            self._parts *= 2
            if len(labels) // self._parts < 2:
                raise TrainingError("the supernet ran out of memory with two images: lower --resolution")
            self._kept.clear()  # their gradients may be half added
            at_once = -(-len(labels) // self._parts)
            _log.warning("out of memory: the supernet goes on with %d images at a time", at_once)

    def _learn(self, arch: Arch, images: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        candidate = self.candidate(arch)
        candidate.model.train()
        candidate.begin()
        logits = candidate(images)
        value = loss(logits)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
            value.backward()
        candidate.finish()
        return logits.detach(), value.detach()

    def train(
        self,
        loader: Iterable[Batch],
        images: int,
        lr: float,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int, float], None] | None = None,
    ) -> None:
        """Train on `images` images, rounded up to whole batches, with AdamW, warm-up, cosine and clipped gradients.

        Args:
            lr: the highest learning rate.
            progress: called after each update with images done, images in all, and the largest candidate's loss.

        Raises:
            TrainingError: the loss is no longer finite, or there is no memory for two images. UserError: no batch holds
                two images.
        """
        random_seed(seed)
        self._parts = 1
        self._random = np.random.default_rng(seed)
        self.to(device)
        optimizer = create_optimizer_v2(self.owner, "adamw", lr=lr, weight_decay=WEIGHT_DECAY)
        schedule = CosineLRScheduler(
            optimizer, t_initial=images, t_in_epochs=False, warmup_t=math.ceil(WARMUP * images), warmup_lr_init=lr / 10
        )
        for done, (inputs, labels) in batches_for(loader, images):
            schedule.step_update(done)
            inputs = inputs.to(self.device, memory_format=torch.channels_last)
            value = self._step_within_memory(inputs, labels.to(self.device)).item()
            if not math.isfinite(value):
                epoch = 1 + done // len(loader.dataset) if hasattr(loader, "dataset") else 1
                raise TrainingError(f"the supernet's loss is {value} after {done:,} images", epoch)
            nn.utils.clip_grad_norm_(self.owner.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            if progress is not None:
                progress(min(done + len(labels), images), images, value)

    def evaluate(self, arch: Arch, calibration: Iterable[Batch], loader: Iterable[Batch]) -> Accuracy:
        """Accuracy of a candidate whose BatchNorm statistics are the means over `calibration`'s batches.

        The owner is left as it is. Images are brought to the candidate's resolution.

        Raises:
            UserError: it is no candidate of this supernet.
        """
        candidate = Candidate(arch, self.owner, self._entries, own_statistics=True)
        candidate.begin()
        candidate.model.eval()
        for module in candidate.model.modules():
            if isinstance(module, CALIBRATED):
                module.reset_running_stats()
                module.momentum = None
                module.train()
        with torch.no_grad():
            for images, _ in calibration:
                candidate(images.to(self.device, memory_format=torch.channels_last))
        batches = ((resized(images, arch.resolution), labels) for images, labels in loader)
        return evaluate(candidate.model, batches, self.device)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, with the owner's Arch."""
        replace_file(path, save(self.owner.state_dict(), {"arch": self.arch.to_json()}))

    def load(self, path: Path) -> None:
        """Read weights that `save` wrote.

        Raises:
            UserError: not such a file, or weights of another supernet.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            weights = load_file(path, str(self.device))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        if metadata.get("arch") != self.arch.to_json():
            raise UserError(f"{path}: not the weights of this supernet: its networks are others")
        self.owner.load_state_dict(weights)


def _extreme(family: str, decode: Callable[[Mapping[str, int]], Arch], sign: int) -> dict[str, int]:
    """Parameters of the network of most (sign 1) or fewest (-1) MACs, one parameter after the other: all but the mix
    and the form are in order of size, or the reverse."""
    params = dict.fromkeys(PARAMETERS, LEVELS - 1 if sign > 0 else 0)
    for name in FAMILIES[family].space.options:
        levels = range(LEVELS) if name.startswith(("mix", "form")) else (0, LEVELS - 1)
        sizes = {level: sign * table(decode(params | {name: level})).macs() for level in levels}
        if max(sizes.values()) > sizes[params[name]]:
            params[name] = max(sizes, key=sizes.get)
    return params


def _cover(family: str, largest: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Parameters of networks that together are as wide as any of the space: the largest with one stage's parameter
    changed, in every form and at every query width."""
    options = FAMILIES[family].space.options
    levels = {name: [-(-i * LEVELS // len(values)) for i in range(len(values))] for name, values in options.items()}
    axes = [name for name in options if name.split("_")[0] in PER_STAGE and not name.startswith("keep")]
    for form, qk in itertools.product(levels.get("form", [0]), levels.get("qk", [0])):
        for axis in axes:
            for level in levels[axis]:
                yield {**largest, "form": form, "qk": qk, axis: level}
