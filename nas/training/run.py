"""`vitnas train`: a network trained by a recipe on images; a folder with its weights and how they came about."""

from __future__ import annotations

import copy
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import TrainingError, UserError
from nas.files import LOCK, folder_lock
from nas.job import Job, Progress, Say
from nas.training.begun import as_begun, defaults
from nas.training.course import Course
from nas.training.device import alone_on
from nas.training.folder import WEIGHTS, Trained, TrainFolder
from nas.training.inputs import (
    UNLABELLED_IMAGES,
    digests_of,
    first_network,
    lend_oracle,
    open_inputs,
    open_teacher,
)
from nas.training.prepare import JUDGED_AT_ONCE, End, Preparation
from nas.training.processes import agreed, processes, ranks, together
from nas.training.request import as_given, check_device
from nas.training.result import LINEAR_PROBE, RESULT, Epoch, Final, TrainResult

if TYPE_CHECKING:
    from torch import nn

    from nas.data.images import Images
    from nas.training.engine import Training
    from nas.training.lessons import FeatureTeacher
    from nas.training.recipes import Recipe
    from nas.training.request import TrainRequest
    from nas.training.start import Start


def train(
    request: TrainRequest,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
    *,
    command: str = "vitnas.train(...)",
    start: Start | None = None,
) -> TrainResult | None:
    """Train a network as `request` says, and write its folder.

    Where `torchrun` has started several processes, all of them call this; the first one writes and speaks.

    Args:
        progress: called with what goes on, how much of it is done and its total, 0 where it is not counted.
        say: called with each line that a person should read.
        command: how the results name this training.
        start: the weights that it begins with, where they have been found.

    Returns:
        What metrics.json holds; None in the other processes.

    Raises:
        UserError: anything that the user can put right.
    """
    from search_spaces import ArchError

    request.check()
    check_device(request.device)
    request = as_begun(request)
    with processes(request.device) as device, ExitStack() as locks:
        try:
            made = TrainingRun(request, device, command, say, progress, locks, start)
            for each in together(device):
                locks.enter_context(alone_on(each))
            return made.run()
        except ArchError as error:
            raise UserError(str(error)) from None


