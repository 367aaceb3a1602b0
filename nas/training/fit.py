"""A short training without a recipe of its own, as pruning recovers a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from timm.utils import random_seed
from torch import nn

from nas.data.batches import Batch
from nas.errors import TrainingError, UserError
from nas.training.device import failing_as
from nas.training.recipes import BatchNorm, Recipe
from nas.training.updater import Updater, to_training

BRIEF = Recipe("brief", "`fit`", 1, 1, lr=1e-3, lr_batch=1, weight_decay=0.05, distillation="soft")


@failing_as("training")
def fit(
    model: nn.Module,
    loader: Iterable[Batch],
    images: int,
    lr: float,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    batch_norm: BatchNorm = "train",
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
        batch_norm: as `Recipe.batch_norm`.
        progress: called after each update with images done, images in all, and the update's loss.

    Raises:
        TrainingError: the loss is no longer finite, there is no memory for two images, or PyTorch fails.
        UserError: no batch holds two images.
    """
    random_seed(seed)
    recipe = replace(BRIEF, lr=lr, warmup_lr=lr / 10, batch_norm=batch_norm)
    to_training(model.to(device), recipe)
    updater = Updater(model, recipe, images, device, teacher=teacher)
    for done, batch in batches_for(loader, images):
        value = updater.step(done, [batch]).item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} after {done:,} images: lower the learning rate ({lr:g})")
        if progress is not None:
            progress(min(done + len(batch[1]), images), images, value)
    model.eval()


def batches_for(loader: Iterable[Batch], images: int) -> Iterable[tuple[int, Batch]]:
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
