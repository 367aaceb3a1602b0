"""A training by a recipe, which can be stopped at any update and goes on."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from torch import Tensor, nn
from torch import distributed as dist

from nas.data.batches import loader
from nas.data.images import Images
from nas.errors import TrainingError, UserError
from nas.files import replace_file
from nas.training.device import failing_as, out_of_memory, to_stderr
from nas.training.lessons import FeatureTeacher
from nas.training.processes import agreed, ranks
from nas.training.recipes import Recipe
from nas.training.updater import Updater, to_training
from search_spaces import Arch
from search_spaces.gates import set_drop_path
from search_spaces.network import set_keep_progress

WITHIN_S = 180.0
"""Seconds between two checkpoints within an epoch."""
CHECK_EVERY = 10
"""Updates between two looks at the loss on an accelerator, each of which waits for it."""


@dataclass
class Within:
    """How far the epoch that is begun has come."""

    updates: int = 0
    """Updates done."""
    batches: int = 0
    """Batches taken from the loader."""
    images: int = 0
    """Images of this process."""
    loss: float = 0.0
    """Sum over the updates."""
    seconds: float = 0.0


class Training:
    """A network being trained by a recipe, in place; it can be stopped at any update and goes on.

    Each update seeds the global random generators from `seed` and its number, so on a CPU a training that was stopped,
    or took turns with others, ends with the weights of one that was not (equal data and threads). Incomplete updates
    at an epoch's end are left out. In several processes (an initialised `torch.distributed`) gradients are averaged
    over them, BatchNorm's statistics at each epoch's end, and rank 0 writes.

    epoch: epochs done. history: a row for each: epoch, loss (mean over updates), lr (last), images_per_s, seconds, and
    what `validate` adds. judged: whether the last row has that. within: of the epoch that is begun, if one is. images,
    updates: images an update, updates an epoch. count: images in all, those without labels too.
    """

    @failing_as("preparing the training")
    def __init__(
        self,
        model: nn.Module,
        data: Images,
        recipe: Recipe,
        *,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "fp32",
        teacher: nn.Module | FeatureTeacher | None = None,
        checkpoint: Path | None = None,
        workers: int = 0,
        accumulate: int = 1,
        compiled: bool = False,
        validate: Callable[[nn.Module], Mapping[str, Any]] | None = None,
        say: Callable[[str], None] = to_stderr,
    ) -> None:
        """Goes on from `checkpoint` if there is one.

        Args:
            model: (B, 3, R, R) -> (B, classes).
            data: the training images, augmented as the recipe wants.
            precision: fp32, or bf16 or fp16 by autocast.
            teacher: (B, 3, R, R) -> (B, classes), what the recipe's distillation learns from; or one of features.
            checkpoint: the file that holds the training after each epoch; beside it, the one that holds it within a
                long one.
            workers: processes that decode images.
            accumulate: parts that an update's images come in.
            compiled: use torch.compile.
            validate: called with `network` after each epoch; its findings enter the history.
            say: told of smaller batches.

        Raises:
            UserError: a checkpoint of another training, or fewer than two images an update.
        """
        self.again = partial(
            Training,
            model,
            data,
            recipe,
            seed=seed,
            precision=precision,
            teacher=teacher,
            checkpoint=checkpoint,
            accumulate=accumulate,
            compiled=compiled,
        )
        """Prepares it in another process."""
        self.model, self.seed, self._checkpoint = model.to(device), seed, checkpoint
        self._validate, self._accumulate = validate, accumulate
        self.epoch, self.judged, self.within = 0, True, Within()
        self.history: list[dict[str, Any]] = []
        self.rank, world = ranks()
        self._lessons, logits = None, None
        if isinstance(teacher, FeatureTeacher):
            if world > 1 or compiled or recipe.mixup or recipe.cutmix:
                raise UserError(
                    "--distillation features needs one process, no --compile, and a recipe without mixup and cutmix, "
                    "such as finetune"
                )
            self._lessons = teacher.lessons(model, data, device, workers)
            data = self._lessons.images
        else:
            logits = teacher
        batch = min(recipe.batch_size, len(data)) // (world * accumulate)
        if batch < 2:
            raise UserError(
                f"batches of {batch} images ({recipe.batch_size} of {len(data)} in {world * accumulate} parts): two or "
                "more are needed, BatchNorm cannot train on one"
            )
        self.images = batch * world * accumulate
        if self.images != recipe.batch_size:
            say(f"updates of {self.images} images, not {recipe.batch_size}: the learning rate is scaled with them")
        self.recipe = recipe = replace(recipe, batch_size=self.images)
        self.count = len(data)
        self.updates = self.count // self.images
        self.loader = loader(
            data,
            batch,
            shuffle=True,
            seed=seed,
            workers=workers,
            rank=self.rank,
            world_size=world,
            repeats=recipe.repeats,
        )
        self._agree = {
            "recipe": json.loads(json.dumps(asdict(recipe))),
            "seed": seed,
            "network": _digest(model),
            "images": len(data),
            "labels": hashlib.sha256(np.asarray(data.labels).tobytes()).hexdigest()[:16],
            "at_once": batch * world,
            "precision": precision,
            "teacher": teacher is not None,
        }
        self._updater = Updater(
            model,
            recipe,
            self.updates * recipe.epochs,
            device,
            precision,
            logits,
            compiled,
            say,
            self._lessons,
        )
        set_drop_path(model, recipe.drop_path)
        self._ema = ModelEmaV3(model, recipe.ema, use_warmup=True) if recipe.ema else None
        self._first = copy.deepcopy(model.state_dict()) if recipe.blend < 1 else None
        self.restore()

    @property
    def network(self) -> nn.Module:
        """What to evaluate and save: the moving average of the weights where the recipe has one, and its blend with
        those that the training began with."""
        learnt: nn.Module = self._ema.module if self._ema is not None else self.model
        if self._first is None:
            return learnt
        blended, first = copy.deepcopy(learnt), self._first
        for name, value in blended.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.lerp(first[name].to(value), value, self.recipe.blend))
        return blended

    def run(
        self,
        until: int | None = None,
        progress: Callable[[int, int, float], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train up to epoch `until`, all without it, with a checkpoint after each and every WITHIN_S.

        Args:
            progress: called after each update with images done, images of all epochs, and the last known loss.
            stop: asked before each update and before an epoch is judged.

        Raises:
            KeyboardInterrupt: `stop` said so; the checkpoints hold all that is done.
            TrainingError: the loss is no longer finite, there is no memory for two images, or PyTorch fails; the
                checkpoint is that of the epoch before.
            DiskFull: no room for the checkpoint; that of the epoch before is kept.
            UserError: the checkpoint cannot be written, or the images are broken.
        """
        last = self.recipe.epochs if until is None else min(until, self.recipe.epochs)
        if not self.judged:
            self._judge(stop)
        while self.epoch < last:
            with failing_as(f"training in epoch {self.epoch + 1}", self.epoch + 1):
                self.history.append(self._train_epoch(progress, stop))
            self.epoch += 1
            self.judged, self.within = False, Within()
            self._judge(stop)

    def _judge(self, stop: Callable[[], bool]) -> None:
        """Validate the epoch that is done, and keep it even where that fails."""
        try:
            if self._validate is not None:
                if stop():
                    raise KeyboardInterrupt
                self.history[-1] |= self._validate(self.network)
            self.judged = True
        finally:
            self._save()

    def _train_epoch(
        self, progress: Callable[[int, int, float], None] | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        at, begun = self.within, time.monotonic() - self.within.seconds
        saved = time.monotonic()
        if self._lessons is not None:
            self._lessons.begin(fresh=self.recipe.batch_norm == "frozen" and not (self.epoch or at.updates))
        self.loader.set_epoch(self.epoch, at.batches)
        to_training(self.model, self.recipe)
        device = next(self.model.parameters()).device
        look = 1 if device.type == "cpu" else CHECK_EVERY
        total, value = torch.tensor(at.loss, device=device), 0.0
        batches = (batch for batch in self.loader if len(batch[1]) > 1)
        for i in range(at.updates, self.updates):
            if stop():
                self._save_within(total, begun)
                raise KeyboardInterrupt
            if time.monotonic() - saved > WITHIN_S:
                self._save_within(total, begun)
                saved = time.monotonic()
            parts = list(itertools.islice(batches, self._accumulate))
            if not parts:
                if dist.is_initialized():
                    raise UserError(f"process {self.rank} ran out of images that can be decoded: use fewer processes")
                break
            update = self.epoch * self.updates + i
            self._reseed(update)
            if self.recipe.keep_warmup is not None:
                start, end = (share * self.updates * self.recipe.epochs for share in self.recipe.keep_warmup)
                set_keep_progress(self.model, (update - start) / (end - start))
            total += self._updater.step(update, parts)
            if self._ema is not None:
                self._ema.update(self.model, update + 1)
            at.updates, at.batches = i + 1, self.loader.taken
            at.images += sum(len(labels) for _, labels in parts)
            if at.updates % look == 0 or at.updates == self.updates:
                value = self._finite(total) / at.updates
            if progress is not None:
                progress((update + 1) * self.images, self.updates * self.recipe.epochs * self.images, value)
        if not at.updates:
            raise UserError("no batch holds two images that can be decoded: BatchNorm needs two, raise the batch size")
        if dist.is_initialized():
            for network in (self.model, self._ema.module) if self._ema is not None else (self.model,):
                distribute_bn(network, dist.get_world_size(), reduce=True)
        loss = self._finite(total) / at.updates
        if not all(torch.stack([p.detach().sum().isfinite() for p in self.model.parameters()]).tolist()):
            raise self._diverged("weights are")
        seconds = time.monotonic() - begun
        return {
            "epoch": self.epoch + 1,
            "loss": loss,
            "lr": self._updater.lr,
            "images_per_s": at.images * ranks()[1] / seconds,
            "seconds": seconds,
        }

    def _finite(self, total: Tensor) -> float:
        """Of a sum of losses, its mean over processes."""
        if dist.is_initialized():
            total = total / dist.get_world_size()
            dist.all_reduce(total)
        value = total.item()
        if not math.isfinite(value):
            raise self._diverged("loss is")
        return value

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"the {what} no longer finite in epoch {self.epoch + 1}: lower the learning rate ({self.recipe.peak_lr:g})",
            self.epoch + 1,
        )

    def _reseed(self, update: int) -> None:
        """Before each update, so that no state of a generator has to be kept."""
        random_seed(int(np.random.SeedSequence([self.seed, update, self.rank]).generate_state(1)[0]))

    def _save_within(self, total: Tensor, begun: float) -> None:
        """Keep what is done of an epoch, unless the loss has gone where no later checkpoint could follow."""
        loss = total.item()
        if self.within.updates and math.isfinite(loss):
            self.within.loss, self.within.seconds = loss, time.monotonic() - begun
            self._save("-within")

    def _save(self, suffix: str = "") -> None:
        if self._checkpoint is None or self.rank:
            return
        content = io.BytesIO()
        torch.save(
            {
                "agree": self._agree,
                "epoch": self.epoch,
                "history": self.history,
                "judged": self.judged,
                "within": asdict(self.within),
                "model": self.model.state_dict(),
                "ema": self._ema.module.state_dict() if self._ema is not None else None,
                "first": self._first,
                "updater": self._updater.state(),
            },
            content,
        )
        try:
            self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._file(suffix), content.getvalue())
            if not suffix:
                self._file("-within").unlink(missing_ok=True)
        except OSError as error:
            left = f"; epoch {self.epoch - (not suffix)} is kept, and the same command goes on from there"
            raise UserError(
                f"the checkpoint of epoch {self.epoch + bool(suffix)} cannot be written to {self._checkpoint}: "
                f"{error.strerror}" + left * self._checkpoint.is_file()
            ) from None

    def _file(self, suffix: str) -> Path:
        assert self._checkpoint is not None
        return self._checkpoint.with_name(self._checkpoint.name + suffix)

    def restore(self, within: bool = True) -> None:
        """Go back to the last checkpoint, if there is one; without `within`, to the last at an epoch's end.

        Raises:
            UserError: it cannot be read, or is of another training.
        """
        self.within = Within()
        for suffix in ("", "-within") if within else ("",):
            self._read(suffix)

    def _read(self, suffix: str) -> None:
        state = None
        if self._checkpoint is not None and self.rank == 0 and self._file(suffix).is_file():
            with self._reading(suffix):
                state = torch.load(self._file(suffix), map_location="cpu", weights_only=True)
        state = agreed(state)
        if state is None:
            return
        with self._reading(suffix):
            theirs = state["agree"]
            later = {field.name: field.default for field in fields(Recipe) if field.name not in theirs["recipe"]}
            theirs["recipe"] |= json.loads(json.dumps(later))  # fields that are younger than the checkpoint
            if "blend" in later:  # it ends as it was begun
                self.recipe = replace(self.recipe, blend=Recipe.blend)
                self._agree["recipe"]["blend"] = Recipe.blend
            theirs.setdefault("at_once", theirs.get("batch", 0) * ranks()[1])  # of an older vitnas: a process's own
            for key, value in self._agree.items():
                if theirs.get(key) != value:
                    raise UserError(
                        f"{self._file(suffix)} is of another training ({key} differs): remove it, or keep it elsewhere"
                    )
            if suffix and state["epoch"] != self.epoch:
                return  # of an epoch that has been finished since
            self.model.load_state_dict(state["model"])
            if self._ema is not None:
                self._ema.module.load_state_dict(state["ema"])
            self._first = state.get("first")
            self._updater.load(state["updater"])
            self.epoch, self.history, self.judged = state["epoch"], state["history"], state["judged"]
            self.within = Within(**state.get("within", {}))

    @contextmanager
    def _reading(self, suffix: str) -> Iterator[None]:
        """Whatever a damaged or foreign file raises, with or without torch's help, is told in one line."""
        try:
            yield
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"{self._file(suffix)} is damaged or no checkpoint of vitnas's: remove it to start again"
            ) from None


def _digest(model: nn.Module) -> str:
    """What kind of network this is: its Arch, or its tensors' names and shapes."""
    arch: Arch | None = getattr(model, "arch", None)
    if arch is not None:
        return arch.digest()
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()
