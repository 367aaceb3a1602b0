"""The accuracy of a network on images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.data.batches import Batch
from nas.errors import TrainingError
from nas.intervals import of_share
from nas.training.device import empty_cache, failing_as, out_of_memory, to_device, to_stderr


@dataclass(frozen=True)
class Accuracy:
    """How many of some images a network classifies correctly."""

    correct: int
    total: int
    loss: float
    """Mean cross-entropy, nats."""
    hits: tuple[bool, ...] = field(default=(), repr=False)
    """Whether each image was correct, in order."""

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the top-1 accuracy, in percent."""
        found = of_share(self.top1, self.total)
        return found.low, found.high


@failing_as("judging")
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = to_stderr,
) -> Accuracy:
    """Accuracy over one pass of `loader`; leaves the model on `device`, in eval mode.

    Where memory does not suffice the batches are halved, from then on, and `say` is told.

    Raises:
        TrainingError: there is no memory for one image, or PyTorch fails.
    """
    hits: list[bool] = []
    loss = 0.0
    for logits, labels in each_batch(model, loader, device, say):
        hits += (logits.argmax(1) == labels).tolist()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    return Accuracy(sum(hits), len(hits), loss / len(hits), tuple(hits))


@torch.no_grad()
def each_batch(
    model: nn.Module,
    loader: Iterable[Batch],
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = to_stderr,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The network's logits (B, classes) and the labels (B,) of each batch, on `device`, in eval mode; memory as in
    `evaluate`."""
    model.to(device).eval()
    at_once = sys.maxsize
    for images, labels in loader:
        start = 0
        while start < len(labels):
            part = slice(start, start + at_once)
            logits = truth = None
            try:
                pixels, truth = to_device(device, images[part], labels[part])
                logits = model(pixels)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if logits is None or truth is None:
                at_once = min(at_once, len(labels)) // 2
                if not at_once:
                    raise TrainingError("out of memory with one image to judge: lower --resolution")
                empty_cache(device)
                say(f"out of memory: judging goes on with {at_once} images at a time")
                continue
            yield logits, truth
            start += len(truth)
