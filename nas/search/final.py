"""The end of a search with images: the best are trained to the last rung, the winner and a published network fully.

Every finished training is a file in the run's folder, every unfinished one a checkpoint there, so the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import FiniteFloat, PositiveInt, TypeAdapter

from nas.errors import TrainingError, UserError
from nas.export.folder import save_weights
from nas.files import replace_file
from nas.intervals import LEVEL, Interval, agreement, joined, of_accuracies, of_difference, of_share, top1_words
from nas.search.trainings import COMPLETED, results_of
from nas.units import counted

if TYPE_CHECKING:
    import optuna

    from nas.quality.trained import HalvingTier
    from nas.search.request import SearchRequest
    from search_spaces import Arch

Row = dict[str, Any]
BEST = 3
"""How many of the best networks are trained to the last rung before one is chosen."""
ONE_SEED = "one seed: the spread of seeds is not in it"


def review(tier: HalvingTier, rows: Sequence[Row], selects: bool) -> list[Row]:
    """Rows with the estimates that all trainings of the study support; `selects` says whether these rank them."""
    known = [row for row in rows if row["features"]]
    found = tier.review([(row["digest"], row["features"]) for row in known])
    estimates = {row["trial"]: estimate for row, estimate in zip(known, found, strict=True)}
    reviewed = []
    for row in rows:
        estimate = estimates.get(row["trial"])
        if estimate is not None:
            row = row | {
                "quality": estimate.score,
                **estimate.to_dict(),
                "guessed": not estimate.training["rungs"],
                "selects": selects,
            }
        reviewed.append(row)
    return reviewed


def settle(
    study: optuna.Study,
    tier: HalvingTier,
    rows: Sequence[Row],
    selects: bool,
    note: Callable[[str], None],
) -> list[Row]:
    """Train the best of the rows to the last rung, until the first `BEST` all are; rows reviewed by what it showed."""
    from nas.search.rows import arch_of
    from search_spaces import table

    failed: set[str] = set()
    while True:
        reviewed = review(tier, rows, selects)
        full = {each.key for each in results_of(study) if tier.epochs in each.rungs} | failed
        ranked = sorted((row for row in reviewed if row["feasible"]), key=lambda row: -row["quality_estimate"])
        best = list({row["digest"]: row for row in ranked}.values())[:BEST]
        pending = [row for row in best if row["digest"] not in full]
        if not pending:
            return [row | {"feasible": row["feasible"] and row["digest"] not in failed} for row in reviewed]
        arch = arch_of(pending[0])
        try:
            training = tier.complete(arch, table(arch)).training
        except TrainingError as error:
            note(f"trial {pending[0]['trial']} could not be trained to the end: {error}")
            failed.add(arch.digest())
            continue
        study.set_user_attr(COMPLETED + arch.digest(), training["rungs"])


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """A network's final trainings. top1: percent on the validation images, one a seed; images: how many those are.
    hits: a row a seed, of whether each image was told right; empty where an earlier version trained."""

    label: str
    top1: list[float]
    images: int
    seconds: float
    hits: list[list[bool]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None

    @property
    def interval(self) -> Interval:
        """The mean's 95% interval: the images' noise and, of several seeds, theirs."""
        return of_accuracies(self.top1, self.images)

    @property
    def words(self) -> str:
        return top1_words(self.mean, self.ci, self.images, len(self.top1))

    @property
    def ci(self) -> list[float]:
        return [self.interval.low, self.interval.high]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: top1 is a list of one a seed, mean and top1_ci are what is told."""
        kept = {name: getattr(self, name) for name in ("label", "top1", "images", "seconds")}
        more = {"mean": self.mean, "deviation": self.deviation, "top1_ci": self.ci, "seeds": len(self.top1)}
        return kept | more | {"words": self.words}


@dataclasses.dataclass(frozen=True)
class FullTraining:
    """A network's training from one seed, as its file has it. top1: percent of `images`. seconds: it took. hits: a
    digit an image, 1 where it was right; None in files of an older vitnas."""

    top1: FiniteFloat
    images: PositiveInt
    seconds: FiniteFloat
    hits: str | None = None

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


