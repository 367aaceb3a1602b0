"""One update of a network in training: loss, gradients, optimizer and schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch import distributed as dist

from nas.data.batches import Batch
from nas.errors import TrainingError, UserError
from nas.training.device import empty_cache, out_of_memory, to_device, to_stderr
from nas.training.lessons import UNLABELLED, Lessons
from nas.training.recipes import Recipe
from search_spaces.network import heads_of

logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # a schedule of one update needs no warning

TEMPERATURE = 2.0
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Updater:
    """Loss, optimizer and schedule of a network in training: one update at a time.

    lessons: the labels are their rows. total: where the schedule ends, in the unit of `step`'s first argument.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        total: int,
        device: str | torch.device,
        precision: str = "fp32",
        teacher: nn.Module | None = None,
        compiled: bool = False,
        say: Callable[[str], None] = to_stderr,
        lessons: Lessons | None = None,
    ) -> None:
        self._model, self._recipe, self._teacher, self._say = model, recipe, teacher, say
        self._lessons = lessons
        self._device = torch.device(device)
        if teacher is not None:
            teacher.to(device).eval()
        self._mixup, self._smoothing = None, recipe.label_smoothing
        if recipe.mixup or recipe.cutmix:
            classes = getattr(model, "arch", model).num_classes
            self._mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes
            )
            self._smoothing = 0.0
        lr = recipe.peak_lr
        self._optimizer = create_optimizer_v2(
            model, "adamw", lr=lr, weight_decay=recipe.weight_decay, param_group_fn=_groups(recipe.weight_decay)
        )
        if lessons is not None:
            self._optimizer.add_param_group({"params": [*lessons.match.parameters()]})
        self._schedule = CosineLRScheduler(
            self._optimizer,
            t_initial=total,
            t_in_epochs=False,
            lr_min=min(recipe.min_lr, lr),
            warmup_t=min(math.ceil(recipe.warmup * total), total - 1),
            warmup_lr_init=min(recipe.warmup_lr, lr),
        )
        self._dtype = PRECISIONS[precision]
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._parallel = None
        if dist.is_initialized():
            self._parallel = nn.parallel.DistributedDataParallel(
                model, device_ids=[self._device] if self._device.type == "cuda" else None
            )
        self._forward: nn.Module = self._parallel or model
        if compiled:
            self._forward = cast(nn.Module, torch.compile(self._forward))
        self._parts = 1

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, at: int, batches: Sequence[Batch]) -> Tensor:
        """One update on all the batches' images together; returns their mean loss, on the device.

        Where memory does not suffice the batches are halved, from then on, and their gradients added up.
        """
        self._schedule.step_update(at)
        while (loss := self._gradients(batches)) is None:
            largest = max(len(labels) for _, labels in batches)
            if self._parallel is not None:
                raise UserError(f"out of memory with {largest // self._parts} images a process: raise --accumulate")
            if largest // (2 * self._parts) < 2:
                raise TrainingError(f"out of memory with {largest // self._parts} images: lower --resolution")
            self._parts *= 2
            empty_cache(self._device)
            self._say(
                f"out of memory: going on with {largest // self._parts} images at a time, "
                "gradients accumulated to the same update"
                + "; BatchNorm sees the smaller batches"
                * any(norm.training for norm in _batch_norms(self._model))
            )
        self._scaler.unscale_(self._optimizer)
        if self._recipe.clip is not None:
            mode, bound = self._recipe.clip
            dispatch_clip_grad(self._model.parameters(), bound, mode)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss

    def _gradients(self, batches: Sequence[Batch]) -> Tensor | None:
        """Leave the update's gradients at the parameters; None where memory did not suffice."""
        self._optimizer.zero_grad()
        try:
            images = sum(len(labels) for _, labels in batches)
            total = torch.zeros((), device=self._device)
            left = sum(self._parts_of(batch) for batch in batches)
            for batch in batches:
                for x, y in self._prepared(batch):
                    left -= 1
                    waits = self._parallel.no_sync() if self._parallel is not None and left else nullcontext()
                    with waits:
                        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
                            loss = self._loss(x, y) * (len(y) / images)
                        self._scaler.scale(loss).backward()
                    total += loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return None
        return total

    def _parts_of(self, batch: Batch) -> int:
        return min(self._parts, len(batch[1]) // 2)

    def _prepared(self, batch: Batch) -> Iterable[Batch]:
        """A batch on the device, mixed, in parts of two images or more."""
        images, labels = to_device(self._device, *batch)
        if self._mixup is not None:
            even = len(labels) // 2 * 2
            images, labels = self._mixup(images[:even], labels[:even])
        parts = self._parts_of(batch)
        return zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self._lessons is not None:
            return self._loss_of_lessons(self._lessons, images, targets)
        if self._teacher is None:
            return F.cross_entropy(self._forward(images), targets, label_smoothing=self._smoothing)
        heads = [logits.float() for logits in heads_of(self._forward, images)]
        label_loss = F.cross_entropy(heads[0], targets, label_smoothing=self._smoothing)
        with torch.no_grad():
            wanted = self._teacher(images).float()
        if self._recipe.distillation == "soft":
            return distillation_loss(label_loss, heads[-1], wanted)
        return (label_loss + F.cross_entropy(heads[-1], wanted.argmax(1))) / 2

    def _loss_of_lessons(self, lessons: Lessons, images: Tensor, rows: Tensor) -> Tensor:
        """Of the labels that there are, and of the teacher's features."""
        with lessons.watching():
            logits = self._forward(images)
        labels = lessons.labels[rows]
        told = labels != UNLABELLED
        loss = lessons.distance(rows)
        if told.any():
            loss = loss + F.cross_entropy(logits[told], labels[told], label_smoothing=self._smoothing)
        return loss

    def state(self) -> dict[str, Any]:
        found = {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict(), "parts": self._parts}
        return found if self._lessons is None else found | {"match": self._lessons.match.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._parts = state["parts"]
        if self._lessons is not None:
            self._lessons.match.load_state_dict(state["match"])


def to_training(model: nn.Module, recipe: Recipe) -> None:
    """Set training mode, with BatchNorm as the recipe wants it."""
    model.train()
    if recipe.batch_norm == "frozen":
        for norm in _batch_norms(model):
            norm.eval()


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


def _groups(weight_decay: float) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """Parameter groups: only what is called weight and is no vector decays, so no bias tables, tokens or positions."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        free = [name for name, _ in model.named_parameters() if name.split(".")[-1] != "weight"]
        return list(param_groups_weight_decay(model, weight_decay, no_weight_decay_list=free))

    return groups


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
