"""Training and evaluation on batches of images."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, random_seed
from torch import Tensor, nn
from torch import distributed as dist

from nas.data.batches import Batch, loader
from nas.data.images import Images
from nas.errors import TrainingError, UserError
from nas.files import replace_file
from nas.intervals import of_share
from nas.text import first_line
from nas.training.recipes import Recipe
from search_spaces.gates import set_drop_path
from search_spaces.network import heads_of, set_keep_progress

logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # a schedule of one update needs no warning

TEMPERATURE = 2.0
T = TypeVar("T")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BRIEF = Recipe("brief", "`fit`", 1, 1, lr=1e-3, lr_batch=1, weight_decay=0.05, distillation="soft")
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "std::bad_alloc")
WITHIN_S = 180.0
"""Seconds between two checkpoints within an epoch."""
CHECK_EVERY = 10
"""Updates between two looks at the loss on an accelerator, each of which waits for it."""


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` images; `loss` is their mean cross-entropy in nats. hits: whether each was, in order."""

    correct: int
    total: int
    loss: float
    hits: tuple[bool, ...] = field(default=(), repr=False)

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the top-1 accuracy, in percent."""
        found = of_share(self.top1, self.total)
        return found.low, found.high


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def failing_as(what: str, epoch: int = 0) -> Iterator[None]:
    """Turn what PyTorch raises into a TrainingError of one line; in several processes, which must end together, into a
    UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = f"{what} {'ran out of memory' if out_of_memory(error) else 'failed'}: {first_line(error)}"
        raise (UserError(line) if dist.is_initialized() else TrainingError(line, epoch)) from error


@failing_as("judging")
@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = _to_stderr,
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
            _free(device)
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
            images, labels = _to(device, *part)
            logits = model(images)
            hits += (logits.argmax(1) == labels).tolist()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    return hits, loss


@dataclass
class Within:
    """How far an epoch is. updates: done; batches: taken from the loader; images: of this process; loss: the sum over
    updates."""

    updates: int = 0
    batches: int = 0
    images: int = 0
    loss: float = 0.0
    seconds: float = 0.0


class Training:
    """A network being trained by a recipe, in place; it can be stopped at any update and goes on.

    Each update seeds the global random generators from `seed` and its number, so on a CPU a training that was stopped,
    or took turns with others, ends with the weights of one that was not (equal data and threads). Incomplete updates
    at an epoch's end are left out. In several processes (an initialised `torch.distributed`) gradients are averaged
    over them, BatchNorm's statistics at each epoch's end, and rank 0 writes.

    epoch: epochs done. history: a row for each: epoch, loss (mean over updates), lr (last), images_per_s, seconds, and
    what `validate` adds. judged: whether the last row has that. within: of the epoch that is begun, if one is. images,
    updates: images an update, updates an epoch.
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
        teacher: nn.Module | None = None,
        checkpoint: Path | None = None,
        workers: int = 0,
        accumulate: int = 1,
        compiled: bool = False,
        validate: Callable[[nn.Module], Mapping[str, Any]] | None = None,
        say: Callable[[str], None] = _to_stderr,
    ) -> None:
        """Goes on from `checkpoint` if there is one.

        Args:
            model: (B, 3, R, R) -> (B, classes).
            data: the training images, augmented as the recipe wants.
            precision: fp32, or bf16 or fp16 by autocast.
            teacher: (B, 3, R, R) -> (B, classes), what the recipe's distillation learns from.
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
        self.model, self.seed, self._checkpoint = model.to(device), seed, checkpoint
        self._validate, self._accumulate = validate, accumulate
        self.epoch, self.history, self.judged, self.within = 0, [], True, Within()
        self.rank, world = ranks()
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
        self.updates = len(data) // self.images
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
            "batch": batch,
            "precision": precision,
            "teacher": teacher is not None,
        }
        self._updater = Updater(
            model,
            recipe,
            self.updates * recipe.epochs,
            device,
            precision,
            teacher,
            compiled,
            say,
        )
        set_drop_path(model, recipe.drop_path)
        self._ema = ModelEmaV3(model, recipe.ema, use_warmup=True) if recipe.ema else None
        self.restore()

    @property
    def network(self) -> nn.Module:
        """What to evaluate and save: the moving average of the weights where the recipe has one."""
        return self._ema.module if self._ema is not None else self.model

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
        self.loader.set_epoch(self.epoch, at.batches)
        self.model.train()
        device = next(self.model.parameters()).device
        look = 1 if device.type == "cpu" else CHECK_EVERY
        total, value = torch.tensor(at.loss, device=device), 0.0
        batches = iter(self.loader)
        for i in range(at.updates, self.updates):
            if stop():
                self._save_within(total, begun)
                raise KeyboardInterrupt
            if time.monotonic() - saved > WITHIN_S:
                self._save_within(total, begun)
                saved = time.monotonic()
            parts = [batch for batch in itertools.islice(batches, self._accumulate) if len(batch[1]) > 1]
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
            for network in (self.model, self.network) if self._ema is not None else (self.model,):
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
            for key, value in self._agree.items():
                if state["agree"].get(key) != value:
                    raise UserError(
                        f"{self._file(suffix)} is of another training ({key} differs): remove it, or keep it elsewhere"
                    )
            if suffix and state["epoch"] != self.epoch:
                return  # of an epoch that has been finished since
            self.model.load_state_dict(state["model"])
            if self._ema is not None:
                self._ema.module.load_state_dict(state["ema"])
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
                f"{self._file(suffix)} is damaged or no checkpoint of vitnas's: remove it to begin anew"
            ) from None


