"""`vitnas prune`: score, cut, grow, recover, measure; a folder that says what was done and what it bought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.about import announce
from nas.data.inputs import identity
from nas.ending import Ending
from nas.errors import UserError
from nas.export.card import pixels_of
from nas.export.folder import save_model, save_onnx
from nas.export.quantize import check_calibration
from nas.files import job_folder, scratch
from nas.job import Progress, Say
from nas.measure.runtime import LOWER
from nas.measure.samples import Measurement
from nas.networks.timm_network import TIMM
from nas.prune import steps
from nas.prune.images import PruneJob, compute_device
from nas.prune.outside import prune_outside
from nas.prune.records import Kept, NetworkRow, Parts, PriceRow, PruneResult
from nas.prune.request import PruneRequest, show
from nas.prune.results import write_results
from nas.prune.rounds import Rounds, export_untrained, keep_network, load_network
from nas.prune.source import classes_of, find_source, load_source
from nas.prune.widths import block_rows

if TYPE_CHECKING:
    from search_spaces import Arch
    from search_spaces.network import Network

CALIBRATED_ON_NOISE = (
    "the int8 files that are timed are calibrated on noise: latency is real, nothing is said of accuracy"
)
NOT_JUDGED = "without labels {0} is not judged, and no model.{0}.onnx is written: only the latency is of {0}"


def prune(
    request: PruneRequest,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
    *,
    command: str = "vitnas.prune(...)",
) -> PruneResult:
    """Prune a network as `request` says, and write the folder's files.

    Args:
        progress: called with what goes on, how much of it is done and its total, 0 where it is not counted.
        say: called with each line that a person should read.
        command: how the report names this pruning.

    Raises:
        UserError: anything that the user can put right.
    """
    from nas.training.device import alone_on
    from pruning.allocation import BudgetError
    from pruning.importance import ImportanceError
    from search_spaces import ArchError

    request.check()
    try:
        with job_folder(request.folder), alone_on(compute_device(request.settings)):
            if request.model.startswith(TIMM):
                return prune_outside(request, command, say, progress)
            return Pruning(request, command, say, progress).run()
    except BudgetError as error:
        budget = request.budget
        raise UserError(
            f"--{budget.option} {budget.text} cannot be reached: the minimum widths of "
            f"--axes {','.join(request.kinds)} come to {show(budget.metric, error.reachable)}"
            + "; what showed no saving as measured is left alone"
            * (budget.metric == "latency")
        ) from None
    except (ImportanceError, ArchError) as error:
        raise UserError(str(error)) from None


class Pruning:
    """One run of the command, from its folder's state to its report."""

    def __init__(self, request: PruneRequest, command: str, say: Say, progress: Progress) -> None:
        self.command = command
        self.job = PruneJob(request.folder, request.identity(), say, progress, compute_device(request.settings))
        self.request = steps.as_begun(self.job, request)
        self.state, self.end = self.job.state, Ending(say)
        self.chosen: bytes | None = None
        """The pruned network's file as it is timed, where it is int8 by another recipe than the default."""
        self.price: PriceRow | None = None
        """Of the precision that is timed."""

    def run(self) -> PruneResult:
        from pruning.units import anatomy

        job, request = self.job, self.request
        arch, weights = find_source(job, request)
        pixels = pixels_of(arch, weights)
        if request.unlabelled:
            classes = arch.num_classes if request.num_classes is None else request.num_classes
            arch = arch.replace(num_classes=classes)
            names = classes_of(request.model, arch.num_classes)
            job.open_unlabelled(request.unlabelled, names, arch.resolution, request.seed, pixels)
        else:
            job.open_data(request.data, arch.resolution, request.num_classes, request.seed, weights, pixels)
        job.agree(identity(job.data, model=(arch, weights)))
        if job.finished:
            return steps.told_again(job, request)
        if request.settings.precision == "int8" and not request.unlabelled:
            check_calibration(len(job.data.calibration))
        if request.settings.precision != "fp32":
            job.note(f"latency is measured in {request.settings.precision}; accuracies and model.onnx are of fp32")
        if request.settings.precision == "int8":
            job.say(CALIBRATED_ON_NOISE)
        if request.settings.precision in LOWER and request.unlabelled:
            job.note(NOT_JUDGED.format(request.settings.precision))
        arch = arch.replace(num_classes=len(job.data.classes))
        rounds = Rounds(job, request, anatomy(arch))
        rounds.check_budget()
        job.make_folder()
        dense = self._dense(arch, weights)
        job.accuracy(dense, "before")
        rounds.run()
        model, kept = self._recover(dense)
        self._control()
        self._export(model, kept)
        if request.settings.precision in LOWER and not request.unlabelled:
            self._export_lower(model.arch)
        return self._write(dense.arch, model.arch, kept, rounds)

    def _dense(self, arch: Arch, weights: str | Path | None) -> Network:
        """The network to prune: with weights that fit, a probe where its classifier is new, or briefly trained."""
        job = self.job
        if self.state.network:
            dense = load_network(job, "dense")
            if self.request.unlabelled:
                job.label(dense)
            announce(job.data, job.say, job.note)
            return dense
        model, first = load_source(job, self.request, arch, weights)
        if self.request.unlabelled:
            job.label(model.eval().to(job.device))
        announce(job.data, job.say, job.note)
        steps.make_ready(job, self.request, model, first)
        dense = model.eval().to(job.device)
        keep_network(job, "dense", dense)
        return dense

    def _recover(self, dense: Network) -> tuple[Network, Kept]:
        """Fine-tune the pruned network and save it, or the one before where fine-tuning was a loss."""
        job = self.job
        model = load_network(job, self.state.network)
        if self.state.network != "tuned":
            job.accuracy(model, "pruned")
            with self.end.step("fine-tuning"):
                steps.tune(job, self.request, model, dense)
                keep_network(job, "tuned", model)
            self._stop_if_interrupted()
            if self.state.network != "tuned":
                self.state.found.pop("tuned_images", None)  # what they trained was not kept
                model = load_network(job, self.state.network)
        kept = steps.judge_tuned(job, model)
        if kept == "pruned" and "recovered" in self.state.found:
            model = load_network(job, f"round-{len(self.state.rounds)}")
        model = model.cpu()
        save_model(model, self.request.folder)
        return model, kept

    def _control(self) -> None:
        with self.end.step("control"):
            steps.tune_control(self.job, self.request, lambda: load_network(self.job, "dense"))
        self._stop_if_interrupted()

    def _export(self, model: Network, kept: Kept) -> None:
        """Write model.onnx, with the accuracy of what is kept on its card."""
        from nas.data.dataset import some_of

        job, options = self.job, self.request.file.of_batch(self.request.settings.batch_size)
        with self.end.step("model.onnx"), job.phase("exporting"):
            card = steps.card_of(job, kept)
            images = some_of(job.evaluated)
            save_onnx(model, self.request.folder, options, trained=True, card=card, images=images)

    def _export_lower(self, arch: Arch) -> None:
        """Judge the network in the precision that is timed, and write its file there, where it has one of its own,
        unless it costs more than it may; both are noted."""
        from nas.evaluate.precision import write_lower, write_measured

        job, request, precision = self.job, self.request, self.request.settings.precision
        path = request.folder / f"model.{precision}.onnx"
        path.unlink(missing_ok=True)
        with self.end.step(path.name), job.phase(f"judging {precision}"), scratch(request.folder) as folder:
            draft, weights = folder / path.name, request.folder / "model.safetensors"
            price = write_lower(
                arch, weights, draft, job.data, job.evaluated, request.settings, request.max_drop, file=request.file
            )
            self.price = PriceRow.of(price)
            what = path.name if draft.exists() else "model.onnx"
            for line in price.lines:
                job.note(f"{what}: {line}")
            if price.within and draft.exists():
                if not price.as_timed:
                    measured = draft
                    if not request.file.plain:
                        measured = folder / "measured.onnx"
                        write_measured(arch, weights, measured, job.data, request.settings, price.recipe)
                    self.chosen = measured.read_bytes()
                draft.replace(path)

    def _write(self, before: Arch, after: Arch, kept: Kept, rounds: Rounds) -> PruneResult:
        """Measure both networks side by side, and write the results."""
        from search_spaces import table

        job, request = self.job, self.request
        results: dict[str, Measurement] = {}
        with self.end.step("closing run"), job.phase("closing run") as progress:
            archs = {"before": before, "after": after}

            def export(arch: Arch, stem: Path) -> Path:
                if arch is after and self.chosen:  # of other operators than the default recipe's file
                    path = Path(f"{stem}.onnx")
                    path.write_bytes(self.chosen)
                    return path
                return export_untrained(arch, stem, request)

            results = steps.closing_run(archs, export, request, progress)
        self._stop_if_interrupted()
        blocks = block_rows(before, after, self.state.origins)
        if any(row.before.heads for row in blocks) and not any(row.after and row.after.heads for row in blocks):
            job.note("no attention is left: on these images it was worth less than it costs")

        def row(name: str, arch: Arch) -> NetworkRow:
            counts = table(arch)
            document = json.loads(arch.to_json())
            return NetworkRow.of(counts.params(), counts.macs(), results.get(name), request.settings, document)

        parts = Parts(after.family, after.resolution, blocks, rounds.importance, rounds.savings)
        both = row("before", before), row("after", after)
        return write_results(job, request, self.command, kept, *both, results, parts, self.end, self.price)

    def _stop_if_interrupted(self) -> None:
        if self.end.interrupted:
            raise KeyboardInterrupt
