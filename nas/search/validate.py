"""How well a tier's estimates rank networks: Kendall's tau with full trainings, beside that of the networks' size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nas.errors import TrainingError
from nas.quality.candidate import Candidate, Kind
from nas.quality.plan import LEAST_VALIDATED
from nas.quality.ranking import GATE, selects, taus
from nas.search.contest import RACE
from nas.search.derive import levels_of, within
from nas.search.outcome import Validation
from nas.search.rows import Trial, candidate_of, known, rank
from nas.search.tasks import Task, Tasks, What
from nas.search.trainings import collected

if TYPE_CHECKING:
    import optuna

    from nas.quality.tier import TrainedTier
    from nas.search.request import SearchRequest
    from search_spaces import Arch

RUN = "validation run "
"""With a digest, the study attribute that holds the row of what was trained for it."""
RESULT = "validation"
TRIES = 50
SEED = 10_007


@dataclass(frozen=True)
class ValidatedNetwork:
    """A network that was trained fully to validate a tier. Estimates and accuracies are in percent."""

    family: str
    params: int
    macs: int
    final_epochs: int
    """Of its full training."""
    predicted: float
    """What the surrogate alone estimates."""
    first_rung: float
    """The estimate after the first rung, where most networks of a search end."""
    last_rung: float
    rungs: Mapping[str, float]
    """Top-1 after each rung, by its epochs."""
    top1: float
    """After the full training."""

    def to_json(self) -> dict[str, object]:
        """As the study keeps it."""
        return {
            "family": self.family,
            "params": self.params,
            "macs": self.macs,
            "final_epochs": self.final_epochs,
            "surrogate alone": self.predicted,
            GATE: self.first_rung,
            "estimate, last rung": self.last_rung,
            "rungs": self.rungs,
            "top1": self.top1,
        }

    @classmethod
    def all_of(cls, study: optuna.Study, final_epochs: int) -> list[Self]:
        """Those that a study keeps, trained for so many epochs; not those that could not be trained."""
        rows: list[Any] = list(collected(study, RUN).values())
        return [
            cls(
                family=row["family"],
                params=row["params"],
                macs=row["macs"],
                final_epochs=row["final_epochs"],
                predicted=row["surrogate alone"],
                first_rung=row[GATE],
                last_rung=row["estimate, last rung"],
                rungs=row["rungs"],
                top1=row["top1"],
            )
            for row in rows
            if row.get("final_epochs") == final_epochs
        ]


def validate(
    request: SearchRequest,
    study: optuna.Study,
    tier: TrainedTier,
    rows: Sequence[Trial],
    note: Callable[[str], None],
    tasks: Tasks,
) -> Validation | None:
    """Train `request.plan.validate` networks fully, and rank them by every estimate.

    They are drawn at random among networks with no more and no fewer MACs than the search found within its budget, and
    the search has not trained them; of a race see `raced`. Full trainings have another seed, all training images but
    those that judge, and are judged by those.
    """
    from nas.study.trials import alone_in

    plan = known(request.plan)
    wanted = plan.validate
    sizes = [known(row.macs_m) for row in rows if row.feasible]
    if not wanted or not sizes:
        kept = study.user_attrs.get(RESULT)
        return None if kept is None else Validation.from_json(kept)
    seen = {row.key for row in rows if row.kind != Kind.READY}
    limits = min(sizes), max(sizes)
    if tier.name == RACE:
        drawn = raced(request, rows, *limits)
    else:
        drawn = (tier.candidate_of(arch) for arch in draw(request, *limits))
    fresh = (each for each in drawn if each.key not in seen and each.key not in collected(study, RUN))
    while left := max(0, wanted - len(ValidatedNetwork.all_of(study, plan.full_epochs))):
        batch = [Task(What.VALIDATE, each, plan.full_epochs) for each in islice(fresh, left)]
        if not batch:
            break
        tasks.post(batch)
        for task in batch:
            try:
                row: Any = tasks.result(task)
            except TrainingError as error:
                note(f"a network of the validation could not be trained: {error}")
                row = {}
            study.set_user_attr(RUN + task.candidate.key, row)

    def conclude() -> tuple[list[ValidatedNetwork], dict[str, Any] | None]:
        found = ValidatedNetwork.all_of(study, plan.full_epochs)
        if len(found) < LEAST_VALIDATED:
            return found, None
        ranks = taus(estimates_of(found), [row.top1 for row in found])
        told = {name: each.to_json() for name, each in ranks.items()}
        result = {"tier": tier.name, "networks": len(found), "tau": told, "selects": selects(ranks[GATE])}
        study.set_user_attr(RESULT, result)
        return found, result

    found, result = alone_in(study, conclude)  # of all machines' networks: none may store what it read before another
    if len(found) < wanted:
        note(f"the validation found only {len(found)} of {wanted} networks of the budget's size")
    return None if result is None else Validation.from_json(result)


def estimates_of(rows: Sequence[ValidatedNetwork]) -> dict[str, list[float]]:
    """What may rank the networks, by name: estimates, sizes and the accuracy after each rung that all of them had."""
    common = set.intersection(*(set(row.rungs) for row in rows))
    return {
        GATE: [row.first_rung for row in rows],
        "estimate, last rung": [row.last_rung for row in rows],
        "params": [row.params for row in rows],
        "macs": [row.macs for row in rows],
        "surrogate alone": [row.predicted for row in rows],
        **{rung_words(epochs): [row.rungs[epochs] for row in rows] for epochs in rows[0].rungs if epochs in common},
    }


def rung_words(epochs: str) -> str:
    """A rung by its epochs, as a table calls it."""
    return "before any epoch" if epochs == "0" else f"after {epochs} epochs"


def draw(request: SearchRequest, low: float, high: float) -> Iterator[Arch]:
    """Networks of the searched spaces with `low` to `high` million MACs, in an order that the study's seed fixes."""
    from search_spaces import count
    from search_spaces.registry import FAMILIES
    from search_spaces.space import random_params

    rng = np.random.default_rng([SEED, request.seed or 0])
    for _ in range(TRIES * known(request.plan).validate):
        family = request.families[rng.integers(len(request.families))]
        arch = FAMILIES[family].space.decode(random_params(rng), request.num_classes, request.resolution)
        if low <= count(arch).macs / 1e6 <= high:
            yield arch


