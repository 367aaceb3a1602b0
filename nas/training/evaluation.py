"""The accuracy of a network on images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

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
@torch.no_grad()
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
    model.to(device).eval()
    hits: list[bool] = []
    loss = 0.0
    at_once = sys.maxsize
    for batch in loader:
        while (found := _judged(model, batch, at_once, device)) is None:
            at_once = min(at_once, len(batch[1])) // 2
            if not at_once:
                raise TrainingError("out of memory with one image to judge: lower --resolution")
            empty_cache(device)
            say(f"out of memory: judging goes on with {at_once} images at a time")
        hits += found[0]
        loss += found[1]
    return Accuracy(sum(hits), len(hits), loss / len(hits), tuple(hits))


def _judged(
    model: nn.Module, batch: Batch, at_once: int, device: str | torch.device
) -> tuple[list[bool], float] | None:
    """Which answers are correct and the sum of losses in a batch; None where memory did not suffice."""
    hits: list[bool] = []
    loss = 0.0
    try:
        for part in zip(*(values.split(at_once) for values in batch), strict=True):
            images, labels = to_device(device, *part)
            logits = model(images)
            hits += (logits.argmax(1) == labels).tolist()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    return hits, loss
