"""The folder that a training writes: weights, what is known of them, and the ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nas.errors import TrainingError, UserError
from nas.export.card import LABELS, PREPROCESS, Card
from nas.export.folder import save_model, save_onnx
from nas.files import replace_file
from nas.job import Job, now
from nas.networks.counts import counts_of
from nas.networks.weights import load
from nas.training.processes import ranks
from nas.training.recipes import Recipe
from nas.training.request import PROBE
from nas.training.result import Epoch, Final, TrainResult

if TYPE_CHECKING:
    from torch import nn

    from nas.data.batches import Skipping
    from nas.networks.timm_network import TimmModel
    from nas.training.course import Course
    from nas.training.engine import Training
    from nas.training.inputs import TrainInputs
    from nas.training.request import TrainRequest
    from search_spaces.network import Network

WEIGHTS = "model.safetensors"
FILES = ("arch.json", WEIGHTS, "model.onnx", PREPROCESS, LABELS)


@dataclass(frozen=True)
class Trained:
    """A network as a training leaves it."""

    network: nn.Module
    recipe: Recipe | None
    """As used; None: a linear probe alone."""
    epochs: list[Epoch]
    final: Final | None
    """None: no epoch was finished."""
    started: bool
    """Whether its weights are others than those it began with."""
    seconds: float
    """Of training and judging."""
    batch: int
    """Images an update."""
    loaders: Sequence[Skipping]
    """What has read its images."""

    @classmethod
    def of(cls, training: Training, *others: Skipping) -> Trained:
        """Of a training, however far it has come. others: what has read images besides."""
        last = training.history[-1] if training.history else None
        of = "moving average" if training.recipe.ema else "last weights"
        if training.recipe.blend < 1:
            of += ", mixed with the first"
        return cls(
            training.network,
            training.recipe,
            [Epoch(**row) for row in training.history],
            Final(of=of, **last) if last else None,
            bool(training.epoch or training.within.updates),
            sum(row["seconds"] for row in training.history) + training.within.seconds,
            training.images,
            [training.loader, *others],
        )


class TrainFolder:
    """Writes a training's results. command: the command line that asked for it."""

    def __init__(self, request: TrainRequest, inputs: TrainInputs, job: Job, course: Course, command: str) -> None:
        self._request, self._inputs, self._job, self._course, self._command = request, inputs, job, course, command

    def write(
        self,
        trained: Trained,
        error: TrainingError | None,
        note: Callable[[str], None],
        interrupted: str | None = None,
    ) -> TrainResult:
        """Write the weights and what is known, then the ONNX file: where that fails it is said and recorded.

        interrupted: after what, in words.
        """
        from nas.data.batches import skipped_line

        job, folder = self._job, self._request.folder
        if broken := skipped_line(trained.loaders):
            note(broken)
        result = self._result(trained, error, interrupted)
        if trained.started:  # what was said of earlier weights goes first: Ctrl-C may end this anywhere
            for earlier in (folder / "model.onnx", job.result):
                earlier.unlink(missing_ok=True)
            save_model(cast("Network | TimmModel", trained.network.cpu()), folder)
        replace_file(job.result, json.dumps(result.to_json(), indent=1))
        if trained.started and (failure := self._export(trained, result)):
            result = replace(result, error=f"{error}; {failure}" if error else failure)
        result = replace(result, notes=job.state.notes, phases=job.state.phases, finished=now())
        replace_file(job.result, json.dumps(result.to_json(), indent=1))
        job.save()
        if result.error is None and interrupted is None:
            self._keep_digests()
            job.finish()
            (job.kept / "checkpoint").unlink(missing_ok=True)
        return result

    def _result(self, trained: Trained, error: TrainingError | None, interrupted: str | None) -> TrainResult:
        import torch

        from nas.data.about import summary
        from nas.data.lineage import record
        from nas.measure.hardware import describe
        from nas.measure.runtime import Settings

        request, inputs = self._request, self._inputs
        last, course = trained.final, self._course
        recipe: dict[str, Any] = {"name": PROBE, "source": "a linear probe on the frozen network", "epochs": 0}
        options = request.identity()
        if trained.recipe is not None:
            recipe = asdict(trained.recipe) | {"peak_lr": trained.recipe.peak_lr}
        else:
            unused = {"recipe", *(field.name for field in fields(Recipe))}
            options = {name: value for name, value in options.items() if name not in unused}
        counts = counts_of(inputs.network)
        threads = torch.get_num_threads()
        return TrainResult(
            model=request.model,
            command=self._command,
            started=self._job.state.started,
            finished=now(),
            family=inputs.network.family,
            resolution=inputs.network.resolution,
            params=counts.params,
            macs=counts.macs,
            data=asdict(summary(inputs.data)),
            seen=record(request.folder, inputs.data.train, *inputs.parents) if trained.started else None,
            recipe=recipe,
            options=options,
            processes=ranks()[1],
            top1=last.top1 if last else None,
            top1_ci=last.top1_ci if last else None,
            images=last.val_images if last else None,
            classes=list(inputs.data.classes),
            seconds=trained.seconds,
            train_threads=threads,
            epochs=trained.epochs,
            final=last,
            start=course.start,
            probe=course.probe,
            trials=course.trials,
            taught=course.taught,
            tuned=course.tuned,
            whole=course.whole,
            kept=course.kept,
            hardware=describe(Settings("torch", request.device, threads, trained.batch)),
            notes=self._job.state.notes,
            phases=self._job.state.phases,
            interrupted=interrupted,
            error=str(error) if error else None,
        )

    def _export(self, trained: Trained, result: TrainResult) -> str | None:
        """Write the ONNX file; returns why that failed, which is said."""
        from nas.data.dataset import some_of

        try:
            with self._job.phase("exporting"):
                card = Card.of(self._inputs.data, result.top1, result.images or 0)
                images = some_of(self._inputs.data.val)
                network = cast("Network | TimmModel", trained.network)
                save_onnx(network, self._request.folder, self._request.file, trained=True, card=card, images=images)
        except UserError as failure:
            line = f"no model.onnx, but the weights are there: {failure}"
            self._job.say(line)
            return line
        return None

    def mend(self, result: TrainResult) -> None:
        """Write again what is missing or damaged of a finished training, from what is there.

        Raises:
            UserError: the weights are lost.
        """
        from nas.data.dataset import some_of
        from nas.identity import file_digest

        folder, known = self._request.folder, self._job.state.found.get("files", {})
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
        last, data = result.final, self._inputs.data
        card = Card.of(data, last.top1, last.val_images or 0) if last else Card.of(data)
        model = load(self._inputs.network, folder / WEIGHTS, what=str(folder))
        save_model(model, folder, with_weights=False)
        save_onnx(model, folder, self._request.file, trained=True, card=card, images=some_of(data.val))
        self._keep_digests()
        self._job.say(f"{what}: written again from {WEIGHTS}")

    def _keep_digests(self) -> None:
        from nas.identity import file_digest

        folder: Path = self._request.folder
        self._job.state.found["files"] = {name: file_digest(folder / name) for name in FILES}
        self._job.save()
