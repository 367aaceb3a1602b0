"""What a network's answers are worth: accuracy, in all and by class, what is taken for what, and calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from nas.intervals import of_share

BINS = 15
"""Of equal width, as in Guo et al. 2017."""
TOP = 5


@dataclass(frozen=True)
class Answers:
    """What a network answers to N images, in their order. Classes are indices of its outputs."""

    truth: np.ndarray
    """(N,) int64, the image's own class."""
    predicted: np.ndarray
    """(N,) int64, the class of the largest output; of equal ones the first."""
    confidence: np.ndarray
    """(N,) float64, the probability of the predicted class, 0 to 1."""
    truth_confidence: np.ndarray
    """(N,) float64, the probability of the image's own class, 0 to 1."""
    rank: np.ndarray
    """(N,) int64, how many classes come before the image's own; 0: the answer is right."""

    @classmethod
    def of(cls, logits: np.ndarray, truth: np.ndarray) -> Answers:
        """From a network's outputs.

        Args:
            logits: (N, classes), finite.
            truth: (N,) indices of classes.
        """
        outputs = np.asarray(logits, np.float64)
        rows = np.arange(len(outputs))
        predicted, own = outputs.argmax(1), outputs[rows, truth][:, None]
        before = np.arange(outputs.shape[1]) < np.asarray(truth)[:, None]
        rank = ((outputs > own) | ((outputs == own) & before)).sum(1)
        shares = _softmax(outputs)
        return cls(np.asarray(truth, np.int64), predicted, shares[rows, predicted], shares[rows, truth], rank)

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Those to several batches, as to one."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    @property
    def right(self) -> np.ndarray:
        """(N,) bool."""
        found: np.ndarray = self.rank == 0
        return found

    def mistakes(self) -> list[int]:
        """Indices of the wrong answers, the most confident first."""
        wrong = np.flatnonzero(~self.right)
        order: list[int] = wrong[np.argsort(-self.confidence[wrong], kind="stable")].tolist()
        return order


@dataclass(frozen=True)
class Share:
    """correct of `images`, in percent, with Wilson's 95% interval."""

    correct: int
    images: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.images

    @property
    def ci(self) -> tuple[float, float]:
        interval = of_share(self.percent, self.images)
        return interval.low, interval.high


@dataclass(frozen=True)
class Bin:
    """Answers of about equal confidence. low, high: its ends, 0 to 1, the lower one excluded; confidence, accuracy:
    means, 0 to 1, None where there are no images."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Confused:
    """So many images of the class `truth` were taken for `predicted`, or recognised where both are the same."""

    truth: int
    predicted: int
    images: int


def top1(answers: Answers) -> Share:
    """How often the first answer is right."""
    return Share(int(answers.right.sum()), len(answers.rank))


def top5(answers: Answers, classes: int) -> Share | None:
    """How often the right class is among the first five; None of so few classes that it always is."""
    return Share(int((answers.rank < TOP).sum()), len(answers.rank)) if classes > TOP else None


def by_class(answers: Answers) -> dict[int, Share]:
    """Top-1 of each class that has images."""
    images, correct = Counter(answers.truth.tolist()), Counter(answers.truth[answers.right].tolist())
    return {label: Share(correct[label], images[label]) for label in sorted(images)}


def confusion(answers: Answers) -> list[Confused]:
    """The cells of the confusion matrix that are not 0, by row and column."""
    cells = Counter(zip(answers.truth.tolist(), answers.predicted.tolist(), strict=True))
    return [Confused(truth, predicted, images) for (truth, predicted), images in sorted(cells.items())]


def calibration(answers: Answers) -> list[Bin]:
    """The answers by their confidence, in `BINS` bins of equal width."""
    places = np.clip(np.ceil(answers.confidence * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for i in range(BINS):
        inside = places == i
        images = int(inside.sum())
        means = [float(each[inside].mean()) if images else None for each in (answers.confidence, answers.right)]
        found.append(Bin(i / BINS, (i + 1) / BINS, images, *means))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error in percent (Guo et al. 2017, equation 3): the mean over images of the distance
    between the confidence and the accuracy of their bin."""
    total = sum(each.images for each in bins)
    gaps = (
        each.images * abs(each.accuracy - each.confidence)
        for each in bins
        if each.accuracy is not None and each.confidence is not None
    )
    return 100 * sum(gaps) / total


def _softmax(outputs: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    found: np.ndarray = softmax(outputs, axis=1)
    return found
