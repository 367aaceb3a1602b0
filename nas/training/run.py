"""`vitnas train`: a network trained by a recipe on images; a folder with its weights and how they came about."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import TrainingError, UserError
from nas.export.card import LABELS, PREPROCESS, Card
from nas.export.folder import save_model, save_onnx
from nas.files import folder_lock, replace_file
from nas.job import Job, Progress, Say, now
from nas.networks.timm_network import TIMM
from nas.networks.weights import load_network
from nas.training.processes import agreed, processes, ranks
from nas.training.request import RANDOM
from nas.training.result import PARTS, accuracy_of, epoch_line
from nas.training.teachers import _own, find_teacher

if TYPE_CHECKING:
    from torch import nn

    from nas.data.batches import Batch
    from nas.data.dataset import ImageData
    from nas.training.engine import Training
    from nas.training.request import TrainRequest
    from search_spaces import Arch

RESULT = "metrics.json"
WEIGHTS = "model.safetensors"
FILES = ("arch.json", WEIGHTS, "model.onnx", PREPROCESS, LABELS)
EVALUATED_AT_ONCE = 256


def train(options: TrainRequest, command: str, say: Say, progress: Progress) -> dict[str, Any]:
    """Train a network as `options` say; writes the folder's files and returns what metrics.json holds.

    Where `torchrun` has started several processes, all of them call this; the first one writes and speaks.

    Raises:
        UserError: anything that the user can put right.
    """
    from search_spaces import ArchError

    with processes(options.device) as device, ExitStack() as locks:
        try:
            return TrainingRun(options, device, command, say, progress, locks).run()
        except ArchError as error:
            raise UserError(str(error)) from None


class TrainingRun:
    """One run of the command, from its folder's state to its results."""

    def __init__(
        self, options: TrainRequest, device: str, command: str, say: Say, progress: Progress, locks: ExitStack
    ) -> None:
        self.options, self.device, self.command, self._locks = options, device, command, locks
        self.rank, self.processes = ranks()
        self._stop: Callable[[], bool] = lambda: False
        self._new = not options.folder.is_dir()
        if self.rank:
            say, progress = (lambda line: None), (lambda *_: None)
        elif not self._new:
            locks.enter_context(folder_lock(options.folder, say=say))
        hints = {"epochs": self._onward()} if (options.folder / WEIGHTS).is_file() else {}
        self.job = Job(options.folder, options.identity(), say, progress, device, RESULT, hints)
        self._queued: list[str] | None = []

    def _onward(self) -> str:
        """How to train the folder's network for longer."""
        options = self.options
        images = f" --data {shlex.quote(options.data)}" if options.data else ""
        command = f"vitnas train {shlex.quote(str(options.folder))}{images} --epochs {options.recipe.epochs} --out NEW"
        return f"; `{command}` begins with its weights"

    def run(self) -> dict[str, Any]:
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
        model = load_network(f"{folder}", self.arch, folder / WEIGHTS)
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
        source = load_network("--weights", given, options.weights)
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
        from nas.training.evaluation import evaluate

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
            "options": options.identity(),
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


# Teachers
