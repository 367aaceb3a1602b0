"""A data set in one line, before anything trains on it: a wrong folder shows here, not in an accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nas.data.pixels import otherwise
from nas.units import shown

if TYPE_CHECKING:
    from nas.data.dataset import ImageData

WIDTH = 100
"""Characters for the names of the classes."""


@dataclass(frozen=True)
class Summary:
    """What an `ImageData` holds, as JSON keeps it."""

    name: str
    demo: bool
    """Whether these are scikit-learn's digits, not the user's own images."""
    classes: int
    class_names: list[str]
    """In label order."""
    train: int
    """Images for training."""
    val: int
    """Images for validation."""
    train_counts: list[int]
    """Images of each class, in label order."""
    val_counts: list[int]
    validation: str
    """Which images validate, in words."""
    left_out: list[str]
    """What was found and is not used."""
    notes: list[str]
    """What looks odd."""

    def line(self) -> str:
        """All but the notes, in one line."""
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"{shown(self.name)}: {self.train + self.val:,} images of {self.classes:,} classes ({self._named()}); "
            f"{self.train:,} train, {self.val:,} validate ({shown(self.validation)}){left_out}"
        )

    def _named(self) -> str:
        counts = [train + val for train, val in zip(self.train_counts, self.val_counts, strict=True)]
        equal = len(set(counts)) == 1
        each = [
            shown(name) if equal else f"{shown(name)} {count:,}"
            for name, count in zip(self.class_names, counts, strict=True)
        ]
        kept, length = 0, 0
        while kept < len(each) and (kept == 0 or length + len(each[kept]) <= WIDTH):
            length += len(each[kept]) + 2
            kept += 1
        text = ", ".join(each[:kept])
        rest = counts[kept:]
        if rest and not equal:
            few, many = min(rest), max(rest)
            text += f" and {len(rest):,} more of {few:,}" + (f" to {many:,}" if many > few else "")
        elif rest:
            text += f" and {len(rest):,} more"
        return f"{text}: {counts[0]:,} each" if equal else text


def summary(data: ImageData) -> Summary:
    """What a data set holds."""
    return Summary(
        name=data.name,
        demo=data.demo,
        classes=len(data.classes),
        class_names=list(data.classes),
        train=len(data.train),
        val=len(data.val),
        train_counts=_counts(data.train.labels, len(data.classes)),
        val_counts=_counts(data.val.labels, len(data.classes)),
        validation=data.validation,
        left_out=list(data.left_out),
        notes=list(data.notes),
    )


def describe(data: ImageData) -> str:
    """A data set in one line: its images, classes, which images validate, what was left out and why, and how they are
    prepared, where that is not as for a network from scratch."""
    told = otherwise(data.pixels, data.demo)
    return summary(data).line() + (f"; prepared as the weights expect ({told})" if told else "")


def announce(data: ImageData, say: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Say what a data set holds, and note what looks odd in it."""
    from nas.data.look import oddities

    say(describe(data))
    for line in oddities(data):
        note(line)


def _counts(labels: Sequence[int], classes: int) -> list[int]:
    found = Counter(labels)
    return [found[label] for label in range(classes)]
