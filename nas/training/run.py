"""`vitnas train`: a network trained by a recipe on images; a folder with its weights and how they came about."""

from __future__ import annotations

import copy
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from nas.errors import TrainingError, UserError
from nas.files import folder_lock
from nas.job import Job, Progress, Say
from nas.training.begun import as_begun, defaults
from nas.training.folder import WEIGHTS, TrainFolder
from nas.training.inputs import digests_of, first_network, lend_oracle, open_inputs, open_teacher
from nas.training.processes import agreed, processes, ranks
from nas.training.request import check_device
from nas.training.result import RESULT, Epoch, TrainResult
from nas.units import counted

if TYPE_CHECKING:
    from torch import nn

    from nas.data.batches import Batch
    from nas.training.engine import Training
    from nas.training.recipes import Recipe
    from nas.training.request import TrainRequest

EVALUATED_AT_ONCE = 256
TIMED = 10
"""Updates of which --minutes learns how long an epoch takes; the first of them are not timed."""
WARMUP = 2
JUDGING = 1 / 3
"""Of the time that an image takes in training, what it takes to judge one: there is no way back."""


def train(
    request: TrainRequest,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
    *,
    command: str = "vitnas.train(...)",
) -> TrainResult | None:
    """Train a network as `request` says, and write its folder.

    Where `torchrun` has started several processes, all of them call this; the first one writes and speaks.

    Args:
        progress: called with what goes on, how much of it is done and its total, 0 where it is not counted.
        say: called with each line that a person should read.
        command: how the results name this training.

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
            return TrainingRun(request, device, command, say, progress, locks).run()
        except ArchError as error:
            raise UserError(str(error)) from None


class TrainingRun:
    """One run of the command, from its folder's state to its results."""

    def __init__(
        self, request: TrainRequest, device: str, command: str, say: Say, progress: Progress, locks: ExitStack
    ) -> None:
        self.request, self.device, self._locks = request, device, locks
        self.rank, self.processes = ranks()
        self._stop: Callable[[], bool] = lambda: False
        self._new = not request.folder.is_dir()
        if self.rank:
            say, progress = (lambda line: None), (lambda *_: None)
        elif not self._new:
            locks.enter_context(folder_lock(request.folder, say=say))
        hints = {"epochs": self._onward()} if (request.folder / WEIGHTS).is_file() else {}
        self.job = Job(request.folder, request.identity(), say, progress, device, RESULT, hints, defaults())
        self._queued: list[str] | None = []
        self.inputs = open_inputs(request, self._note)
        self.folder = TrainFolder(request, self.inputs, self.job, command)

    def _onward(self) -> str:
        """How to train the folder's network for longer."""
        request = self.request
        images = f" --data {shlex.quote(request.data)}" if request.data else ""
        command = f"vitnas train {shlex.quote(str(request.folder))}{images} --epochs {request.recipe.epochs} --out NEW"
        return f"; `{command}` begins with its weights"

    def run(self) -> TrainResult | None:
        request, inputs = self.request, self.inputs
        self.job.agree(digests_of(request, inputs))
        if agreed(self.job.finished):
            return None if self.rank else self._finished()
        model = first_network(request, inputs, self._note)
        teacher = open_teacher(request, inputs.data, self._note)
        guided = lend_oracle(request, model, inputs.data, self.device, self._note)
        training = self._begun(model, teacher)
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
        result = None if self.rank else self.folder.write(training, self._val, error, self._note)
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

    def _begun(self, model: nn.Module, teacher: nn.Module | None) -> Training:
        """The training with all that is settled before its first epoch."""
        recipe, found = self.request.recipe, self.job.state.found
        if self.request.minutes is not None and agreed("epochs" not in found):
            trial = self._training(copy.deepcopy(model), teacher, replace(recipe, lr=recipe.lr / 1e6), kept=False)
            self._begin(trial)
            found["epochs"] = self._epochs_in(self.request.minutes, trial)
            if not self.rank:
                self.job.save()
        training = self._training(model, teacher, replace(recipe, epochs=found.get("epochs", recipe.epochs)))
        if self._queued is not None:
            self._begin(training)
        if training.epoch or training.within.updates:
            self.job.say(f"going on after {self._done(training)}")
        return training

    def _epochs_in(self, minutes: float, trial: Training) -> int:
        """How many epochs fit, by the pace of some updates of a training that is then thrown away; one at least."""
        times = [monotonic()]
        with self.job.phase("timing"):
            try:
                trial.run(1, lambda *_: times.append(monotonic()), lambda: len(times) > TIMED or self._stop())
            except KeyboardInterrupt:
                if len(times) <= TIMED:
                    raise
        warm = min(WARMUP, len(times) - 2)
        of_image = agreed((times[-1] - times[warm]) / (len(times) - 1 - warm) / trial.images)
        epoch = of_image * (trial.updates * trial.images + JUDGING * len(self.inputs.data.val))
        epochs = max(1, int(60 * minutes / epoch))
        self._note(f"--minutes {minutes:g}: {counted(epochs, 'epoch')}, one takes about {epoch:.0f} s")
        return epochs

    def _training(self, model: nn.Module, teacher: nn.Module | None, recipe: Recipe, kept: bool = True) -> Training:
        """kept: with a checkpoint, and judged on the validation images."""
        from nas.data.batches import loader
        from nas.training.engine import Training

        request, data = self.request, self.inputs.data
        at_once = min(EVALUATED_AT_ONCE, recipe.batch_size)
        self._val = loader(data.val, at_once, shuffle=False, seed=request.seed, workers=request.workers)
        return Training(
            model,
            data.train,
            recipe,
            seed=request.seed,
            device=self.device,
            precision=request.precision,
            teacher=teacher,
            checkpoint=self.job.kept / "checkpoint" if kept else None,
            workers=request.workers,
            accumulate=request.accumulate,
            compiled=request.compiled,
            validate=self._evaluate if kept and not self.rank else None,
            say=self._note,
        )

    def _begin(self, training: Training) -> None:
        """Everything asked for can be had: from here on the folder is written and notes are told."""
        from nas.data.about import announce

        if not self.rank:
            self.job.make_folder()
            if self._new:
                self._locks.enter_context(folder_lock(self.request.folder, say=self.job.say))
            if self._new and (self.job.kept / "state.json").is_file():
                raise UserError(f"{self.request.folder} was begun by another command just now: give another --out")
        images = len(self.inputs.data.train)
        announce(self.inputs.data, self.job.say, self.job.note)
        lines, self._queued = self._queued or (), None
        for line in lines:
            self._note(line)
        left_out = images - training.updates * training.images
        if left_out and training.recipe.repeats == 1:
            self._note(
                f"{left_out:,} of {images:,} images an epoch fill no batch of {training.images} and are left out "
                "(others in each epoch)"
            )
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
                self.job.say(Epoch(**training.history[-1]).line(epochs))

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
        final = self.folder.write(training, self._val, None, self._note, interrupted=done).final
        accuracy = (final and final.accuracy()) or "which was not judged"
        which = f"epoch {training.epoch}" if training.epoch else done
        self.job.say(f"{self.request.folder} holds the network of {which}, {accuracy}")

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


# Teachers
