"""`vitnas train`: a network trained by a recipe on images; a folder with its weights and how they came about."""

from __future__ import annotations

import json
import os
import shlex
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import TrainingError, UserError
from nas.export.card import LABELS, PREPROCESS, Card
from nas.export.folder import save_model, save_onnx
from nas.files import folder_lock, replace_file
from nas.intervals import top1_words
from nas.job import Job, Progress, Say, default_folder_of, now
from nas.machine import usable_cpus
from nas.networks.timm_network import TIMM

if TYPE_CHECKING:
    from torch import nn

    from nas.data.batches import Batch
    from nas.data.dataset import ImageData
    from nas.networks.targets import Target
    from nas.training.engine import Training
    from nas.training.recipes import Recipe
    from search_spaces import Arch

RANDOM = "none"
"""--weights that are no one's."""
"""Begins the names of timm's networks."""
RESULT = "metrics.json"
WEIGHTS = "model.safetensors"
FILES = ("arch.json", WEIGHTS, "model.onnx", PREPROCESS, LABELS)
MAX_WORKERS = 8
MOST, MOST_WORKERS = 1_000_000, 256
EVALUATED_AT_ONCE = 256
PARTS = ("final", "error", "epochs", "data", "recipe")
"""What a metrics.json must hold to be told again."""
PATIENCE = timedelta(hours=1)
"""How long the other processes wait for the first one, which evaluates and writes."""


