"""The end of a search with images: the best are trained to the last rung, the winner and what it is compared with
fully.

Every finished training is a file in the run's folder, every unfinished one a checkpoint there, so the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter

from nas.errors import TrainingError, UserError
from nas.export.folder import save_weights
from nas.files import replace_file
from nas.quality.candidate import Candidate, Kind
from nas.search.accuracy import Accuracies, Tuning
from nas.search.folder import FINAL
from nas.search.precision import expected_drop, less, lowers
from nas.search.rows import Trial, candidate_of, known
from nas.search.tasks import Task, Tasks, What
from nas.search.trainings import COMPLETED, TUNED, results_of

if TYPE_CHECKING:
    import optuna
    from pydantic import JsonValue

    from nas.quality.tier import TrainedTier
    from nas.search.request import SearchRequest

BEST = 3
"""How many of the best networks are trained to the last rung before one is chosen."""


def review(tier: TrainedTier, rows: Sequence[Trial], selects: bool) -> list[Trial]:
    """Trials with the estimates that all trainings of the study support; `selects` says whether these rank them."""
    described = [row for row in rows if row.features]
    found = tier.review([(known(row.key), known(row.features)) for row in described])
    estimates = {row.trial: estimate for row, estimate in zip(described, found, strict=True)}
    reviewed = []
    for row in rows:
        estimate = estimates.get(row.trial)
        if estimate is not None:
            estimate = less(estimate, expected_drop(row.precision, row.by_precision))
            row = dataclasses.replace(
                row,
                quality=estimate.score,
                quality_estimate=estimate.value,
                quality_ci=(estimate.interval.low, estimate.interval.high),
                quality_how=estimate.how,
                guessed=not known(estimate.training).rungs,
                selects=selects,
            )
        reviewed.append(row)
    return reviewed


def settle(
    study: optuna.Study,
    tier: TrainedTier,
    rows: Sequence[Trial],
    selects: bool,
    note: Callable[[str], None],
    tasks: Tasks,
) -> list[Trial]:
    """Have the best trained to the last rung, until the first `BEST`, and the first ready and derived one, all are;
    trials reviewed by what it showed."""
    failed: set[str | None] = set()
    while True:
        reviewed = review(tier, rows, selects)
        full = {each.key for each in results_of(study) if tier.epochs in each.rungs} | failed
        ranked = sorted((row for row in reviewed if row.feasible), key=lambda row: -known(row.quality_estimate))
        each = list({row.key: row for row in ranked}.values())
        of_kinds = (next((row for row in each if row.kind == kind), None) for kind in (Kind.READY, Kind.DERIVED))
        best = [*each[:BEST], *(row for row in of_kinds if row and row not in each[:BEST])]
        pending = [row for row in best if row.key not in full]
        if not pending:
            return [dataclasses.replace(row, feasible=row.feasible and row.key not in failed) for row in reviewed]
        wanted = [Task(What.COMPLETE, candidate_of(row), tier.epochs, row.label) for row in pending]
        tasks.post(wanted)
        try:
            tasks.result(wanted[0])
        except TrainingError as error:
            note(f"trial {pending[0].trial} could not be trained to the end: {error}")
            failed.add(wanted[0].candidate.key)
            continue
        if wanted[0].candidate.key not in {each.key for each in results_of(study) if tier.epochs in each.rungs}:
            tasks.forget(wanted[0])  # its result is lost


def complete(study: optuna.Study, tier: TrainedTier, candidate: Candidate) -> None:
    """Train a network to the last rung, which the study keeps.

    Raises:
        TrainingError: it cannot be trained.
    """
    from nas.networks.counts import counts_of

    record = known(tier.complete(candidate, counts_of(candidate.network)).training)
    if record.tuned is not None:
        study.set_user_attr(TUNED + candidate.key, record.tuned)
    study.set_user_attr(COMPLETED + candidate.key, record.to_json()["rungs"])


@dataclasses.dataclass(frozen=True)
class FullTraining:
    """A network's training from one seed, as its file has it. top1: percent of `images`. seconds: it took. hits: a
    digit an image, 1 where it was right; None in files of an older vitnas. epochs: it had; as hits. crops: the least
    share of an image's area that a tuning's crops kept; as hits (see `earlier_crops`), and None from scratch."""

    top1: FiniteFloat
    images: PositiveInt
    seconds: FiniteFloat
    hits: str | None = None
    epochs: NonNegativeInt | None = None
    crops: FiniteFloat | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """A file's.

        Raises:
            UserError: it is damaged.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except ValueError:
            raise UserError(f"{path} is damaged: remove it, and the network is trained again") from None


