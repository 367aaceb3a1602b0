"""`vitnas prune`: score, cut, grow, recover, measure; a folder that says what was done and what it bought."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nas.data.about import announce
from nas.data.inputs import identity
from nas.ending import Ending
from nas.errors import UserError
from nas.export.artifact import save_model, save_onnx, save_weights, write_artifact
from nas.export.card import Card
from nas.files import job_folder, replace_file, scratch
from nas.intervals import Interval, agreement, of_difference
from nas.job import Progress, Say, default_folder_of, now
from nas.lock import in_turn
from nas.measure.budget import LatencyBudget, Verdict
from nas.measure.device import compare, device_lock
from nas.measure.protocol import MeasureError, Measurement, paired_ratio, quanta, quanta_line
from nas.measure.runtime import Settings
from nas.networks.targets import TIMM
from nas.prune.images import PruneJob, compute_device
from nas.prune.savings import group_of, left_alone, measure_savings, rates, stage_of
from nas.report.page import significant
from nas.text import first_line
from nas.units import counted, parse_budget, parse_count, parse_share

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pruning.units import Anatomy, Scores
    from search_spaces import Arch

"""Begins the names of networks outside the five families."""
BRIEF_IMAGES = 4_500
"""Images that train a network which comes without weights, or whose classifier does."""
BRIEF_LR = 1e-3
FINETUNE_LR = 1e-4
CALIBRATED_ON_NOISE = (
    "the int8 files that are timed are calibrated on noise: latency is real, nothing is said of accuracy"
)
CLOSING_ROUNDS = 30
MOST_ROUNDS = 120
"""Of the closing run in all, while it leaves open whether a latency budget is met."""
PARTS = ("before", "after", "accuracy", "budget", "data")
"""What a prune.json must hold to be told again."""
COST_ROUNDS = 10
CORRECTIONS = 3
"""More rounds, or tries, when the measured latency misses the budget that its estimate met."""
HEADROOM = 0.98
"""Share of a latency budget that is aimed at: the closing run is another run."""

ACCURACIES = {
    "before": "before pruning",
    "pruned": "right after pruning",
    "recovered": "pruned, fine-tuned",
    "control": "unpruned, fine-tuned alike",
}

Metric = Literal["macs", "params", "latency"]


@dataclass(frozen=True)
class Budget:
    """What a pruned network may cost: `amount` of the metric (MACs, parameters, ms), or that share of the network's
    own."""

    metric: Metric
    amount: float
    relative: bool
    text: str

    def target(self, own: float) -> float:
        """The budget in the metric's unit, for a network whose own figure is `own`.

        Raises:
            UserError: the network is within the budget already.
        """
        if not self.relative and self.amount > own:
            raise UserError(
                f"--{self.option} {self.text} is above the network's own {show(self.metric, own)}: lower it"
            )
        return self.amount * own if self.relative else self.amount

    @property
    def option(self) -> str:
        return "latency-budget" if self.metric == "latency" else self.metric


@dataclass(frozen=True)
class Options:
    """A pruning as asked for. kinds, criterion: keys of `pruning.KINDS` and `pruning.CRITERIA`. control: fine-tune the
    unpruned network alike, to compare with."""

    model: str
    budget: Budget
    settings: Settings
    folder: Path
    reallocate: bool = True
    kinds: tuple[str, ...] = ()
    criterion: str = "taylor"
    multiple_of: int = 8
    rounds: int = 3
    finetune: float = 1.0
    distill: bool = False
    control: bool = True
    data: str | None = None
    weights: str | None = None
    num_classes: int | None = None
    seed: int = 0

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to go on."""
        found = asdict(self) | {"data": str(self.data) if self.data else None}
        del found["folder"], found["control"]
        return json.loads(json.dumps(found))

    def check(self) -> None:
        """Raises UserError for what no network could satisfy."""
        from pruning.importance import CRITERIA

        if self.criterion not in CRITERIA:
            raise UserError(f"unknown --criterion {self.criterion!r}: choose from {', '.join(CRITERIA)}")
        if self.budget.relative and self.budget.amount == 1 and not self.reallocate:
            raise UserError(f"--{self.budget.option} 1x with --no-reallocate leaves nothing to do: lower the budget")
        for name, value, least in (("rounds", self.rounds, 1), ("multiple-of", self.multiple_of, 1)):
            if value < least:
                raise UserError(f"--{name} is {value}: give {least} or more")
        if not 0 <= self.finetune < 1e4:
            raise UserError(f"--finetune is {self.finetune:g}: give a number of epochs, 0 for none")


