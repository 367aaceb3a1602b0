"""`vitnas prune`: score, cut, grow, recover, measure; a folder that says what was done and what it bought."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.data.about import announce
from nas.data.inputs import identity
from nas.ending import Ending
from nas.errors import UserError
from nas.export.artifact import write_artifact
from nas.export.card import Card
from nas.export.folder import save_model, save_onnx, save_weights
from nas.files import job_folder, replace_file
from nas.job import Progress, Say
from nas.lock import in_turn
from nas.measure.samples import Measurement, paired_ratio
from nas.networks.timm_network import TIMM
from nas.networks.weights import create_quietly
from nas.prune import steps
from nas.prune.images import PruneJob, compute_device
from nas.prune.request import PruneRequest, show
from nas.prune.results import PARTS, network_row, write_results
from nas.prune.savings import left_alone, measure_savings, rates
from nas.prune.widths import block_rows, group_of, importance_rows
from nas.text import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pruning.units import Anatomy, Scores
    from search_spaces import Arch

CALIBRATED_ON_NOISE = (
    "the int8 files that are timed are calibrated on noise: latency is real, nothing is said of accuracy"
)
COST_ROUNDS = 10
CORRECTIONS = 3
"""More rounds, or tries, when the measured latency misses the budget that its estimate met."""
HEADROOM = 0.98
"""Share of a latency budget that is aimed at: the closing run is another run."""


def prune(request: PruneRequest, command: str, say: Say, progress: Progress) -> dict[str, Any]:
    """Prune a network as `request` says; writes the folder's files and returns the report's data.

    Raises:
        UserError: anything that the user can put right.
    """
    from pruning.allocation import BudgetError
    from pruning.importance import ImportanceError
    from search_spaces import ArchError

    try:
        with job_folder(request.folder):
            if request.model.startswith(TIMM):
                from nas.prune.outside import prune_outside

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
        self.request, self.command = request, command
        self.job = PruneJob(request.folder, request.identity(), say, progress, compute_device(request.settings))
        self.state, self.end = self.job.state, Ending(say)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def run(self) -> dict[str, Any]:
        from pruning.units import anatomy

        arch, weights = self._source()
        request = self.request
        self.job.open_data(request.data, arch.resolution, request.num_classes, request.seed, weights)
        self.job.agree(identity(self.job.data, model=(arch, weights)))
        if self.job.finished:
            self.job.say(f"{self.request.folder} is finished: these are its results")
            return self.job.read_result(*PARTS)
        if self.request.settings.precision != "fp32":
            self.job.say(f"latency is measured in {self.request.settings.precision}; accuracy and model.onnx are fp32")
        if self.request.settings.precision == "int8":
            self.job.say(CALIBRATED_ON_NOISE)
        arch = arch.replace(num_classes=len(self.job.data.classes))
        self.whole = anatomy(arch)
        self._check_budget()
        self.job.make_folder()
        self._dense(arch, weights)
        self._rounds()
        self._recover()
        return self._write()

    def _keep(self, name: str, model: nn.Module) -> None:
        """Save a network under a name, then make it the one that stands."""
        save_weights(model, self.job.kept / f"{name}.safetensors")
        replace_file(self.job.kept / f"{name}.json", model.arch.to_json())
        self.state.network = name
        self.job.save()

    def _load(self, name: str) -> nn.Module:
        from search_spaces import Arch, create_model

        arch = Arch.from_json((self.job.kept / f"{name}.json").read_bytes())
        return create_model(arch, weights=self.job.kept / f"{name}.safetensors").eval().to(self.job.device)

    # What is pruned

    def _source(self) -> tuple[Arch, str | Path | None]:
        """The network's Arch, and where its weights come from; None for nowhere."""
        from nas.networks.targets import find_target

        target = find_target(self.request.model)
        if target.folder is not None and self.request.data is None and (known := trained_on(target.folder)):
            self.job.note(f"{self.request.model} was trained on {known}: --data {known} prunes it on those images")
        if target.arch is None:
            raise UserError(f"{self.request.model} is an ONNX file: give a published name, an arch.json or a folder")
        if self.request.weights is not None:
            return target.arch, self.request.weights
        if target.weights is not None:
            return target.arch, target.weights
        return target.arch, "timm" if self.request.data is not None and target.folder is None else None

    def _check_budget(self) -> None:
        """Refuse a budget that counting alone shows to be above the network's own, or out of reach."""
        from pruning.allocation import Costs, allocate
        from pruning.units import equal_scores

        request, parts = self.request, self.whole
        metric = request.budget.metric
        if metric != "latency":
            target = request.budget.target(getattr(parts.table, metric)())
            allocate(parts, equal_scores(parts), Costs(parts, metric), target, request.kinds, request.multiple_of)

    def _dense(self, arch: Arch, weights: str | Path | None) -> None:
        """The network to prune, trained: with weights that fit, or briefly on the data."""
        if self.state.network:
            announce(self.job.data, self.job.say, self.job.note)
            self.dense = self._load("dense")
            return
        model, untrained = self._with_weights(arch, weights)
        announce(self.job.data, self.job.say, self.job.note)
        steps.say_plan(self.job, self.request, untrained)
        if untrained:
            steps.train_briefly(self.job, model)
        self.dense = model.eval().to(self.job.device)
        self._keep("dense", model)

    def _with_weights(self, arch: Arch, weights: str | Path | None) -> tuple[nn.Module, bool]:
        import torch

        from search_spaces.checkpoints import WeightsError

        torch.manual_seed(self.request.seed)
        what = steps.brief_line(self.job)
        try:
            model = create_quietly(arch, weights)
        except WeightsError as error:
            if weights != "timm" or self.request.weights is not None:
                raise UserError(str(error)) from None
            self.job.note(f"no pretrained weights ({error}); {what}")
            return create_quietly(arch, None), True
        if weights is None:
            self.job.note(f"no weights given{'' if self.request.data else ' and no --data'}; {what}")
        elif model.untrained:
            self.job.note(f"weights {weights} have another classifier or none; {what}")
        elif self.job.data.demo:
            self.job.note(f"no --data: pruned, tuned and evaluated on {self.job.data.name}")
        if model.loaded and model.loaded.note:
            self.job.note(f"{weights}: {model.loaded.note}")
        self.state.found["weights"] = str(weights) if weights else None
        return model, bool(model.untrained)

    # Rounds

    def _rounds(self) -> None:
        self.job.accuracy(self.dense, "before")
        budget = self.request.budget
        if budget.metric == "latency":
            if "costs" not in self.state.found:
                self.state.found["costs"], self.state.found["own"] = self._measured_costs()
                self.job.save()
            own = self.state.found["own"]
        else:
            own = getattr(self.whole.table, budget.metric)()
        self.target = budget.target(own)
        aim = self.target * (HEADROOM if budget.metric == "latency" else 1.0)
        rounds = self.request.rounds if aim < own else 1
        counts = budget.metric != "latency"
        for number in range(len(self.state.rounds) + 1, rounds + 1):
            self._round(own * (aim / own) ** (number / rounds), counts and self.request.reallocate and number == rounds)
        if not counts:
            self._meet(aim, rounds)

    def _round(self, target: float, reallocate: bool) -> None:
        """Score the network that stands, cut it to `target`, and keep the result."""
        model = self._load(self.state.network)
        parts, scores = self._scores(model, f"round {len(self.state.rounds) + 1}")
        self._apply(model, parts, scores, target, reallocate)

    def _scores(self, model: nn.Module, what: str) -> tuple[Anatomy, Scores]:
        from pruning.importance import score
        from pruning.units import anatomy

        if not self._batches:
            self._batches = [
                (x.to(self.job.device), y.to(self.job.device)) for x, y in self.job.batches(self.job.calibration)
            ]
        parts = anatomy(model.arch)
        with self.job.phase("scoring") as progress:

            def watched() -> Iterator[tuple[Tensor, Tensor]]:
                done, total = 0, sum(len(labels) for _, labels in self._batches)
                for images, labels in in_turn(self._batches):
                    progress(done, total)
                    yield images, labels
                    done += len(labels)
                progress(done, total)

            scores = score(model, parts, watched(), self.request.criterion, self.request.seed)
        if "importance" not in self.state.found:
            self.state.found["importance"] = importance_rows(parts, scores)
        return parts, scores

    def _apply(self, model: nn.Module, parts: Anatomy, scores: Scores, target: float, reallocate: bool) -> float:
        """Cut the network to an estimated cost of `target`, keep it as a round; returns its cost (ms: measured)."""
        import torch

        from pruning import slice_weights
        from pruning.allocation import allocate
        from pruning.units import cut
        from search_spaces import create_model, table

        number = len(self.state.rounds) + 1
        costs = self._costs(parts)
        with self.job.phase("cutting"):
            settings = allocate(parts, scores, costs, target, self.request.kinds, self.request.multiple_of, reallocate)
            found = cut(parts, scores, settings)
            generator = torch.Generator().manual_seed(self.request.seed)
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            weights = slice_weights(parts.arch, state, found.arch, found.select, found.blocks, generator)
            child = create_model(found.arch)
            child.load_state_dict(weights)
        counts = table(found.arch)
        metric = self.request.budget.metric
        reached = self._side_by_side(child.arch) if metric == "latency" else getattr(counts, metric)()
        origins = self.state.origins
        self.state.origins = {ours: origins.get(theirs, theirs) for ours, theirs in found.blocks.items()}
        self.state.rounds.append(
            {
                "round": number,
                "target": target,
                "reached": reached,
                "reallocated": reallocate,
                "params": counts.params(),
                "macs": counts.macs(),
            }
        )
        self._keep(f"round-{number}", child)
        self.job.say(
            f"round {number}: {show('macs', counts.macs())}, {show('params', counts.params())}"
            + (f", {show('latency', reached)}" if metric == "latency" else "")
        )
        return reached

    # Latency

    def _costs(self, parts: Anatomy) -> Any:
        from pruning.allocation import Costs

        metric = self.request.budget.metric
        if metric != "latency":
            return Costs(parts, metric)
        known = rates(self.state.found["costs"])
        of_knobs = {knob.name: known.get(group_of(knob.width, knob.kind), 0.0) for knob in parts.knobs}
        base = self.state.rounds[-1]["reached"] if self.state.rounds else self.state.found["own"]
        return Costs(parts, "macs", of_knobs, base)

    def _meet(self, aim: float, rounds: int) -> None:
        """Cut further while the measured latency is over the budget; then reallocate within it."""
        while self._reached() > aim and len(self.state.rounds) < rounds + CORRECTIONS:
            self._round(aim, reallocate=False)
        if not self.request.reallocate or self._reached() > self.target or self.state.rounds[-1]["reallocated"]:
            return
        standing, done, origins = self.state.network, list(self.state.rounds), self.state.origins
        model = self._load(standing)
        parts, scores = self._scores(model, "reallocation")
        target = aim
        for _ in range(CORRECTIONS):
            if (reached := self._apply(model, parts, scores, target, reallocate=True)) <= self.target:
                return
            target *= aim / reached
            self.job.say(f"over the budget as measured; again, for an estimate of {show('latency', target)}")
            self.state.network, self.state.rounds, self.state.origins = standing, list(done), origins
        self.job.note("no reallocation met the latency budget as measured: units were cut only")
        self.job.save()

    def _reached(self) -> float:
        return self.state.rounds[-1]["reached"] if self.state.rounds else self.state.found["own"]

    def _measured_costs(self) -> tuple[list[dict[str, Any]], float]:
        """What each group of knobs saves as measured, as rows; and the whole network's latency in ms."""
        with self.job.phase("measuring costs") as progress:
            savings, own = measure_savings(
                self.whole,
                self.request.kinds,
                self.request.multiple_of,
                lambda archs, rounds: self._compare(archs, rounds, progress),
            )
        rows = [saving.row() for saving in savings]
        if line := left_alone(rows):
            self.job.note(line)
        return rows, own

    def _side_by_side(self, arch: Arch) -> float:
        """The network's latency in ms beside the whole one; for a relative budget in the first run's milliseconds."""
        with self.job.phase("measuring") as progress:
            results = self._compare({"whole": self.dense.arch, "cut": arch}, COST_ROUNDS, progress)
        if not self.request.budget.relative:
            return results["cut"].p50_ms
        return paired_ratio(results["cut"], results["whole"])[0] * self.state.found["own"]

    def _compare(
        self, archs: Mapping[str, Arch], rounds: int, progress: Callable[[int, int], None]
    ) -> dict[str, Measurement]:
        """Measure untrained copies side by side: latency does not depend on weights."""
        results = steps.measured(archs, self._export, self.request, rounds, progress)
        if line := steps.waiting_line(results, self.request.settings):
            raise UserError(f"{line}; the same command then goes on")
        return results

    def _export(self, arch: Arch, stem: Path) -> Path:
        try:
            return write_artifact(arch, self.request.settings, stem)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"this network cannot be exported: {first_line(error)}") from None

    # Recovery, results

    def _recover(self) -> None:
        model = self._load(self.state.network)
        if self.state.network != "tuned":
            self.job.accuracy(model, "pruned")
            with self.end.step("fine-tuning"):
                steps.tune(self.job, self.request, model, self.dense)
                self._keep("tuned", model)
            self._stop_if_interrupted()
            if self.state.network != "tuned":
                model = self._load(self.state.network)
        self.stands = steps.judge_tuned(self.job, model)
        if self.stands == "pruned" and "recovered" in self.state.found:
            model = self._load(f"round-{len(self.state.rounds)}")
        self.model = model
        save_model(model.cpu(), self.request.folder)
        with self.end.step("control"):
            steps.tune_control(self.job, self.request, lambda: self._load("dense"))
        self._stop_if_interrupted()

    def _write(self) -> dict[str, Any]:
        from nas.data.dataset import some_of
        from search_spaces import table

        request = self.request
        archs = {"before": self.dense.arch, "after": self.model.arch}
        results: dict[str, Measurement] = {}
        with self.end.step("model.onnx"), self.job.phase("exporting"):
            images = some_of(self.job.evaluated)
            judged = self.state.found[self.stands]
            card = Card.of(self.job.data, judged["top1"], judged["images"])
            save_onnx(self.model, request.folder, request.settings.batch_size, trained=True, card=card, images=images)
        with self.end.step("closing run"), self.job.phase("closing run") as progress:
            results = steps.closing_run(archs, self._export, self.request, progress)
        self._stop_if_interrupted()
        blocks = block_rows(self.dense.arch, self.model.arch, self.state.origins)
        if any(row["before"]["heads"] for row in blocks) and not any(
            row["after"] and row["after"]["heads"] for row in blocks
        ):
            self.job.note("no attention is left: on these images it was worth less than it costs")
        networks = {}
        for name, arch in archs.items():
            counts = table(arch)
            networks[name] = network_row(counts.params(), counts.macs(), results.get(name), request.settings)
            networks[name]["arch"] = json.loads(arch.to_json())
        details = {
            "family": self.model.arch.family,
            "resolution": self.model.arch.resolution,
            "blocks": blocks,
            "importance": self.state.found["importance"],
            "costs": self.state.found.get("costs"),
        }
        return write_results(self.job, request, self.command, self.stands, networks, results, details, self.end)

    def _stop_if_interrupted(self) -> None:
        if self.end.interrupted:
            raise KeyboardInterrupt


def trained_on(folder: Path) -> str | None:
    """The --data of the run that made a network, as its folder says; None where it does not, or there was none."""
    for name in ("metrics.json", "prune.json"):
        try:
            found = json.loads((folder / name).read_text())["options"]["data"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, str):
            return found
    return None