def seeds_of(request: SearchRequest, tier: TrainedTier, candidate: Candidate) -> range:
    """The seeds of a network's final trainings. One that stays as it begins, as its parent does, has one: no seed
    changes it."""
    varies = tier.tuning_pays(candidate) or (candidate.parent and tier.parent_tuning_pays(candidate))
    return range(known(request.plan).seeds if varies else 1)


def earlier_crops(request: SearchRequest) -> float | None:
    """The least share of an image's area that the crops of all final trainings keep, where an older vitnas began them
    with others than the recipe has now; None elsewhere."""
    from nas.training.recipes import FINETUNE, LONG_EPOCHS

    epochs, gentle = known(request.plan).full_epochs, FINETUNE.augmentation.scale
    if epochs < LONG_EPOCHS:
        return None
    for path in (request.folder / FINAL).glob(f"*-{epochs}-seed*"):
        with suppress(Exception):  # one that is damaged is told where it is used
            if _crops_of(path, gentle) == gentle:
                return gentle
    return None


def _crops_of(path: Path, earlier: float) -> float | None:
    """That of a final training or its checkpoint. earlier: where it does not say so."""
    if path.suffix == ".json":
        kept: dict[str, float | None] = json.loads(path.read_bytes())
        return kept.get("crops", earlier)
    if not path.suffix.startswith(".state"):
        return None
    import torch

    recipe = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["agree"]["recipe"]
    tuned: float | None = recipe["augmentation"]["scale"] if recipe["from_probe"] else None
    return tuned


def have_trained(
    request: SearchRequest, tier: TrainedTier, tasks: Tasks, label: str, candidate: Candidate, teacher: str = ""
) -> Iterator[str]:
    """Have a network trained from every seed, here or elsewhere; its results are then in the folder.

    Yields:
        A line for each training whose weights are not.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    for task in final_tasks(request, tier, label, candidate, teacher):
        path = result_path(request, candidate, task.seed)
        kept: Any = tasks.result(task)
        if not path.is_file() and kept["where"] == _where(path):
            tasks.forget(task)  # somebody has removed it
            kept = tasks.result(task)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            replace_file(path, json.dumps(kept["training"]).encode())
            if task.seed == 0:
                yield f"{label}: the weights of its final training are in {kept['where']}"


def final_tasks(
    request: SearchRequest, tier: TrainedTier, label: str, candidate: Candidate, teacher: str = ""
) -> list[Task]:
    """The final trainings of a network that are not in the folder. teacher: that of `nas.search.teaching.Teaching`."""
    epochs = known(request.plan).full_epochs
    left = [seed for seed in seeds_of(request, tier, candidate) if not result_path(request, candidate, seed).is_file()]
    crops = earlier_crops(request)
    return [Task(What.FINAL, candidate, epochs, label, seed, teacher, crops) for seed in left]


def trainings_in(request: SearchRequest, tier: TrainedTier, tasks: Sequence[Task]) -> int:
    """How many trainings final trainings are, with those of the parents that are first tuned for them."""
    from nas.quality.race import full_stem

    parents = {
        request.folder / FINAL / f"{full_stem(each.candidate.parent, each.candidate.network.resolution, each.epochs)}"
        f"{each.seed}.json"
        for each in tasks
        if each.candidate.parent and tier.parent_tuning_pays(each.candidate)
    }
    own = [each for each in tasks if tier.tuning_pays(each.candidate)]
    return len(own) + sum(not path.is_file() for path in parents)


def train_final(request: SearchRequest, tier: TrainedTier, task: Task) -> JsonValue:
    """Make a final training, or read it where the folder has it; what the study keeps of it.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    path = result_path(request, task.candidate, task.seed)
    if not path.is_file():
        train_from(request, tier, task.label, task.candidate, task.seed, task.teacher, task.crops)
    found: JsonValue = json.loads(path.read_bytes())
    return {"training": found, "where": _where(path)}