@dataclass(frozen=True)
class Options:
    """A training as asked for. model, teacher, oracle: as `find_target` takes them, a teacher timm/NAME as well.
    weights, teacher_weights: "timm" or a file; weights: None is random ones. resolution: None is the network's own."""

    model: str
    recipe: Recipe
    device: str
    folder: Path
    data: str | None = None
    resolution: int | None = None
    num_classes: int | None = None
    weights: str | None = None
    teacher: str | None = None
    teacher_weights: str | None = None
    oracle: str | None = None
    precision: str = "fp32"
    accumulate: int = 1
    compiled: bool = False
    workers: int = 0
    seed: int = 0

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a training to go on."""
        found = asdict(self)
        recipe = found.pop("recipe")
        for name in ("folder", "workers", "compiled"):
            del found[name]
        for name in ("source", "teacher"):
            del recipe[name]
        return json.loads(json.dumps(found | {"recipe": recipe.pop("name")} | recipe))

    def check(self) -> None:
        """Raises UserError for what no network could be trained with."""
        from nas.training.engine import PRECISIONS

        recipe = self.recipe
        for name, value, least, most in (
            ("epochs", recipe.epochs, 1, MOST),
            ("batch-size", recipe.batch_size, 2, MOST),
            ("accumulate", self.accumulate, 1, MOST),
            ("workers", self.workers, 0, MOST_WORKERS),
            ("resolution", self.resolution, 1, MOST),
        ):
            if value is not None and not least <= value <= most:
                raise UserError(f"--{name} is {value}: give {least} to {most}")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision {self.precision!r}: choose from {', '.join(PRECISIONS)}")
        if not 0 < recipe.lr < 1e3:
            raise UserError(f"--lr is {recipe.lr:g}: give a learning rate above 0, such as 1e-3")
        if self.data is not None and os.path.isdir(self.data):
            images = Path(self.data).resolve()
            if self.folder.resolve() == images or images in self.folder.resolve().parents:
                raise UserError(f"--out {self.folder} is in the folder of the images, {self.data}: give another")
        if self.teacher is None and self.teacher_weights is not None:
            raise UserError("--teacher-weights needs --teacher")


def choose_recipe(
    name: str, epochs: int | None, batch_size: int | None, lr: float | None, distillation: str | None
) -> Recipe:
    """A recipe by name, with the user's changes. lr: the highest rate at the batch size in use.

    Raises:
        UserError: an unknown recipe or distillation.
    """
    from nas.training.recipes import RECIPES

    if name not in RECIPES:
        raise UserError(f"unknown --recipe {name!r}: choose from {', '.join(RECIPES)}")
    if distillation not in (None, "hard", "soft"):
        raise UserError(f"--distillation {distillation!r}: choose hard or soft")
    recipe = RECIPES[name]
    size = batch_size or recipe.batch_size
    changes = {"epochs": epochs, "batch_size": batch_size, "distillation": distillation}
    if lr is not None:
        changes |= {"lr": lr, "lr_batch": size}
    return replace(recipe, **{key: value for key, value in changes.items() if value is not None})


def starting_weights(model: str, weights: str | None, folder: Path | None) -> str | None:
    """The weights that a training begins with: those given, or those in the network's own folder; None: random ones.

    folder: where the training writes: what it has written there itself is no beginning.

    Raises:
        UserError: the folder holds the network's weights, and not from this command.
    """
    from nas.networks.targets import find_target

    if weights is not None:
        return None if weights == RANDOM else weights
    beside = find_target(model).as_trained().weights
    if beside is None:
        return None
    if folder is not None and folder.is_dir() and folder.resolve() == beside.parent.resolve():
        if not (folder / "state" / "state.json").is_file():
            raise UserError(f"--out {folder} holds the weights that the training begins with: give another")
        return None
    return str(beside)


def check_device(device: str | None) -> str:
    """cpu or cuda; without one, cuda where it can be used.

    Raises:
        UserError: another device, or one that is not here.
    """
    import torch

    here = torch.cuda.is_available()
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device!r}: choose cpu or cuda")
    if device == "cuda" and not here:
        raise UserError("--device cuda: torch finds no CUDA device here")
    return device or ("cuda" if here else "cpu")


def default_workers(device: str) -> int:
    """Processes that decode: none beside a training on the CPU, which uses its cores itself."""
    return 0 if device == "cpu" else min(MAX_WORKERS, len(usable_cpus()))


def default_folder(model: str, recipe: str) -> Path:
    """runs/train-<model>-<recipe>."""
    return default_folder_of("train", model, recipe)


def train(options: Options, command: str, say: Say, progress: Progress) -> dict[str, Any]:
    """Train a network as `options` say; writes the folder's files and returns what metrics.json holds.

    Where `torchrun` has started several processes, all of them call this; the first one writes and speaks.

    Raises:
        UserError: anything that the user can put right.
    """
    from search_spaces import ArchError

    with processes(options.device) as device, ExitStack() as locks:
        try:
            return _Run(options, device, command, say, progress, locks).run()
        except ArchError as error:
            raise UserError(str(error)) from None


class _Run:
    """One run of the command, from its folder's state to its results."""

    def __init__(
        self, options: Options, device: str, command: str, say: Say, progress: Progress, locks: ExitStack
    ) -> None:
        from nas.training.engine import ranks

        self.options, self.device, self.command, self._locks = options, device, command, locks
        self.rank, self.processes = ranks()
        self._stop: Callable[[], bool] = lambda: False
        self._new = not options.folder.is_dir()
        if self.rank:
            say, progress = (lambda line: None), (lambda *_: None)
        elif not self._new:
            locks.enter_context(folder_lock(options.folder, say=say))
        hints = {"epochs": self._onward()} if (options.folder / WEIGHTS).is_file() else {}
        self.job = Job(options.folder, options.fingerprint(), say, progress, device, RESULT, hints)
        self._queued: list[str] | None = []

    def _onward(self) -> str:
        """How to train the folder's network for longer."""
        options = self.options
        images = f" --data {shlex.quote(options.data)}" if options.data else ""
        command = f"vitnas train {shlex.quote(str(options.folder))}{images} --epochs {options.recipe.epochs} --out NEW"
        return f"; `{command}` begins with its weights"

    def run(self) -> dict[str, Any]:
        from nas.training.engine import agreed

        self._open()
        self.job.agree(self._identity())
        if agreed(self.job.finished):
            found = self.job.read_result(*PARTS) if not self.rank else {"error": None}
            self.job.say(f"{self.options.folder} is finished: these are its results")
            if not self.rank:
                last = found["final"] or {}
                self._mend(Card.of(self.data, last.get("top1"), last.get("val_images", 0)))
            return found
        training, guided = self._training(self._network(), self._teacher())
        self._begin(training)
        error = None
        try:
            with guided, self._stopping():
                self._epochs(training)
        except TrainingError as found:
            error = found
            self._go_back(training, found)
        except KeyboardInterrupt:
            if self.processes == 1:
                self._leave(training)
            raise
        data = self._write(training, error) if not self.rank else {"error": error}
        agreed(True)  # torchrun ends all processes when one has failed: the others wait until the first has written
        return data

    def _mend(self, card: Card) -> None:
        """Write again what is missing or damaged of a finished training, from what is there.

        Raises:
            UserError: the weights are lost.
        """
        from nas.data.dataset import some_of
        from nas.data.inputs import file_digest

        folder, known = self.options.folder, self.job.state.found.get("files", {})
        lost = [
            name
            for name in FILES
            if not (folder / name).is_file() or known.get(name, "") not in ("", file_digest(folder / name))
        ]
        if not lost:
            return
        what = f"missing or changed since it was finished: {', '.join(lost)}"
        if WEIGHTS in lost:
            raise UserError(
                f"{folder}, {what}: the trained weights are lost; bring {WEIGHTS} back from a copy, or train again "
                "with another --out"
            )
        model = _with_weights(f"{folder}", self.arch, folder / WEIGHTS)
        save_model(model, folder, with_weights=False)
        save_onnx(model, folder, 1, trained=True, card=card, images=some_of(self.data.val))
        self._keep_digests()
        self.job.say(f"{what}: written again from {WEIGHTS}")

    def _keep_digests(self) -> None:
        from nas.data.inputs import file_digest

        self.job.state.found["files"] = {name: file_digest(self.options.folder / name) for name in FILES}
        self.job.save()

    # What is trained, on what

    def _open(self) -> None:
        from nas.data.dataset import open_data
        from nas.networks.targets import find_target

        options = self.options
        self.target = find_target(options.model)
        if self.target.arch is None:
            raise UserError(f"{options.model} is {self.target.kind}: give a published name, an arch.json or a folder")
        size = options.resolution or self.target.arch.resolution
        arch = self.target.arch.at(size)
        self.parents = [options.weights]
        if options.oracle is not None:  # its weights are lent to the network
            self.parents.append(str(find_target(options.oracle).weights or "timm"))
        data = open_data(options.data, size, options.num_classes, options.seed, *self.parents)
        self.data: ImageData = data.at(size, options.recipe.augmentation)
        self.arch: Arch = arch.replace(num_classes=len(data.classes))
        if data.demo:
            self._note(f"no --data: trained and evaluated on {data.name}, as a demonstration")

    def _identity(self) -> dict[str, str | None]:
        """Of everything that the training reads."""
        from nas.data.inputs import identity
        from nas.networks.targets import find_target

        def network(text: str, weights: str | None) -> tuple[Arch | str, str | Path | None]:
            if text.startswith(TIMM):
                return text, weights or "timm"
            target = find_target(text)
            return target.arch or text, weights or target.weights or "timm"

        options = self.options
        return identity(
            self.data,
            model=(self.target.arch, options.weights),
            teacher=options.teacher and network(options.teacher, options.teacher_weights),
            oracle=options.oracle and network(options.oracle, None),
        )

    def _network(self) -> nn.Module:
        import torch

        from pruning.transfer import transfer
        from search_spaces import create_model

        options = self.options
        torch.manual_seed(options.seed)
        model = create_model(self.arch)
        if options.weights is None:
            return model
        own = self.target.as_trained()
        if options.weights == str(own.weights):
            self._note(f"begins with the weights of {options.weights} (--weights {RANDOM}: with random ones)")
        given = own.arch.replace(num_classes=self.arch.num_classes)
        source = _with_weights("--weights", given, options.weights)
        if source.untrained:
            theirs = source.loaded.classes
            known = f"a classifier of {theirs} classes" if theirs else "no classifier"
            self._note(
                f"{options.weights} has {known}: one for the {self.arch.num_classes} classes of these images begins "
                "untrained"
            )
        if source.loaded.note:
            self._note(f"{options.weights}: {source.loaded.note}")
        if given.resolution != self.arch.resolution:
            self._note(f"weights of {given.resolution} px, resized to {self.arch.resolution} px")
        model.load_state_dict(transfer(given, source.state_dict(), self.arch))
        return model

    def _teacher(self) -> nn.Module | None:
        options, recipe = self.options, self.options.recipe
        if options.teacher is None:
            if recipe.teacher is not None:
                self._note(f"the recipe {recipe.name} has the teacher {recipe.teacher}: without one it differs from it")
            return None
        teacher = find_teacher(options.teacher, options.teacher_weights, self.data.classes)
        self._note(f"{recipe.distillation} distillation from {options.teacher}")
        return teacher

    def _training(self, model: nn.Module, teacher: nn.Module | None) -> tuple[Training, Any]:
        """The training, and what must be entered while it runs."""
        from nas.data.batches import loader
        from nas.training.engine import Training

        options, guided = self.options, nullcontext()
        if options.oracle is not None:
            from search_spaces.oracle import start_from, with_oracle

            oracle = _own("--oracle", options.oracle, None, self.data.classes)
            start_from(model, oracle)
            guided = with_oracle(model, oracle.to(self.device))
            self._note(f"weights from the oracle {options.oracle}, which chooses the tokens in training")
        at_once = min(EVALUATED_AT_ONCE, options.recipe.batch_size)
        self._val = loader(self.data.val, at_once, shuffle=False, seed=options.seed, workers=options.workers)
        training = Training(
            model,
            self.data.train,
            options.recipe,
            seed=options.seed,
            device=self.device,
            precision=options.precision,
            teacher=teacher,
            checkpoint=self.job.kept / "checkpoint",
            workers=options.workers,
            accumulate=options.accumulate,
            compiled=options.compiled,
            validate=self._evaluate if not self.rank else None,
            say=self._note,
        )
        return training, guided

    def _begin(self, training: Training) -> None:
        """Everything asked for can be had: from here on the folder is written and notes are told."""
        from nas.data.about import announce

        if not self.rank:
            self.job.make_folder()
            if self._new:
                self._locks.enter_context(folder_lock(self.options.folder, say=self.job.say))
            if self._new and (self.job.kept / "state.json").is_file():
                raise UserError(f"{self.options.folder} was begun by another command just now: give another --out")
        announce(self.data, self.job.say, self.job.note)
        lines, self._queued = self._queued or (), None
        for line in lines:
            self._note(line)
        left_out = len(self.data.train) - training.updates * training.images
        if left_out and training.recipe.repeats == 1:
            self._note(
                f"{left_out:,} of {len(self.data.train):,} images an epoch fill no batch of {training.images} and are "
                "left out (drawn anew each epoch)"
            )
        if training.epoch or training.within.updates:
            self.job.say(f"going on after {self._done(training)}")
        if not self.rank:
            self.job.save()

    def _evaluate(self, network: nn.Module) -> dict[str, Any]:
        from nas.training.engine import evaluate

        found = evaluate(network, self._until_stopped(self._val), self.device, self._note)
        return {"top1": found.top1, "top1_ci": list(found.interval), "val_loss": found.loss, "val_images": found.total}

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._stop():
                raise KeyboardInterrupt
            yield batch

    # Course

    def _epochs(self, training: Training) -> None:
        epochs = training.recipe.epochs
        while training.epoch < epochs or not training.judged:
            with self.job.phase("training") as progress:
                training.run(training.epoch + 1, progress, self._stop)
            if not self.rank:
                self.job.save()
                self.job.say(epoch_line(training.history[-1], epochs))

    def _go_back(self, training: Training, error: TrainingError) -> None:
        training.restore(within=False)
        done = training.epoch
        kept = f"the weights of epoch {done} are kept" if done else "there are no earlier weights"
        self.job.say(f"{error}; {kept}")

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let an update be finished, so that nothing is lost; a second one ends it at once.

        Processes that train together end at the first.
        """
        if self.processes > 1:
            yield
            return
        asked = False

        def ask(number: int, frame: object) -> None:
            nonlocal asked
            if asked:
                raise KeyboardInterrupt
            asked = True

        self._stop = lambda: asked
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _leave(self, training: Training) -> None:
        """Write the network of an interrupted training: the last epoch's, or what there is of the first one."""
        training.restore()
        done = self._done(training)
        if training.epoch:
            training.restore(within=False)
        elif not training.within.updates:
            self.job.say("no update was finished: nothing is kept")
            return
        self.job.say(f"interrupted after {done}: writing the network (Ctrl-C again leaves that out)")
        data = self._write(training, None, done)
        told = accuracy_of(data["final"]) if "top1" in (data["final"] or {}) else "which was not judged"
        which = f"epoch {training.epoch}" if training.epoch else done
        self.job.say(f"{self.options.folder} holds the network of {which}, {told}")

    def _done(self, training: Training) -> str:
        """How far a training is, in words."""
        within = training.within.updates * training.images
        part = f"{within:,} images of epoch {training.epoch + 1}" if within else ""
        whole = f"epoch {training.epoch} of {training.recipe.epochs}" if training.epoch or not within else ""
        return " and ".join(filter(None, (whole, part)))

    def _write(self, training: Training, error: TrainingError | None, interrupted: str | None = None) -> dict[str, Any]:
        """Weights and what is known, then the ONNX file: where that fails it is told and recorded.

        interrupted: after what.
        """
        import torch

        from nas.data.about import summary
        from nas.data.batches import skipped_line
        from nas.data.lineage import record
        from nas.measure.hardware import describe
        from nas.measure.runtime import Settings
        from search_spaces import table

        options, counts = self.options, table(self.arch)
        broken = skipped_line([training.loader, self._val])
        if broken:
            self._note(broken)
        trained = bool(training.epoch or training.within.updates)
        seen = record(options.folder, self.data.train, *self.parents) if trained else None
        last = training.history[-1] if training.history else {}
        settings = Settings("torch", options.device, torch.get_num_threads(), training.images)
        data = {
            "model": options.model,
            "command": self.command,
            "started": self.job.state.started,
            "finished": now(),
            "family": self.arch.family,
            "resolution": self.arch.resolution,
            "params": counts.params(),
            "macs": counts.macs(),
            "data": asdict(summary(self.data)),
            "seen": seen,
            "recipe": asdict(training.recipe) | {"peak_lr": training.recipe.peak_lr},
            "options": options.fingerprint(),
            "processes": self.processes,
            "top1": last.get("top1"),
            "top1_ci": last.get("top1_ci"),
            "images": last.get("val_images"),
            "classes": list(self.data.classes),
            "seconds": sum(row["seconds"] for row in training.history) + training.within.seconds,
            "train_threads": torch.get_num_threads(),
            "epochs": training.history,
            "final": {"of": "moving average" if training.recipe.ema else "last weights", **last} if last else None,
            "hardware": describe(settings),
            "notes": self.job.state.notes,
            "phases": self.job.state.phases,
            "interrupted": interrupted,
            "error": str(error) if error else None,
        }
        if trained:  # what was said of earlier weights goes first: Ctrl-C may end this anywhere
            for earlier in (options.folder / "model.onnx", self.job.result):
                earlier.unlink(missing_ok=True)
            save_model(training.network.cpu(), options.folder)
        replace_file(self.job.result, json.dumps(data, indent=1))
        if trained:
            from nas.data.dataset import some_of

            try:
                with self.job.phase("exporting"):
                    card = Card.of(self.data, last.get("top1"), last.get("val_images", 0))
                    images = some_of(self.data.val)
                    save_onnx(training.network, options.folder, 1, trained=True, card=card, images=images)
            except UserError as failure:
                line = f"no model.onnx, but the weights are there: {failure}"
                self.job.say(line)
                data["error"] = f"{error}; {line}" if error else line
        data |= {"notes": self.job.state.notes, "phases": self.job.state.phases, "finished": now()}
        replace_file(self.job.result, json.dumps(data, indent=1))
        self.job.save()
        if data["error"] is None and interrupted is None:
            self._keep_digests()
            self.job.finish()
            (self.job.kept / "checkpoint").unlink()
        return data

    def _note(self, line: str) -> None:
        """A note for the user and the results; a training that goes on does not repeat it."""
        if self._queued is not None:
            self._queued.append(line)
        elif line not in self.job.state.notes:
            self.job.note(line)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: {accuracy_of(row)}, loss {row['loss']:.3f}, learning rate {row['lr']:.2g}, "
        f"{row['images_per_s']:.0f} images/s"
    )


