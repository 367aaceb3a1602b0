"""Accuracies of full trainings over seeds, and how two networks' compare."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field

from nas.intervals import (
    LEVEL,
    Interval,
    agreement,
    joined,
    of_accuracies,
    of_difference,
    of_mean,
    of_share,
    top1_words,
)
from nas.units import counted

ONE_SEED = "one seed: the spread of seeds is not in it"
ONE_PARENT = "the parent was tuned once: how much another tuning would change is not in it"


@dataclass(frozen=True)
class Tuning:
    """What a network's parent was tuned for beforehand, on images of the user's."""

    parent: str
    epochs: int
    """0: it had a linear probe alone, as tuning had not made it better in the search."""
    images: int
    """Of each epoch."""
    seconds: float
    """All tunings together."""
    times: int = 1
    """How often: once, or for each seed of the final trainings."""

    @property
    def words(self) -> str:
        if not self.epochs:
            return f"its parent {self.parent} had a linear probe on {self.images:,} images alone ({self.seconds:.0f} s)"
        return (
            f"its parent {self.parent} had been tuned for {counted(self.epochs, 'epoch')} of {self.images:,} images "
            f"({'' if self.times == 1 else 'for each seed; '}{self.seconds:.0f} s)"
        )


@dataclass(frozen=True)
class Accuracies:
    """A network's final trainings."""

    label: str
    top1: list[float]
    """Percent on the validation images, one a seed; of one that no seed changes one."""
    images: int
    """How many validation images there are."""
    seconds: float
    """All trainings took."""
    hits: list[list[bool]] = field(default_factory=list, repr=False)
    """A row a seed, of whether each image was classified correctly; empty where an earlier version trained."""
    before: Tuning | None = None
    """Of a network whose parent was tuned, in addition to `seconds`."""
    epochs: int | None = None
    """That its own trainings had; 0 where it was left as they begin; None in results of an older vitnas."""
    precision: str = "fp32"
    """That the network answers in."""

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
    def as_begun(self) -> bool:
        """Whether it had no epoch, as in the search tuning had not made it better."""
        return self.epochs == 0

    @property
    def seedless(self) -> bool:
        """Whether no seed changes it: it is as it begins, and no parent was tuned for it."""
        return self.as_begun and not (self.before and self.before.epochs)

    @property
    def start(self) -> str:
        """Of a network that had no epoch: what it is, and why."""
        weights = "a linear probe on pretrained weights"
        if self.before:
            weights = f"the weights of its {'tuned ' * (self.before.epochs > 0)}parent {self.before.parent}, cut"
        return f"{weights}; tuning did not make it better in the search"

    @property
    def line(self) -> str:
        """How it was trained, and its accuracy."""
        if self.as_begun:
            return f"Not trained, {self.label} as it begins ({self.start}): {self.words}"
        return f"Trained fully, {self.label}: {self.words}"

    @property
    def words(self) -> str:
        told = top1_words(self.mean, self.ci, self.images, None if self.seedless else len(self.top1))
        return told if self.precision == "fp32" else f"{told}, in {self.precision}"

    @property
    def ci(self) -> tuple[float, float]:
        return self.interval.low, self.interval.high

    def to_json(self) -> dict[str, object]:
        """top1 is a list of one a seed, mean and top1_ci are what is told."""
        return {
            "label": self.label,
            "top1": self.top1,
            "images": self.images,
            "seconds": self.seconds,
            "mean": self.mean,
            "deviation": self.deviation,
            "top1_ci": list(self.ci),
            "seeds": len(self.top1),
            "words": self.words,
            "precision": self.precision,
            **({"parent_tuning": asdict(self.before)} if self.before else {}),
            **({} if self.epochs is None else {"epochs": self.epochs}),
        }


@dataclass(frozen=True)
class Comparison:
    """The difference of two networks' mean top-1."""

    difference: float
    """Points, of the first less the second."""
    ci: tuple[float, float]
    """Its 95% interval."""
    tie: bool
    """Whether the interval holds 0."""
    leaves_out: str
    """What the interval does not cover, in words; empty where it covers all."""


