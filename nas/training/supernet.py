"""Weight sharing: one network owns the weights of a whole space, and every candidate runs on parts of its memory.

A candidate takes the first units of every width, the first blocks of every stage, and the corner of every bias table.
Where that is a strided view of the owner's tensor, the candidate's parameter is that view, its gradient the same view
of the owner's gradient, its running statistics the owner's own. Where it is not (query, key and value rows, heads of
fewer units), it is a copy, refreshed before and added or written back after: no gradient and no BatchNorm update is
lost. (Views that autograd goes through, handed to functional_call, cost 1.4 to 2.7 times the network alone, these 1.06
to 1.14: every slice's backward pass fills a tensor of the owner's size.)

Training follows the sandwich rule: the largest candidate learns from the labels, the smallest and two random ones from
its soft output (Yu and Huang, ICCV 2019; Yu et al., BigNAS, ECCV 2020), and BatchNorm is calibrated again for each
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
from nas.training.candidate import Candidate, resized
from nas.training.device import out_of_memory
from nas.training.evaluation import Accuracy, evaluate
from nas.training.fit import batches_for
from nas.training.statistics import take_statistics
from search_spaces import Arch, ArchError, table
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS, PER_STAGE, random_params
from search_spaces.widths import width_table

_log = logging.getLogger(__name__)
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
WARMUP = 0.05
RANDOM = 2
"""Random candidates a step."""


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
        return cls(maximum(archs), ordered[0], ordered[-1], lambda rng: archs[int(rng.integers(len(archs)))], seed)

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
        torch._foreach_zero_([parameter.grad for parameter in self.owner.parameters() if parameter.grad is not None])
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
        fitting = ((resized(images, arch.resolution), labels) for images, labels in calibration)
        take_statistics(candidate.model, fitting, self.device)
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
            params[name] = max(sizes, key=lambda level: sizes[level])
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