def _where(path: Path) -> str:
    return f"{path.parent.absolute()} on {socket.gethostname()}"


def train_fully(
    request: SearchRequest, tier: TrainedTier, label: str, candidate: Candidate, teacher: str = ""
) -> Accuracies:
    """Train a network from every seed on all training images; weights of the first seed are kept beside the result. A
    ready one that stays as it begins is judged once: no seed changes it.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    recipe = tier.recipe(known(request.plan).full_epochs, candidate)
    made: list[FullTraining] = []
    for seed in seeds_of(request, tier, candidate):
        path = result_path(request, candidate, seed)
        if not path.is_file():
            train_from(request, tier, label, candidate, seed, teacher, earlier_crops(request))
        made.append(FullTraining.read(path))
    answers = [[digit == "1" for digit in each.hits] for each in made if each.hits is not None]
    top1, seconds = [each.top1 for each in made], sum(each.seconds for each in made)
    tuned = tier.parent_tunings(candidate, request.folder / FINAL)
    before = None
    if tuned:
        seconds_before = sum(each.seconds for each in tuned)
        before = Tuning(tuned[0].name, tuned[0].epochs or 0, tuned[0].images, seconds_before, len(tuned))
    epochs = made[0].epochs
    return Accuracies(
        label,
        top1,
        made[0].images,
        seconds,
        answers if len(answers) == len(made) else [],
        before,
        epochs if epochs is not None else recipe.epochs if tier.tuning_pays(candidate) else 0,
    )


def train_from(
    request: SearchRequest,
    tier: TrainedTier,
    label: str,
    candidate: Candidate,
    seed: int,
    teacher: str = "",
    crops: float | None = None,
) -> None:
    """Train a network fully from a seed, and keep what came of it in the folder. crops: see `earlier_crops`."""
    path, trainer, data = result_path(request, candidate, seed), tier.trainer, tier.data(candidate)
    path.parent.mkdir(exist_ok=True)
    begun, pays = time.monotonic(), tier.tuning_pays(candidate)
    recipe = tier.recipe(known(request.plan).full_epochs, candidate)
    tunes = candidate.kind != Kind.SCRATCH
    if tunes and crops is not None:
        cropped = dataclasses.replace(recipe.augmentation, scale=crops)
        recipe = dataclasses.replace(recipe, augmentation=cropped, blend=1.0)
    taught_by = tier.find_teacher(teacher, candidate) if pays else None
    training = tier.begin(candidate, data.train, recipe, seed, path.with_suffix(".state"), teacher=taught_by)
    if candidate.parent:  # whose tuning is told by itself
        begun = time.monotonic()
    if pays:
        trainer.run_fully(training, f"final training, {label}, seed {seed}")
    training.loader.close()
    if seed == 0 or lowers(request.precisions):  # each is judged as it is shipped
        save_weights(training.network, path.with_suffix(".safetensors"))
    found = trainer.judge(training.network, data.val)
    hits = "".join("01"[hit] for hit in found.hits)
    kept = recipe.augmentation.scale if tunes else None
    row = FullTraining(found.top1, found.total, time.monotonic() - begun, hits, training.epoch, kept)
    replace_file(path, json.dumps(dataclasses.asdict(row)).encode())
    path.with_suffix(".state").unlink(missing_ok=True)


def weights_of(request: SearchRequest, candidate: Candidate) -> Path | None:
    """The weights that `train_fully` kept of a network."""
    path = result_path(request, candidate, seed=0).with_suffix(".safetensors")
    return path if path.is_file() else None


def result_path(request: SearchRequest, candidate: Candidate, seed: int) -> Path:
    """Where a final training's result is kept; its checkpoint and weights are beside it."""
    return request.folder / FINAL / f"{candidate.key[:16]}-{known(request.plan).full_epochs}-seed{seed}.json"