@dataclass(frozen=True)
class FinalTrainings:
    """The winner's full trainings, and those of what it is compared with: a published network, or in a race the best
    of other kinds."""

    rows: tuple[Accuracies, ...]
    epochs: int
    """Of a full training; what each network had is in its row."""
    recipe: str
    """Its name; of several networks' that differ, the names."""
    verdict: str
    """How the two compare, or why there is one alone, in one line."""
    comparison: Comparison | None = None

    @property
    def trained(self) -> bool:
        """Whether a network had an epoch."""
        return not all(row.as_begun for row in self.rows)

    @property
    def how(self) -> str:
        """What they were trained with, in words."""
        if not self.trained:
            return "No epoch of training"
        without = " and ".join(row.label for row in self.rows if row.as_begun)
        words = f"{counted(self.epochs, 'epoch')} of the recipe {self.recipe}"
        return f"{words} ({without} had none)" if without else words

    def to_json(self) -> dict[str, object]:
        found = self.comparison
        told = {"rows": [row.to_json() for row in self.rows], "epochs": self.epochs, "recipe": self.recipe}
        if found:
            told |= {"difference": found.difference, "ci": list(found.ci), "tie": found.tie}
            told |= {"leaves_out": found.leaves_out}
        return told | {"verdict": self.verdict}


def compare_means(first: Accuracies, second: Accuracies) -> Comparison:
    """Compare two networks' mean top-1, on the same images. The 95% interval holds the images' noise, paired image by
    image, and of several seeds their spread (Welch)."""
    difference = first.mean - second.mean
    one, other = of_share(first.mean, first.images), of_share(second.mean, second.images)
    by_images = of_difference(first.mean, one, second.mean, other, agreement(first.hits, second.hits))
    found = joined(difference, by_images, seeds_spread(first, second)).clipped(-100.0, 100.0)
    trained = [each for each in (first, second) if not each.seedless]
    one_seed = ONE_SEED if any(len(each.top1) == 1 for each in trained) else ""
    tunings = [each.before for each in (first, second) if each.before is not None]
    once = any(each.times == 1 and each.epochs for each in tunings)
    one_parent = ONE_PARENT if once else ""
    leaves_out = "; ".join(filter(None, (one_seed, one_parent)))
    return Comparison(difference, (found.low, found.high), found.holds(0.0), leaves_out)


def seeds_spread(first: Accuracies, second: Accuracies) -> Interval | None:
    """The 95% interval of the difference over seeds: Welch's or, where one of them is as it begins, which no seed
    changes, Student's of the other. None where one was trained from a single seed, or nothing varies."""
    from scipy.stats import ttest_ind

    trained = [each for each in (first, second) if not each.seedless]
    if not any(each.deviation for each in trained) or any(each.deviation is None for each in trained):
        return None
    if first.seedless:
        return of_mean([first.mean - top1 for top1 in second.top1])
    if second.seedless:
        return of_mean([top1 - second.mean for top1 in first.top1])
    found = ttest_ind(first.top1, second.top1, equal_var=False).confidence_interval(LEVEL)
    return Interval(float(found.low), float(found.high))


def verdict(found: Comparison, first: Accuracies, second: Accuracies) -> str:
    """The comparison in one line."""
    low, high = found.ci
    kind = "a tie" if found.tie else "a gain" if low > 0 else "a loss"
    seeds = [len(each.top1) for each in (first, second) if not each.seedless]
    of = f"the same {first.images:,} images" + (f", {counted(min(seeds), 'seed')}" if seeds else "")
    by = f"{found.difference:+.1f} points (95%: {low:+.1f} to {high:+.1f}, {of})"
    line = f"{first.label} against {second.label}: {by}: {kind}"
    return f"{line} ({found.leaves_out})" if found.leaves_out else line
