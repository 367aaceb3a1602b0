"""What a training came to, as metrics.json holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nas.intervals import top1_words

PARTS = ("final", "error", "epochs", "data", "recipe")
"""What a metrics.json must hold to be told again."""


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: {accuracy_of(row)}, loss {row['loss']:.3f}, learning rate {row['lr']:.2g}, "
        f"{row['images_per_s']:.0f} images/s"
    )


def accuracy_of(row: Mapping[str, Any]) -> str:
    """An epoch's accuracy as it is told."""
    return top1_words(row["top1"], row["top1_ci"], row["val_images"])
