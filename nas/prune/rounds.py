"""The rounds of a pruning: score the network that stands, cut it, keep what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from nas.errors import UserError
from nas.export.artifact import write_artifact
from nas.export.folder import save_weights
from nas.files import replace_file
from nas.lock import in_turn
from nas.measure.samples import Measurement, paired_ratio
from nas.prune import steps
from nas.prune.images import PruneJob
from nas.prune.records import Round
from nas.prune.request import PruneRequest, show
from nas.prune.savings import Saving, fixed, left_alone, measure_savings, rates
from nas.prune.widths import Importance, group_of, importance_rows
from nas.text import first_line
from nas.units import counted

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.allocation import Costs
    from pruning.units import Anatomy, Scores, Settings
    from search_spaces import Arch
    from search_spaces.network import Network

COST_ROUNDS = 10
CORRECTIONS = 3
"""More rounds, or tries, when the measured latency misses the budget that its estimate met."""
HEADROOM = 0.98
"""Share of a latency budget that is aimed at: the closing run is another run."""


def keep_network(job: PruneJob, name: str, model: Network) -> None:
    """Save a network under a name, then make it the one that stands."""
    save_weights(model, job.kept / f"{name}.safetensors")
    replace_file(job.kept / f"{name}.json", model.arch.to_json())
    job.state.network = name
    job.save()


def load_network(job: PruneJob, name: str) -> Network:
    """A network that `keep_network` saved, in eval mode on the device that trains."""
    from search_spaces import Arch, create_model

    arch = Arch.from_json((job.kept / f"{name}.json").read_bytes())
    return create_model(arch, weights=job.kept / f"{name}.safetensors").eval().to(job.device)


def export_untrained(arch: Arch, stem: Path, request: PruneRequest) -> Path:
    """Write the file that latency is measured of: latency does not depend on weights.

    Raises:
        UserError: the network cannot be exported.
    """
    try:
        return write_artifact(arch, request.settings, stem)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"this network cannot be exported: {first_line(error)}") from None


class Rounds:
    """The rounds of one pruning, which go on after the last one that is kept. whole: the unpruned network."""

    def __init__(self, job: PruneJob, request: PruneRequest, whole: Anatomy) -> None:
        self.job, self.request, self.whole = job, request, whole
        self.metric = request.budget.metric
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._inputs: Tensor | None = None

    def check_budget(self) -> None:
        """Refuse a budget that counting alone shows to be above the network's own, or out of reach.

        Raises:
            UserError: it is above the network's own.
            BudgetError: it is out of reach.
        """
        from pruning.allocation import Costs, allocate
        from pruning.units import equal_scores

        request, parts = self.request, self.whole
        if request.budget.metric != "latency":
            target = request.budget.target(self._count(parts.arch))
            costs = Costs(parts, request.budget.metric)
            allocate(parts, equal_scores(parts), costs, target, request.kinds, request.multiple_of)

    def run(self) -> None:
        """Cut the network to its budget; `state.network` names the one that stands.

        Raises:
            BudgetError: it is out of reach.
        """
        if "pruned" in self.job.state.found:
            return  # what was cut has been judged, and may be tuned
        counts = self.metric != "latency"
        if not counts and "costs" not in self.job.state.found:
            savings, own_ms = self._measured_savings()
            self.job.state.found["costs"] = [saving.to_json() for saving in savings]
            self.job.state.found["own"] = own_ms
            self.job.save()
        own, target = self._own, self._target
        aim = target * (1.0 if counts else HEADROOM)
        rounds = self.request.rounds if aim < own else 1
        for number in range(len(self.job.state.rounds) + 1, rounds + 1):
            reallocate = counts and self.request.reallocate and number == rounds
            if not self._round(own * (aim / own) ** (number / rounds), reallocate):
                break
        if not counts:
            self._meet(target, aim, rounds)

    @property
    def importance(self) -> tuple[Importance, ...]:
        """Of the unpruned network's knobs, as its first scores say."""
        return TypeAdapter(tuple[Importance, ...]).validate_python(self.job.state.found["importance"])

    @property
    def savings(self) -> tuple[Saving, ...] | None:
        """What each group of knobs saves as measured; None of budgets that are counted."""
        return TypeAdapter(tuple[Saving, ...] | None).validate_python(self.job.state.found.get("costs"))

    @property
    def _own(self) -> float:
        """What the unpruned network costs, in the budget's unit; its latency as the parts' costs were measured."""
        return self._count(self.whole.arch) if self.metric != "latency" else float(self.job.state.found["own"])

    @property
    def _target(self) -> float:
        """The budget, in its unit."""
        return self.request.budget.target(self._own)

    @property
    def _reached(self) -> float:
        """The latency that the last round reached, ms."""
        return float(self.job.state.rounds[-1]["reached"]) if self.job.state.rounds else self._own

    def _count(self, arch: Arch) -> float:
        """A network's MACs or parameters, whichever the budget is of."""
        from search_spaces import table

        counts = table(arch)
        return counts.params() if self.metric == "params" else counts.macs()

    def _round(self, target: float, reallocate: bool) -> bool:
        """Score the network that stands, cut it to `target`, and keep the result; False where nothing more can go from
        one that is within the budget.

        Raises:
            BudgetError: the budget is out of reach.
        """
        from pruning.allocation import BudgetError

        rounds = self.job.state.rounds
        model = load_network(self.job, self.job.state.network)
        parts, scores = self._scores(model, f"round {len(rounds) + 1}")
        try:
            self._apply(model, parts, scores, target, reallocate)
        except BudgetError:
            if not rounds or self._reached > self._target:
                raise
            return False
        return True

    def _scores(self, model: Network, what: str) -> tuple[Anatomy, Scores]:
        """A network's anatomy and the importance of its units. what: the round, in words."""
        from pruning.importance import score
        from pruning.units import anatomy

        job = self.job
        if not self._batches:
            self._batches = [(x.to(job.device), y.to(job.device)) for x, y in job.batches(job.calibration)]
        parts = anatomy(model.arch)
        with job.phase("scoring") as progress:

            def watched() -> Iterator[tuple[Tensor, Tensor]]:
                done, total = 0, sum(len(labels) for _, labels in self._batches)
                for images, labels in in_turn(self._batches):
                    progress(done, total)
                    yield images, labels
                    done += len(labels)
                progress(done, total)

            scores = score(model, parts, watched(), self.request.criterion, self.request.seed)
        if "importance" not in job.state.found:
            job.state.found["importance"] = [asdict(row) for row in importance_rows(parts, scores)]
        return parts, scores

    def _apply(self, model: Network, parts: Anatomy, scores: Scores, target: float, reallocate: bool) -> float:
        """Cut the network to an estimated cost of `target`, keep it as a round; returns its cost (ms: measured)."""
        import torch

        from pruning.compensation import compensate
        from pruning.slicing import origins_of, slice_weights
        from pruning.units import cut
        from search_spaces import create_model, table

        job, request = self.job, self.request
        with job.phase("cutting"):
            settings = self._settings(parts, scores, target, reallocate)
            found = cut(parts, scores, settings)
            generator = torch.Generator().manual_seed(request.seed)
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            weights = slice_weights(parts.arch, state, found.arch, found.select, found.blocks, generator)
        refitted = 0
        if request.compensate:
            with job.phase("compensating"):
                units = origins_of(parts.arch, found.arch, found.select, found.blocks)
                if self._inputs is None:
                    self._inputs = job.inputs(parts.arch.resolution)
                weights, refitted = compensate(parts.arch, state, found.arch, weights, units, self._inputs)
        child = create_model(found.arch)
        child.load_state_dict(weights)
        counts = table(found.arch)
        latency = self.metric == "latency"
        reached = self._latency(child.arch) if latency else self._count(child.arch)
        origins = job.state.origins
        job.state.origins = {ours: origins.get(theirs, theirs) for ours, theirs in found.blocks.items()}
        number = len(job.state.rounds) + 1
        row = Round(number, reached, counts.macs(), target, reallocate, counts.params(), refitted)
        job.state.rounds.append(row.to_json())
        keep_network(job, f"round-{number}", child)
        job.say(
            f"round {number}: {show('macs', counts.macs())}, {show('params', counts.params())}"
            + (f", {show('latency', reached)}" if latency else "")
            + (f", {counted(refitted, 'layer')} refitted" if request.compensate else "")
        )
        return reached

    def _settings(self, parts: Anatomy, scores: Scores, target: float, reallocate: bool) -> Settings:
        """Those of `allocate`; where the target is out of reach and the budget is not, without all that can go.

        Raises:
            BudgetError: the budget is out of reach, or nothing can go.
        """
        from pruning.allocation import BudgetError, allocate

        kinds, multiple_of, costs = self.request.kinds, self.request.multiple_of, self._costs(parts)
        try:
            return allocate(parts, scores, costs, target, kinds, multiple_of, reallocate)
        except BudgetError as error:
            if error.reachable > self._target or error.reachable == costs.base:
                raise
            return allocate(parts, scores, costs, error.reachable, kinds, multiple_of, reallocate)

    def _costs(self, parts: Anatomy) -> Costs:
        from pruning.allocation import Costs

        if self.metric != "latency":
            return Costs(parts, self.metric)
        groups = {knob.name: group_of(knob.width, knob.kind) for knob in parts.knobs}
        of_macs, of_branches = (
            {name: known.get(group, 0.0) for name, group in groups.items()}
            for known in (rates(self.savings or ()), fixed(self.savings or ()))
        )
        return Costs(parts, "macs", of_macs, self._reached, of_branches)

    def _meet(self, budget: float, aim: float, rounds: int) -> None:
        """Cut further while the measured latency is over the budget; then reallocate within it."""
        from pruning.allocation import BudgetError

        state = self.job.state
        while self._reached > aim and len(state.rounds) < rounds + CORRECTIONS:
            if not self._round(aim, reallocate=False):
                break
        if not self.request.reallocate or self._reached > budget or state.rounds[-1]["reallocated"]:
            return
        standing, done, origins = state.network, list(state.rounds), state.origins
        model = load_network(self.job, standing)
        parts, scores = self._scores(model, "reallocation")
        target = aim
        for _ in range(CORRECTIONS):
            try:
                reached = self._apply(model, parts, scores, target, reallocate=True)
            except BudgetError:
                break
            if reached <= budget:
                return
            target *= aim / reached
            self.job.say(f"over the budget as measured; again, for an estimate of {show('latency', target)}")
            state.network, state.rounds, state.origins = standing, list(done), origins
            self.job.save()
        self.job.note("no reallocation was within the latency budget: units were cut only")

    def _measured_savings(self) -> tuple[list[Saving], float]:
        """What each group of knobs saves as measured, and the whole network's latency in ms."""
        with self.job.phase("measuring costs") as progress:
            savings, own = measure_savings(
                self.whole,
                self.request.kinds,
                self.request.multiple_of,
                lambda archs, rounds: self._compare(archs, rounds, progress),
            )
        if line := left_alone(savings):
            self.job.note(line)
        return savings, own

    def _latency(self, arch: Arch) -> float:
        """The network's latency in ms beside the whole one; for a relative budget in the first run's milliseconds."""
        with self.job.phase("measuring") as progress:
            results = self._compare({"whole": self.whole.arch, "cut": arch}, COST_ROUNDS, progress)
        if not self.request.budget.relative:
            return results["cut"].p50_ms
        return paired_ratio(results["cut"], results["whole"])[0] * self._own

    def _compare(
        self, archs: Mapping[str, Arch], rounds: int, progress: Callable[[int, int], None]
    ) -> dict[str, Measurement]:
        """Measure untrained copies side by side."""
        request = self.request
        results = steps.measured(
            archs, lambda arch, stem: export_untrained(arch, stem, request), request, rounds, progress
        )
        if line := steps.waiting_line(results, request.settings):
            raise UserError(f"{line}; the same command then goes on")
        return results