class Updater:
    """Loss, optimizer and schedule of a network in training: one update at a time.

    total: where the schedule ends, in the unit of `step`'s first argument.
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
        say: Callable[[str], None] = _to_stderr,
    ) -> None:
        self._model, self._recipe, self._teacher, self._say = model, recipe, teacher, say
        self._device = torch.device(device)
        if teacher is not None:
            teacher.to(device).eval()
        self._mixup, self._smoothing = None, recipe.label_smoothing
        if recipe.mixup or recipe.cutmix:
            classes = model.arch.num_classes if hasattr(model, "arch") else model.num_classes
            self._mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes
            )
            self._smoothing = 0.0
        lr = recipe.peak_lr
        self._optimizer = create_optimizer_v2(
            model, "adamw", lr=lr, weight_decay=recipe.weight_decay, param_group_fn=_groups(recipe.weight_decay)
        )
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
        self._forward = self._parallel or model
        if compiled:
            self._forward = torch.compile(self._forward)
        self._parts = 1

    @property
    def lr(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

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
            _free(self._device)
            self._say(
                f"out of memory: going on with {largest // self._parts} images at a time, "
                "gradients accumulated to the same update"
                + "; BatchNorm sees the smaller batches"
                * _has_batch_norm(self._model)
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
        images, labels = _to(self._device, *batch)
        if self._mixup is not None:
            even = len(labels) // 2 * 2
            images, labels = self._mixup(images[:even], labels[:even])
        parts = self._parts_of(batch)
        return zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self._teacher is None:
            return F.cross_entropy(self._forward(images), targets, label_smoothing=self._smoothing)
        heads = [logits.float() for logits in heads_of(self._forward, images)]
        label_loss = F.cross_entropy(heads[0], targets, label_smoothing=self._smoothing)
        with torch.no_grad():
            wanted = self._teacher(images).float()
        if self._recipe.distillation == "soft":
            return distillation_loss(label_loss, heads[-1], wanted)
        return (label_loss + F.cross_entropy(heads[-1], wanted.argmax(1))) / 2

    def state(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict(), "parts": self._parts}

    def load(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._parts = state["parts"]


@failing_as("training")
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
        TrainingError: the loss is no longer finite, there is no memory for two images, or PyTorch fails.
        UserError: no batch holds two images.
    """
    random_seed(seed)
    model.to(device).train()
    recipe = replace(BRIEF, lr=lr, warmup_lr=lr / 10)
    updater = Updater(model, recipe, images, device, teacher=teacher)
    for done, batch in batches_for(loader, images):
        value = updater.step(done, [batch]).item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} after {done:,} images: lower the learning rate ({lr:g})")
        if progress is not None:
            progress(min(done + len(batch[1]), images), images, value)
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


def agreed(found: T) -> T:
    """What the first process found, in all of them; they wait for each other here."""
    if not dist.is_initialized():
        return found
    everywhere = [found]
    dist.broadcast_object_list(everywhere)
    dist.barrier()
    return everywhere[0]


def ranks() -> tuple[int, int]:
    """This process's rank, and the number of processes that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _groups(weight_decay: float) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """Parameter groups: only what is called weight and is no vector decays, so no bias tables, tokens or positions."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        free = [name for name, _ in model.named_parameters() if name.split(".")[-1] != "weight"]
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=free)

    return groups


def _digest(model: nn.Module) -> str:
    """What kind of network this is: its Arch, or its tensors' names and shapes."""
    if hasattr(model, "arch"):
        return model.arch.digest()
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, or a library below it, found no memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def _free(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


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


def _to(device: str | torch.device, images: Tensor, labels: Tensor) -> Batch:
    """On `device`, images in channels_last; convolutions keep it: EfficientViT-M4 trains 1.1x as fast on a CPU."""
    return images.to(device, memory_format=torch.channels_last), labels.to(device)