def parse_pruning_budget(macs: str | None, params: str | None, latency: str | None) -> Budget:
    """The one budget given; 0.5x of the MACs without any.

    Raises:
        UserError: more than one, or one that cannot be read.
    """
    given: list[tuple[Metric, str]] = [
        (metric, text)
        for metric, text in (("macs", macs), ("params", params), ("latency", latency))
        if text is not None
    ]
    if len(given) > 1:
        raise UserError("give one budget: --macs, --params or --latency-budget")
    metric, text = given[0] if given else ("macs", "0.5x")
    share = parse_share(text)
    if share is None and re.fullmatch(r"\s*(0?\.\d+|1(\.0*)?)\s*", text):
        raise UserError(
            f"--{'latency-budget' if metric == 'latency' else metric} {text}: did you mean {text.strip()}x of the "
            f"network's own{f', or {text.strip()}ms' if metric == 'latency' else ''}?"
        )
    if share is not None:
        return Budget(metric, share, True, text)
    return Budget(metric, parse_budget(text) if metric == "latency" else parse_count(text), False, text)


def kinds_of(axes: str) -> tuple[str, ...]:
    """Checked `--axes`, in the order of `pruning.KINDS`."""
    from pruning.units import KINDS

    names = [name.strip() for name in axes.split(",") if name.strip()]
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise UserError(f"--axes {axes!r}: choose from {','.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in names)


def default_folder(model: str, budget: Budget) -> Path:
    """runs/prune-<model>-<budget>."""
    return default_folder_of("prune", model, f"{budget.option.split('-')[0]}-{budget.text.strip()}")


def prune(options: Options, command: str, say: Say, progress: Progress) -> dict[str, Any]:
    """Prune a network as `options` say; writes the folder's files and returns the report's data.

    Raises:
        UserError: anything that the user can put right.
    """
    from pruning.allocation import BudgetError
    from pruning.importance import ImportanceError
    from search_spaces import ArchError

    try:
        with job_folder(options.folder):
            if options.model.startswith(TIMM):
                from nas.prune.outside import prune_outside

                return prune_outside(options, command, say, progress)
            return _Run(options, command, say, progress).run()
    except BudgetError as error:
        budget = options.budget
        raise UserError(
            f"--{budget.option} {budget.text} cannot be reached: the minimum widths of "
            f"--axes {','.join(options.kinds)} come to {show(budget.metric, error.reachable)}"
            + "; what showed no saving as measured is left alone"
            * (budget.metric == "latency")
        ) from None
    except (ImportanceError, ArchError) as error:
        raise UserError(str(error)) from None


class _Run:
    """One run of the command, from its folder's state to its report."""

    def __init__(self, options: Options, command: str, say: Say, progress: Progress) -> None:
        self.options, self.command = options, command
        self.job = PruneJob(options.folder, options.fingerprint(), say, progress, compute_device(options.settings))
        self.state, self.end = self.job.state, Ending(say)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def run(self) -> dict[str, Any]:
        from pruning.units import anatomy

        arch, weights = self._source()
        options = self.options
        self.job.open_data(options.data, arch.resolution, options.num_classes, options.seed, weights)
        self.job.agree(identity(self.job.data, model=(arch, weights)))
        if self.job.finished:
            self.job.say(f"{self.options.folder} is finished: these are its results")
            return self.job.read_result(*PARTS)
        if self.options.settings.precision != "fp32":
            self.job.say(f"latency is measured in {self.options.settings.precision}; accuracy and model.onnx are fp32")
        if self.options.settings.precision == "int8":
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

        target = find_target(self.options.model)
        if target.folder is not None and self.options.data is None and (known := trained_on(target.folder)):
            self.job.note(f"{self.options.model} was trained on {known}: --data {known} prunes it on those images")
        if target.arch is None:
            raise UserError(f"{self.options.model} is an ONNX file: give a published name, an arch.json or a folder")
        if self.options.weights is not None:
            return target.arch, self.options.weights
        if target.weights is not None:
            return target.arch, target.weights
        return target.arch, "timm" if self.options.data is not None and target.folder is None else None

    def _check_budget(self) -> None:
        """Refuse a budget that counting alone shows to be above the network's own, or out of reach."""
        from pruning.allocation import Costs, allocate
        from pruning.units import indifferent

        options, parts = self.options, self.whole
        metric = options.budget.metric
        if metric != "latency":
            target = options.budget.target(getattr(parts.table, metric)())
            allocate(parts, indifferent(parts), Costs(parts, metric), target, options.kinds, options.multiple_of)

    def _dense(self, arch: Arch, weights: str | Path | None) -> None:
        """The network to prune, trained: with weights that fit, or briefly on the data."""
        if self.state.network:
            announce(self.job.data, self.job.say, self.job.note)
            self.dense = self._load("dense")
            return
        model, untrained = self._with_weights(arch, weights)
        announce(self.job.data, self.job.say, self.job.note)
        say_plan(self.job, self.options, untrained)
        if untrained:
            train_briefly(self.job, model)
        self.dense = model.eval().to(self.job.device)
        self._keep("dense", model)

    def _with_weights(self, arch: Arch, weights: str | Path | None) -> tuple[nn.Module, bool]:
        import warnings

        import torch

        from search_spaces import create_model
        from search_spaces.checkpoints import WeightsError

        torch.manual_seed(self.options.seed)
        what = brief_line(self.job)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = create_model(arch, weights=weights)
        except WeightsError as error:
            if weights != "timm" or self.options.weights is not None:
                raise UserError(str(error)) from None
            self.job.note(f"no pretrained weights ({error}); {what}")
            return create_model(arch), True
        if weights is None:
            self.job.note(f"no weights given{'' if self.options.data else ' and no --data'}; {what}")
        elif model.untrained:
            self.job.note(f"weights {weights} have another classifier or none; {what}")
        elif self.job.data.demo:
            self.job.note(f"no --data: pruned, tuned and evaluated on {self.job.data.name}")
        if model.loaded and model.loaded.told:
            self.job.note(f"{weights}: {model.loaded.told}")
        self.state.found["weights"] = str(weights) if weights else None
        return model, bool(model.untrained)

    # Rounds

    def _rounds(self) -> None:
        self.job.accuracy(self.dense, "before")
        budget = self.options.budget
        if budget.metric == "latency":
            if "costs" not in self.state.found:
                self.state.found["costs"], self.state.found["own"] = self._measured_costs()
                self.job.save()
            own = self.state.found["own"]
        else:
            own = getattr(self.whole.table, budget.metric)()
        self.target = budget.target(own)
        aim = self.target * (HEADROOM if budget.metric == "latency" else 1.0)
        rounds = self.options.rounds if aim < own else 1
        counts = budget.metric != "latency"
        for number in range(len(self.state.rounds) + 1, rounds + 1):
            self._round(own * (aim / own) ** (number / rounds), counts and self.options.reallocate and number == rounds)
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

            scores = score(model, parts, watched(), self.options.criterion, self.options.seed)
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
            settings = allocate(parts, scores, costs, target, self.options.kinds, self.options.multiple_of, reallocate)
            found = cut(parts, scores, settings)
            generator = torch.Generator().manual_seed(self.options.seed)
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            weights = slice_weights(parts.arch, state, found.arch, found.select, found.blocks, generator)
            child = create_model(found.arch)
            child.load_state_dict(weights)
        counts = table(found.arch)
        metric = self.options.budget.metric
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

        metric = self.options.budget.metric
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
        if not self.options.reallocate or self._reached() > self.target or self.state.rounds[-1]["reallocated"]:
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
                self.options.kinds,
                self.options.multiple_of,
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
        if not self.options.budget.relative:
            return results["cut"].p50_ms
        return paired_ratio(results["cut"], results["whole"])[0] * self.state.found["own"]

    def _compare(
        self,
        archs: Mapping[str, Arch],
        rounds: int,
        progress: Callable[[int, int], None],
        budget: Budget | None = None,
    ) -> dict[str, Measurement]:
        """Measure untrained copies side by side: latency does not depend on weights. budget: as `closing_run` has it,
        which is then made."""
        settings = self.options.settings
        with scratch(self.options.folder) as folder, device_lock(settings.device):
            paths = {}
            for i, (name, arch) in enumerate(archs.items()):
                try:
                    paths[name] = write_artifact(arch, settings, folder / str(i))
                except (RuntimeError, ValueError) as error:
                    raise UserError(f"this network cannot be exported: {first_line(error)}") from None
            if budget is not None:
                return closing_run(paths, settings, budget, progress)
            results = measured(paths, settings, rounds, progress)
        if line := waiting_line(results, settings):
            raise UserError(f"{line}; the same command then goes on")
        return results

    # Recovery, results

    def _recover(self) -> None:
        model = self._load(self.state.network)
        if self.state.network != "tuned":
            self.job.accuracy(model, "pruned")
            with self.end.step("fine-tuning"):
                tune(self.job, self.options, model, self.dense)
                self._keep("tuned", model)
            self._stop_if_interrupted()
            if self.state.network != "tuned":
                model = self._load(self.state.network)
        self.stands = judge_tuned(self.job, model)
        if self.stands == "pruned" and "recovered" in self.state.found:
            model = self._load(f"round-{len(self.state.rounds)}")
        self.model = model
        save_model(model.cpu(), self.options.folder)
        with self.end.step("control"):
            tune_control(self.job, self.options, lambda: self._load("dense"))
        self._stop_if_interrupted()

    def _write(self) -> dict[str, Any]:
        from nas.data.dataset import some_of
        from search_spaces import table

        options = self.options
        archs = {"before": self.dense.arch, "after": self.model.arch}
        results: dict[str, Measurement] = {}
        with self.end.step("model.onnx"), self.job.phase("exporting"):
            images = some_of(self.job.evaluated)
            judged = self.state.found[self.stands]
            card = Card.of(self.job.data, judged["top1"], judged["images"])
            save_onnx(self.model, options.folder, options.settings.batch_size, trained=True, card=card, images=images)
        with self.end.step("closing run"), self.job.phase("closing run") as progress:
            results = self._compare(archs, CLOSING_ROUNDS, progress, self.options.budget)
        self._stop_if_interrupted()
        blocks = block_rows(self.dense.arch, self.model.arch, self.state.origins)
        if any(row["before"]["heads"] for row in blocks) and not any(
            row["after"] and row["after"]["heads"] for row in blocks
        ):
            self.job.note("no attention is left: on these images it was worth less than it costs")
        networks = {}
        for name, arch in archs.items():
            counts = table(arch)
            networks[name] = network_row(counts.params(), counts.macs(), results.get(name), options.settings)
            networks[name]["arch"] = json.loads(arch.to_json())
        details = {
            "family": self.model.arch.family,
            "resolution": self.model.arch.resolution,
            "blocks": blocks,
            "importance": self.state.found["importance"],
            "costs": self.state.found.get("costs"),
        }
        return write_results(self.job, options, self.command, self.stands, networks, results, details, self.end)

    def _stop_if_interrupted(self) -> None:
        if self.end.interrupted:
            raise KeyboardInterrupt


def measured(
    paths: Mapping[str, Path], settings: Settings, rounds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Measurement]:
    """`compare`, where every network must be measured.

    Raises:
        UserError: one that could not be.
    """
    results = compare(paths, settings, rounds, progress)
    for name, result in results.items():
        if isinstance(result, MeasureError):
            raise UserError(f"{name or 'the network'} could not be measured: {result}")
    return results


def waiting_line(results: Mapping[str, Measurement], settings: Settings) -> str | None:
    """What is said of latencies that are waiting times (see `quanta`); None where none is one."""
    from nas.measure.hardware import describe

    return quanta_line(describe(settings)) if any(map(quanta, results.values())) else None


def closing_run(
    paths: Mapping[str, Path], settings: Settings, budget: Budget, progress: Callable[[int, int], None] | None = None
) -> dict[str, Measurement]:
    """Both networks, "before" and "after", in one interleaved run; longer, up to `MOST_ROUNDS` rounds, while it leaves
    open whether the latency budget is met."""
    results, rounds = measured(paths, settings, CLOSING_ROUNDS, progress), CLOSING_ROUNDS
    while rounds < MOST_ROUNDS and latency_verdict(budget, results)[0] == Verdict.UNSURE:
        longer = measured(paths, settings, CLOSING_ROUNDS, progress)
        results = {
            name: replace(found, rounds_ms=found.rounds_ms + longer[name].rounds_ms) for name, found in results.items()
        }
        rounds += CLOSING_ROUNDS
    return results


def latency_verdict(
    budget: Budget, results: Mapping[str, Measurement]
) -> tuple[Verdict | None, tuple[float, float] | None]:
    """What the closing run says of a latency budget, and the 95% interval in ms that says it; None of other budgets,
    and where its latencies are waiting times.

    For a share of the network's own latency it is that of the paired ratio, in which the machine's drift is left out.
    """
    if budget.metric != "latency" or not results or any(map(quanta, results.values())):
        return None, None
    before, after = results["before"], results["after"]
    low, high = after.ci_ms
    if budget.relative:
        low, high = (end * before.p50_ms for end in paired_ratio(after, before)[1])
    interval = min(low, after.p50_ms), max(high, after.p50_ms)
    return LatencyBudget(budget.amount * (before.p50_ms if budget.relative else 1)).judge(interval), interval


def worse_after_tuning(found: Mapping[str, Any]) -> bool:
    """Whether fine-tuning was a loss: the 95% interval of the difference, image by image, is below 0."""
    return beside(found["recovered"], found["pruned"])["verdict"] == "less accurate"


def train_briefly(job: PruneJob, model: nn.Module) -> None:
    """Train a network that comes without weights, or whose classifier does."""
    job.fit("training", model, BRIEF_IMAGES, BRIEF_LR)
    job.state.found["trained_images"] = BRIEF_IMAGES


def tune(job: PruneJob, options: Options, model: nn.Module, dense: nn.Module) -> None:
    """Fine-tune a pruned network for the epochs asked for, if asked from the unpruned one."""
    images = round(options.finetune * len(job.data.train))
    if images:
        job.fit("fine-tuning", model, images, FINETUNE_LR, dense if options.distill else None)
        job.state.found["tuned_images"] = images


def tune_control(job: PruneJob, options: Options, load: Callable[[], nn.Module]) -> None:
    """Give the unpruned network the same fine-tuning as the pruned one, and judge it.

    load: makes the unpruned network anew.
    """
    found = job.state.found
    if not found.get("tuned_images") or "control" in found:
        return
    if not options.control:
        job.note("no control (--no-control): what the unpruned network gains by the same fine-tuning is unknown")
        return
    from safetensors.torch import load_file

    path, model = job.kept / "control.safetensors", load()
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        teacher = load() if options.distill else None
        job.fit("control: fine-tuning the unpruned", model, found["tuned_images"], FINETUNE_LR, teacher)
        save_weights(model, path)
    job.accuracy(model, "control")


def judge_tuned(job: PruneJob, model: nn.Module) -> str:
    """Judge the fine-tuned network, if it was; returns which weights are kept, by their key in `ACCURACIES`."""
    if not job.state.found.get("tuned_images"):
        return "pruned"
    job.accuracy(model, "recovered")
    if not worse_after_tuning(job.state.found):
        return "recovered"
    job.note("fine-tuning lowered the accuracy: the weights before it are kept; try more --finetune epochs")
    return "pruned"


def say_plan(job: PruneJob, options: Options, untrained: bool) -> None:
    """What is going to happen, before anything long begins. untrained: the network is first trained here."""
    train = len(job.data.train)
    tuned = round(options.finetune * train)
    steps = [f"training on {passes(BRIEF_IMAGES, train)}"] if untrained else []
    if options.budget.metric == "latency":
        steps.append("measuring what each part costs")
    steps.append(f"{counted(options.rounds, 'round')} of scoring {len(job.calibration):,} images and cutting")
    if tuned:
        steps.append(f"fine-tuning on {passes(tuned, train)}")
        steps += ["the same for the unpruned network, as a control"] * options.control
    job.say(f"to do: {'; '.join([*steps, f'a closing run of {CLOSING_ROUNDS} rounds'])}")


def passes(images: int, train: int) -> str:
    """How many images a training draws from a set of `train`, as words: 4,500 images (375 passes over 12)."""
    over = f" ({images / train:.3g} passes over {train:,})" if images > train else ""
    return f"{images:,} images{over}"


def brief_line(job: PruneJob) -> str:
    """What is said of a network that is trained here first."""
    trained = f"the network is briefly trained on {passes(BRIEF_IMAGES, len(job.data.train))} of {job.data.name}"
    return f"{trained}: its figures say nothing of ImageNet"


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


def network_row(params: int, macs: int, latency: Measurement | None, settings: Settings) -> dict[str, Any]:
    """Counts and closing latency of one network; without one its fields are None. waiting: as `quanta` has it."""
    row = {"params": params, "macs": macs}
    if latency is None:
        return row | dict.fromkeys(("latency_ms", "p95_ms", "ci", "samples", "throughput", "waiting"))
    return row | {
        "latency_ms": latency.p50_ms,
        "p95_ms": latency.p95_ms,
        "ci": list(latency.ci_ms),
        "samples": latency.n,
        "throughput": latency.throughput(settings.batch_size),
        "waiting": quanta(latency),
    }


def write_results(
    job: PruneJob,
    options: Options,
    command: str,
    kept: str,
    networks: Mapping[str, dict[str, Any]],
    results: Mapping[str, Measurement],
    details: Mapping[str, Any],
    end: Ending,
) -> dict[str, Any]:
    """Write prune.json and report.html; returns their data.

    kept: as `judge_tuned` has it. results: latencies of the closing run, "before" and "after".

    The run is finished where no step of its end has failed; else the same command goes on. A latency budget is not
    judged by waiting times: that closing run has failed.
    """
    from nas.data.lineage import record
    from nas.measure.hardware import describe
    from nas.prune.report import write_report

    before, after = networks["before"], networks["after"]
    key = "latency_ms" if options.budget.metric == "latency" else options.budget.metric
    target = options.budget.amount
    if options.budget.relative:
        target = None if before[key] is None else target * before[key]
    verdict, interval = latency_verdict(options.budget, results)
    waiting = waiting_line(results, options.settings)
    if waiting and options.budget.metric == "latency":
        end.fail("closing run", waiting)
    elif verdict is None and after[key] is not None:
        verdict = Verdict.FITS if after[key] <= target else Verdict.OVER
    if verdict == Verdict.UNSURE:
        job.note(
            f"the latency may be within {show('latency', target)} or over it, also after {MOST_ROUNDS} rounds: 95% "
            f"{interval[0]:.3g} to {interval[1]:.3g} ms"
        )
    found = job.state.found
    accuracy = {which: row and accuracy_row(row) for which in ACCURACIES for row in [found.get(which)]}
    data = {
        "model": options.model,
        "command": command,
        "started": job.state.started,
        "finished": now(),
        "options": options.fingerprint(),
        "settings": asdict(options.settings),
        "hardware": describe(options.settings),
        "data": job.describe_data(),
        "weights": found.get("weights"),
        "trained_images": found.get("trained_images", 0),
        "tuned_images": found.get("tuned_images", 0),
        "budget": {
            "metric": options.budget.metric,
            "text": options.budget.text,
            "target": target,
            "reached": after[key],
            "interval": interval and list(interval),
            "verdict": verdict,
            "met": verdict == Verdict.FITS,
        },
        "waiting": waiting,
        "before": before,
        "after": after,
        "accuracy": accuracy,
        "kept": kept,
        "tuning": beside(found["recovered"], found["pruned"]) if "recovered" in found else None,
        "control": beside(found[kept], found["control"]) if "control" in found else None,
        "rounds": job.state.rounds,
        "notes": job.state.notes,
        "phases": job.state.phases,
        "failures": end.failures,
        **details,
    }
    trained_on = job.data.train if data["trained_images"] or data["tuned_images"] else job.data.train.pick([])
    data["seen"] = record(options.folder, trained_on, found.get("weights"))
    with end.step("report"):
        write_report(options.folder, data)
    if not end.failures and not end.interrupted:
        job.finish()
    return data | {"failures": end.failures}


def accuracy_row(found: Mapping[str, Any]) -> dict[str, Any]:
    """An accuracy as prune.json has it: top1 and top1_ci (95%) in percent, loss, images."""
    return {"top1": found["top1"], "top1_ci": list(found["ci"]), "loss": found["loss"], "images": found["images"]}


def beside(first_row: Mapping[str, Any], other_row: Mapping[str, Any]) -> dict[str, Any]:
    """Points of top-1 that the first network has more than the other one.

    first_row, other_row: as `PruneJob.accuracy` keeps them. ci: the 95% interval, image by image; where an earlier
    version did not keep each answer, as if they were judged on different images: too wide rather than too narrow.
    """
    (one, first), (other, second) = ((row["top1"], Interval(*row["ci"])) for row in (first_row, other_row))
    hits = ([[digit == "1" for digit in row["hits"]]] if row.get("hits") else [] for row in (first_row, other_row))
    interval = of_difference(one, first, other, second, agreement(*hits)).clipped(-100.0, 100.0)
    verdict = "tie" if interval.holds(0) else "more accurate" if one > other else "less accurate"
    return {"difference": one - other, "ci": [interval.low, interval.high], "verdict": verdict}


def importance_rows(parts: Anatomy, scores: Scores) -> list[dict[str, Any]]:
    """A row for each knob of the whole network: its units, their importance, and what they cost together."""
    from pruning.allocation import Costs

    costs = Costs(parts, "macs")
    rows = []
    for knob in parts.knobs:
        values = knob.importance(scores).sum(axis=0)
        rows.append(
            {
                "name": knob.name,
                "kind": knob.kind,
                "units": knob.size,
                "importance": float(values.sum()),
                "least": float(values.min()),
                "most": float(values.max()),
                "macs": -costs.difference(knob, -knob.size, parts.sizes, ()),
            }
        )
    return rows


def block_rows(before: Arch, after: Arch, origins: Mapping[str, str]) -> list[dict[str, Any]]:
    """Widths of every block of `before` and of what became of it, by the path it had; `after` is None where it went."""
    left = {origins.get(path, path): widths for path, widths in block_widths(after).items()}
    return [{"block": path, "before": widths, "after": left.get(path)} for path, widths in block_widths(before).items()]


def block_widths(arch: Arch) -> dict[str, dict[str, float]]:
    """embed, heads, qk and v (per head: means; in qk_range and v_range the least and the most), ffn (hidden units in
    all) and ratio (ffn / embed), by block path."""
    from search_spaces import table

    found: dict[str, dict[str, list[int]]] = {}
    sizes = {name: width.size for name, width in table(arch).widths().items()}
    for name, size in sizes.items():
        *path, last = name.split(".")
        for i, part in enumerate(path):
            if part in ("blocks", "downsample"):
                block = ".".join(path[: i + (2 if part == "blocks" else 1)])
                key = {"hidden": "ffn"}.get(last, last)
                if last == "dim" and path[-2:-1] == ["heads"] and path[-1] != "0":
                    key = "v"  # in a cascade, what a head reads is as wide as the values of the head before it
                found.setdefault(block, {}).setdefault(key, []).append(size)
                break
    rows = {}
    for block, widths in found.items():
        stage = stage_of(block)
        embed = sizes[f"{stage}.embed" if stage else "embed"]
        heads = widths.get("heads", [0])[0]
        each = {key: widths.get(key, [0]) for key in ("qk", "v")}
        ffn = sum(widths.get("ffn", []))
        rows[block] = {
            "embed": embed,
            "heads": heads,
            **{key: sum(of_heads) / len(of_heads) for key, of_heads in each.items()},
            **{f"{key}_range": [min(of_heads), max(of_heads)] for key, of_heads in each.items()},
            "ffn": ffn,
            "ratio": ffn / embed,
        }
    return rows


def show(metric: str, amount: float) -> str:
    """An amount with its unit."""
    if metric == "latency":
        return f"{significant(amount)} ms"
    unit = {"macs": "MMACs", "params": "M parameters"}[metric]
    return f"{significant(amount / 1e6)} {unit}"
