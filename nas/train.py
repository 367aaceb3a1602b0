"""Training and evaluation on batches of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed
from torch import Tensor, nn

from nas.data import Batch
from nas.errors import UserError

LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
WARMUP = 0.05
"""Share of the images over which the learning rate rises from a tenth to all of it."""
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` images; `loss` is their mean cross-entropy in nats."""

    correct: int
    total: int
    loss: float

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the top-1 accuracy, in percent."""
        found = binomtest(self.correct, self.total).proportion_ci(method="wilson")
        return 100 * float(found.low), 100 * float(found.high)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Batch], device: str | torch.device = "cpu") -> Accuracy:
    """Accuracy over one pass of `loader`; leaves the model on `device`, in eval mode."""
    model.to(device).eval()
    correct = total = 0
    loss = 0.0
    for images, labels in loader:
        images, labels = _to(device, images, labels)
        logits = model(images)
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    return Accuracy(correct, total, loss / total)


def fit(
    model: nn.Module,
    loader: Iterable[Batch],
    images: int,
    lr: float,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train `model` in place on `images` images, rounded up to whole batches; an epoch is len(loader.dataset).

    AdamW (weights of norms and biases do not decay), a cosine with a short warm-up, smoothed labels, clipped
    gradients. With a teacher the loss is that of `distillation_loss`. Batches of one image are left out, as BatchNorm
    cannot train on them. The global random generators are seeded: on a CPU, an equal loader, seed and number of
    threads give equal weights. Leaves the model on `device`, in eval mode; the teacher too.

    Args:
        model: (B, 3, R, R) -> (B, classes) logits in training mode; not a pair of heads.
        lr: the highest learning rate.
        progress: called after each update with images done, images in all, and the update's loss.

    Raises:
        UserError: the loss is no longer finite, or no batch holds two images.
    """
    random_seed(seed)
    model.to(device).train()
    if teacher is not None:
        teacher.to(device).eval()
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = CosineLRScheduler(
        optimizer, t_initial=images, t_in_epochs=False, warmup_t=math.ceil(WARMUP * images), warmup_lr_init=lr / 10
    )
    for done, (inputs, labels) in _batches(loader, images):
        schedule.step_update(done)
        inputs, labels = _to(device, inputs, labels)
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(inputs)
            loss = distillation_loss(loss, logits, wanted)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} after {done:,} images: lower the learning rate ({lr:g})")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        if progress is not None:
            progress(min(done + len(labels), images), images, value)
    model.eval()


def distillation_loss(label_loss: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean of the label loss and T^2 KL(softmax(wanted / T) || softmax(logits / T)), logits (B, classes).

    Soft targets at T = `TEMPERATURE`, whose gradients T^2 brings to the label loss's scale: Hinton, Vinyals and Dean,
    Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, dim=1),
        F.log_softmax(wanted / TEMPERATURE, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (label_loss + TEMPERATURE**2 * soft) / 2


def _batches(loader: Iterable[Batch], images: int) -> Iterable[tuple[int, Batch]]:
    """(images before it, batch) for batches of two images or more, pass after pass, until `images` have been given."""
    done = 0
    while done < images:
        before = done
        for batch in loader:
            if len(batch[1]) > 1:
                yield done, batch
                done += len(batch[1])
                if done >= images:
                    return
        if done == before:
            raise UserError("no batch holds two images that can be decoded: BatchNorm needs two, raise the batch size")


def _to(device: str | torch.device, images: Tensor, labels: Tensor) -> Batch:
    """On `device`, images in channels_last; convolutions keep it: EfficientViT-M4 trains 1.1x as fast on a CPU."""
    return images.to(device, memory_format=torch.channels_last), labels.to(device)