def train_fully(options: SearchRequest, tier: HalvingTier, label: str, arch: Arch) -> Accuracies:
    """Train a network from every seed on all training images; weights of the first seed are kept beside the result.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    trainer, plan = tier.trainer, options.plan
    data = trainer.data.at(arch.resolution)
    recipe = tier.recipe(plan.final_epochs)
    made: list[FullTraining] = []
    for seed in range(plan.seeds):
        path = result_path(options, arch, seed)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            begun = time.monotonic()
            training = tier.begin(arch, data.train, recipe, seed, path.with_suffix(".state"))
            training.run(None, lambda d, t, *_, s=seed: trainer.progress(f"final training, {label}, seed {s}", d, t))
            training.loader.close()
            if seed == 0:
                save_weights(training.network, path.with_suffix(".safetensors"))
            found = trainer.judge(training.network, data.val)
            hits = "".join("01"[hit] for hit in found.hits)
            row = FullTraining(found.top1, found.total, time.monotonic() - begun, hits)
            replace_file(path, json.dumps(dataclasses.asdict(row)).encode())
            path.with_suffix(".state").unlink(missing_ok=True)
        made.append(FullTraining.read(path))
    hits = [[digit == "1" for digit in each.hits] for each in made if each.hits is not None]
    top1, seconds = [each.top1 for each in made], sum(each.seconds for each in made)
    return Accuracies(label, top1, made[0].images, seconds, hits if len(hits) == len(made) else [])


def weights_of(options: SearchRequest, arch: Arch) -> Path | None:
    """The weights that `train_fully` kept of a network."""
    path = result_path(options, arch, seed=0).with_suffix(".safetensors")
    return path if path.is_file() else None


def result_path(options: SearchRequest, arch: Arch, seed: int) -> Path:
    """Where a final training's result is kept; its checkpoint and weights are beside it."""
    return options.folder / "final" / f"{arch.digest()[:16]}-{options.plan.final_epochs}-seed{seed}.json"


def compare_means(first: Accuracies, second: Accuracies) -> dict[str, Any]:
    """The difference of two networks' mean top-1 in points, on the same images, with its 95% interval: the images'
    noise, paired image by image, and of several seeds their spread (Welch)."""
    difference = first.mean - second.mean
    shares = (value for each in (first, second) for value in (each.mean, of_share(each.mean, each.images)))
    by_images = of_difference(*shares, correlation=agreement(first.hits, second.hits))
    found = joined(difference, by_images, seeds_spread(first, second)).clipped(-100.0, 100.0)
    return {
        "difference": difference,
        "ci": [found.low, found.high],
        "tie": found.holds(0.0),
        "leaves_out": "" if min(len(first.top1), len(second.top1)) > 1 else ONE_SEED,
    }


def seeds_spread(first: Accuracies, second: Accuracies) -> Interval | None:
    """Welch's 95% interval of the difference over seeds; None where a network has a single one, or nothing varies."""
    from scipy.stats import ttest_ind

    if not (first.deviation or second.deviation) or None in (first.deviation, second.deviation):
        return None
    found = ttest_ind(first.top1, second.top1, equal_var=False).confidence_interval(LEVEL)
    return Interval(float(found.low), float(found.high))


def verdict(found: Mapping[str, Any], first: Accuracies, second: Accuracies) -> str:
    """The comparison in one line."""
    low, high = found["ci"]
    kind = "a tie" if found["tie"] else "a gain" if low > 0 else "a loss"
    seeds = min(len(first.top1), len(second.top1))
    of = f"the same {first.images:,} images, {counted(seeds, 'seed')}"
    by = f"{found['difference']:+.1f} points (95%: {low:+.1f} to {high:+.1f}, {of})"
    line = f"{first.label} against {second.label}: {by}: {kind}"
    return f"{line} ({found['leaves_out']})" if found["leaves_out"] else line