def raced(request: SearchRequest, rows: Sequence[Trial], low: float, high: float) -> Iterator[Candidate]:
    """The best ready networks within the budget, half of all at most, which are judged as if no trial had shown them;
    then new ones with `low` to `high` million MACs that are cut from parents which are tuned already."""
    from search_spaces import count, get_arch

    wanted = known(request.plan).validate
    ready = sorted((row for row in rows if row.kind == Kind.READY and row.feasible), key=rank)
    yield from (candidate_of(row) for row in ready[: wanted // 2])
    tuned = sorted({(row.parent, known(row.resolution)) for row in rows if row.kind == Kind.DERIVED and row.complete})
    rng = np.random.default_rng([SEED, request.seed or 0])
    for _ in range(TRIES * wanted if tuned else 0):
        name, px = tuned[rng.integers(len(tuned))]
        parent = get_arch(name).replace(num_classes=request.num_classes).at(px)
        made = within(parent, [levels_of(name)], rng)
        if made is not None and low <= count(made[0]).macs / 1e6 <= high:
            yield Candidate(made[0], Kind.DERIVED, name)


def measure_one(tier: TrainedTier, candidate: Candidate) -> ValidatedNetwork:
    """One network's size, estimates and accuracy after a full training."""
    from nas.networks.counts import counts_of

    network, counts = candidate.network, counts_of(candidate.network)
    untrained = tier.early(candidate, counts, {})
    estimate = tier.complete(candidate, counts, keeps=False)
    training_record = known(estimate.training)
    trainer = tier.trainer
    rest, judge = trainer.halves(network.resolution, tier.data(candidate).pixels)
    folder = trainer.folder / f"{candidate.key[:16]}-full"
    training = tier.begin(candidate, rest, tier.recipe(trainer.plan.full_epochs, candidate), SEED, folder)
    try:
        trainer.run_fully(training, "validation")
    finally:
        training.loader.close()
    found = trainer.judge(training.network, judge)
    folder.unlink(missing_ok=True)
    return ValidatedNetwork(
        family=network.family,
        params=counts.params,
        macs=counts.macs,
        final_epochs=trainer.plan.full_epochs,
        predicted=untrained.value,
        first_rung=tier.early(candidate, counts, training_record.rungs).value,
        last_rung=estimate.value,
        rungs={str(epochs): top1 for epochs, top1 in training_record.rungs.items()},
        top1=found.top1,
    )