def accuracy_of(row: Mapping[str, Any]) -> str:
    """An epoch's accuracy as it is told."""
    return top1_words(row["top1"], row["top1_ci"], row["val_images"])


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that `torchrun` started, if it did; yields the device that this one trains on.

    Raises:
        UserError: fewer GPUs than processes here.
    """
    import torch
    from torch import distributed

    cuda = device == "cuda"
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no GPU: torchrun --nproc-per-node {torch.cuda.device_count()} at most"
            )
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield f"cuda:{local}" if cuda else device
    finally:
        distributed.destroy_process_group()


# Teachers


def find_teacher(text: str, weights: str | None, classes: list[str]) -> nn.Module:
    """A trained network that takes the student's images: (B, 3, R, R) -> (B, classes).

    Raises:
        UserError: no such network, weights that cannot be had, random ones, or another number of classes.
    """
    if not text.startswith(TIMM):
        return _own("--teacher", text, weights, classes)
    import timm

    from search_spaces.checkpoints import WeightsError, read_checkpoint
    from search_spaces.weights import load_groups, not_fetched, offline_if_unreachable

    name = text.removeprefix(TIMM)
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:3])
        raise UserError(f"--teacher {text}: timm has no such network" + (f", but {near}" if near else ""))
    try:
        if weights is None:
            with offline_if_unreachable():
                model = timm.create_model(name, pretrained=True)
        else:
            model = timm.create_model(name, num_classes=len(classes))
            if load_groups(model, read_checkpoint(Path(weights)), {None: ()}).untrained:
                raise WeightsError(f"{weights}: another classifier, which would teach nothing")
    except WeightsError as error:
        raise UserError(f"--teacher-weights: {error}") from None
    except Exception as error:  # the weights' client raises kinds of its own
        raise UserError(f"--teacher {text}: {not_fetched(name, error, '--teacher-weights')}") from None
    config = model.pretrained_cfg
    fixed = config["input_size"][-1] if config.get("fixed_input_size") else None
    return _fitting(f"--teacher {text}", model, (model.num_classes, len(classes)), fixed, config["mean"], config["std"])


def _own(option: str, text: str, weights: str | None, classes: list[str]) -> nn.Module:
    """A network of ours that teaches."""
    from nas.networks.targets import find_target

    model = load_trained(option, find_target(text), weights)
    if model.untrained:
        raise UserError(f"{option} {text}: weights with another classifier, which would teach nothing")
    return _fitting(f"{option} {text}", model, (model.arch.num_classes, len(classes)), model.arch.resolution)


def load_trained(option: str, target: Target, weights: str | None = None) -> nn.Module:
    """A network of ours with the given weights, or those beside its Arch, or timm's of a published name.

    Args:
        option: what the user named it by, for messages.
        weights: "timm" or a file.

    Raises:
        UserError: an ONNX file, no weights, or weights that do not fit.
    """
    what = f"{option} {target.label}"
    if target.arch is None:
        raise UserError(f"{what} is an ONNX file: give a folder with model.safetensors, or a published name")
    source = weights or target.weights or ("timm" if target.folder is None else None)
    if source is None:
        raise UserError(f"{what} has no model.safetensors: `vitnas train` makes one")
    return _with_weights(what, target.arch, source)


def _with_weights(option: str, arch: Arch, weights: str | Path) -> nn.Module:
    from search_spaces import create_model
    from search_spaces.checkpoints import WeightsError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return create_model(arch, weights=weights)
    except WeightsError as error:
        raise UserError(f"{option}: {error}") from None


def _fitting(
    option: str,
    model: nn.Module,
    classes: tuple[int, int],
    resolution: int | None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> nn.Module:
    """A network that takes a student's images: at its own resolution (None: any) and with its own normalisation (None:
    ImageNet's).

    Args:
        classes: the network's, and the data's.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torch import nn
    from torchvision.transforms.v2 import Normalize, Resize

    if classes[0] != classes[1]:
        raise UserError(f"{option} has {classes[0]} classes and the data {classes[1]}: fine-tune it on the data first")
    first: list[nn.Module] = []
    if resolution is not None:
        first.append(Resize((resolution, resolution)))
    if mean is not None and std is not None and (mean, std) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        pairs = list(zip(mean, std, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True))
        first.append(Normalize([(m - m0) / s0 for m, _, m0, s0 in pairs], [s / s0 for _, s, _, s0 in pairs]))
    return nn.Sequential(*first, model)