class TrainingRun:
    """One run of the command, from its folder's state to its results."""

    def __init__(
        self,
        request: TrainRequest,
        device: str,
        command: str,
        say: Say,
        progress: Progress,
        locks: ExitStack,
        start: Start | None = None,
    ) -> None:
        from nas.data.batches import loader

        self.request, self.device, self._locks = request, device, locks
        self._command, self._progress = command, progress
        self.rank, self.processes = ranks()
        self._stop: Callable[[], bool] = lambda: False
        self._new = not request.folder.is_dir()
        self._first = False
        if self.rank:
            say, progress = (lambda line: None), (lambda *_: None)
        elif not self._new:
            locks.enter_context(folder_lock(request.folder, say=say))
        hints = {"epochs": self._onward()} if (request.folder / WEIGHTS).is_file() else {}
        options = request.identity()
        self.job = Job(request.folder, options, say, progress, device, RESULT, hints, defaults(), as_given)
        self.course = Course.read(self.job.state.found, self.job.kept / "state.json")
        self._queued: list[str] | None = []
        known = self.course.start if self.job.finished else None
        self.inputs = open_inputs(
            request, self._note, lambda done, total: progress("downloading", done, total), known, start
        )
        at_once = min(JUDGED_AT_ONCE, request.recipe.batch_size)
        self._val = loader(self.inputs.data.val, at_once, shuffle=False, seed=request.seed, workers=request.workers)
        self.folder = TrainFolder(request, self.inputs, self.job, self.course, command)
        self.steps = Preparation(
            request, self.inputs, self.job, self.course, device, self.rank, self._note, lambda: self._stop()
        )

    def _onward(self) -> str:
        """How to train the folder's network for longer."""
        request = self.request
        images = f" --data {shlex.quote(request.data)}" if request.data else ""
        epochs = "" if request.recipe.by_images else f" --epochs {request.recipe.epochs}"
        command = f"vitnas train {shlex.quote(str(request.folder))}{images}{epochs} --out NEW"
        return f"; `{command}` begins with its weights"

    def run(self) -> TrainResult | None:
        try:
            return self._run()
        except UserError:
            self._free()
            raise

    def _run(self) -> TrainResult | None:
        request, inputs = self.request, self.inputs
        self._agree()
        if agreed(self.job.finished):
            return None if self.rank else self._finished()
        model, own_head = first_network(request, inputs, self._note)
        if request.probe or (inputs.fine_tunes and not len(inputs.held)):
            return self._probe(model, own_head and not request.probe)
        teacher = open_teacher(request, inputs.data, self._note, self._tune_teacher)
        guided = lend_oracle(request, model, inputs.data, self.device, self._note)
        training = self._prepared(model, own_head, teacher)
        error = None
        try:
            with guided, self._stopping():
                self._epochs(training)
                trained = self._better(training, "done")
        except TrainingError as found:
            error = found
            self._go_back(training, found)
            trained = self._better(training, "failed")
        except KeyboardInterrupt:
            if self.processes == 1:
                self._leave(training)
            raise
        return self._written(trained, error)

    def _tune_teacher(self, request: TrainRequest) -> None:
        with self.job.phase("the teacher"), ExitStack() as locks:
            TrainingRun(request, self.device, self._command, self.job.say, self._progress, locks).run()

    def _agree(self) -> None:
        """Go on only with what the folder's training was begun with."""
        start, known = self.inputs.start, self.course.start
        if known is not None and known.digest != start.digest:
            was, now = (
                f"{file} (sha256 {digest})" if digest else "random weights"
                for file, digest in ((known.file, known.digest), (start.path, start.digest))
            )
            raise UserError(f"{self.request.folder} was begun with {was}, not {now}: give another --out")
        known_ones = self.job.state.inputs
        digests = digests_of(self.request, self.inputs, known_ones)
        if self.job.state.options.get("unlabelled") and known_ones and UNLABELLED_IMAGES not in known_ones:
            digests.pop(UNLABELLED_IMAGES, None)  # an older vitnas kept no record of them
        self.job.agree(digests)
        self.course.start = start.record

    def _written(self, trained: Trained, error: TrainingError | None) -> TrainResult | None:
        result = None if self.rank else self.folder.write(trained, error, self._note)
        agreed(True)  # torchrun ends all processes when one has failed: the others wait until the first has written
        if self.rank and error is not None:
            sys.exit(1)
        return result

    def _finished(self) -> TrainResult:
        """What a finished training has left, made whole."""
        result = TrainResult.read(self.job.result)
        self.job.say(f"{self.request.folder} is finished: these are its results")
        self.folder.mend(result)
        return result

    def _probe(self, model: nn.Module, own_head: bool) -> TrainResult | None:
        """A linear probe alone. own_head: as `Preparation.probe`."""
        self._begin()
        self.steps.probe(model, own_head)
        probe = self.course.probe
        assert probe is not None
        final = None if self.rank else self._final_of_probe(model, probe.seconds)
        at_once = self.request.recipe.batch_size
        return self._written(
            Trained(model, None, [], final, True, probe.seconds, at_once, (self._val, self.steps)), None
        )

    # Before the first epoch

    def _prepared(self, model: nn.Module, own_head: bool, teacher: nn.Module | FeatureTeacher | None) -> Training:
        """The training, when everything that comes before its first epoch is done."""
        recipe, course, inputs, minutes = self.request.recipe, self.course, self.inputs, self.request.minutes

        def brief(network: nn.Module, by: Recipe, images: Images) -> Training:
            return self._training(network, by, images, None, None)

        def taught(network: nn.Module, by: Recipe, images: Images) -> Training:
            return self._training(network, by, images, teacher, None)

        probes = inputs.fine_tunes and course.probe is None
        tries = len(recipe.rates) > 1 and inputs.fine_tunes and course.lr is None
        counts = course.epochs is None and (minutes is not None or recipe.by_images)
        if agreed(probes or tries or counts):
            # before anything is written: whether such a training can be had
            checked = taught(copy.deepcopy(model), replace(recipe, lr=recipe.lr / 1e6), inputs.train)
            self._begin()
            if inputs.fine_tunes:
                self.steps.probe(model, own_head)
            if counts and minutes is None:
                self.steps.epochs_by_images()
            if tries:
                self.steps.try_rates(model, recipe, brief, None if teacher is None else taught)
            if counts and minutes is not None:
                self.steps.choose_epochs(minutes, checked)
            if inputs.fine_tunes:
                self.steps.suit_length(course.epochs or recipe.epochs)
            if tries:
                self.steps.choose_rate(recipe, course.epochs or recipe.epochs)
        elif inputs.fine_tunes:
            self.steps.probe(model, own_head)
        recipe = replace(
            recipe,
            lr=course.lr or recipe.lr,
            epochs=course.epochs or recipe.epochs,
            blend=course.blend or recipe.blend,
        )
        teacher = teacher if course.teaches else None
        training = self._training(model, recipe, self.steps.images, teacher, self.job.kept / "checkpoint")
        if self._queued is not None:
            self._begin()
        self._tell_left_out(training)
        if training.epoch or training.within.updates:
            self.job.say(f"going on after {self._done(training)}")
        return training

    def _training(
        self,
        model: nn.Module,
        recipe: Recipe,
        images: Images,
        teacher: nn.Module | FeatureTeacher | None,
        checkpoint: Path | None,
    ) -> Training:
        """checkpoint: None of a short one, which is not judged on the validation images either."""
        from nas.training.engine import Training

        request = self.request
        return Training(
            model,
            images,
            recipe,
            seed=request.seed,
            device=self.device,
            precision=request.precision,
            teacher=teacher,
            checkpoint=checkpoint,
            workers=request.workers,
            accumulate=request.accumulate,
            compiled=request.compiled,
            validate=self._evaluate if checkpoint is not None and not self.rank else None,
            say=self._note,
        )

    def _begin(self) -> None:
        """Everything asked for can be had: from here on the folder is written and notes are told."""
        from nas.data.about import announce

        if not self.rank:
            self.job.make_folder()
            if self._new:
                self._locks.enter_context(folder_lock(self.request.folder, say=self.job.say))
            if self._new and (self.job.kept / "state.json").is_file():
                raise UserError(f"{self.request.folder} was begun by another command just now: give another --out")
            self._first = not (self.job.kept / "state.json").is_file()
        announce(self.inputs.data, self.job.say, self.job.note)
        lines, self._queued = self._queued or (), None
        for line in lines:
            self._note(line)
        self.steps.keep()

    def _tell_left_out(self, training: Training) -> None:
        images = training.count
        left_out = images - training.updates * training.images
        if left_out and training.recipe.repeats == 1:
            self._note(
                f"{left_out:,} of {images:,} images an epoch fill no batch of {training.images} and are left out "
                "(others in each epoch)"
            )

    def _evaluate(self, network: nn.Module) -> dict[str, Any]:
        from nas.training.evaluation import evaluate

        found = evaluate(network, self.steps.until_stopped(self._val), self.device, self._note)
        return {"top1": found.top1, "top1_ci": list(found.interval), "val_loss": found.loss, "val_images": found.total}

    # Course

    def _epochs(self, training: Training) -> None:
        epochs = training.recipe.epochs
        while training.epoch < epochs or not training.judged:
            with self.job.phase("training", f", epoch {min(epochs, training.epoch + 1)}/{epochs}") as progress:
                training.run(training.epoch + 1, progress, self._stop)
            if not self.rank:
                self.job.save()
                self.job.say(Epoch(**training.history[-1]).line(epochs))

    def _better(self, training: Training, end: End) -> Trained:
        """The better of the network as far as it is tuned and the one that it began as.

        end: an interruption judges no probe, and fits none again.
        """
        trained, course = Trained.of(training, self._val, self.steps), self.course
        if not self.inputs.fine_tunes:
            return trained
        assert course.probe is not None
        if not self.rank:
            early = training.epoch < training.recipe.epochs
            self.steps.choose(training.network if training.epoch else None, end if early else "done")
        if agreed(course.kept) == "tuned" or self.rank:
            return trained
        ended = end != "interrupted"
        network = self.steps.first(training.model, ended)
        final = Final(epoch=0, of=LINEAR_PROBE, seconds=course.probe.seconds)
        if ended:
            final = self._final_of_probe(network, course.probe.seconds)
        return replace(trained, network=network, final=final, started=True)

    def _final_of_probe(self, network: nn.Module, seconds: float) -> Final:
        with self.job.phase("judging the probe"):
            return Final(epoch=0, of=LINEAR_PROBE, seconds=seconds, **self._evaluate(network))

    def _go_back(self, training: Training, error: TrainingError) -> None:
        training.restore(within=False)
        done = training.epoch
        last = f"the last good epoch is {done}" if self.inputs.fine_tunes else f"the weights of epoch {done} are kept"
        self.job.say(f"{error}; {last if done else 'there are no earlier weights'}")

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

    def _free(self) -> None:
        """Leave the folder to another command, where this one was its first and nothing was done."""
        kept = self.job.kept
        if not self._first or self.course.probe is not None or list(kept.glob("checkpoint*")):
            return
        with suppress(OSError):
            (kept / "state.json").unlink()
            kept.rmdir()
            if self._new:
                (self.request.folder / LOCK).unlink()
                self.request.folder.rmdir()

    def _leave(self, training: Training) -> None:
        """Write the network of an interrupted training: the last epoch's, or what there is of the first one."""
        training.restore()
        done = self._done(training)
        if training.epoch:
            training.restore(within=False)
        elif not training.within.updates and not self.inputs.fine_tunes:
            self.job.say("no update was finished: nothing is kept")
            return
        self.job.say(f"interrupted after {done}: writing the network (Ctrl-C again leaves that out)")
        self._stop = lambda: False
        trained = self._better(training, "interrupted")
        final = self.folder.write(trained, None, self._note, interrupted=done).final
        accuracy = (final and final.accuracy()) or "which was not judged"
        which = f"the network of {f'epoch {training.epoch}' if training.epoch else done}, {accuracy}"
        if self.course.kept == "probe":
            which = "the linear probe"
        self.job.say(f"{self.request.folder} holds {which}")

    def _done(self, training: Training) -> str:
        """How far a training is, in words."""
        within = training.within.updates * training.images
        part = f"{within:,} images of epoch {training.epoch + 1}" if within else ""
        whole = f"epoch {training.epoch} of {training.recipe.epochs}" if training.epoch or not within else ""
        return " and ".join(filter(None, (whole, part)))

    def _note(self, line: str) -> None:
        """A note for the user and the results; a training that goes on does not repeat it."""
        if self._queued is not None:
            self._queued.append(line)
        elif line not in self.job.state.notes:
            self.job.note(line)
