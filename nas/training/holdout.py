"""Images that choose between networks, of those for training: the validation images tell the final figure alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nas.data.images import split
from nas.data.lineage import seen_among, seen_by

if TYPE_CHECKING:
    from nas.data.images import Images

OF_A_CLASS = 5
"""Images that a class has at least, of which some are held out."""
LEAST, MOST = 10, 2000
"""Images that can choose at all, and that are enough."""
SHARE = 0.1
WANTED = 300
"""Of small sets a larger share is held out, up to twice `SHARE`, to come nearer to this number."""
HELD = "held-out training images"
"""What messages call images that choose."""


@dataclass(frozen=True)
class Parts:
    """Indices of images for training."""

    train: list[int]
    """To train on."""
    judge: list[int]
    """To choose by."""
    warning: str = ""
    """Why accuracies on the latter are too high, or why there are none; "" where all is well."""


def hold_out(images: Images, seed: int, start: str | None = None) -> Parts:
    """Hold some of the images out, of each class in proportion.

    They are images that the weights were not trained on, where there are enough; else ones that they were: then
    accuracies are too high, and serve to compare. Where there are too few, none is held out.

    Args:
        start: the weights that the training begins with, as `seen_by` takes them.
    """
    labels, known = np.asarray(images.labels), seen_by(start)
    seen = seen_among(images, known) if known is not None and len(known) else np.zeros(len(labels), bool)
    everything = list(range(len(labels)))
    large = (np.bincount(labels) >= OF_A_CLASS)[labels]
    for able, words in ((large & ~seen, ""), (large, "the weights were trained on the images held out")):
        held = _some(labels, np.flatnonzero(able), seed)
        if len(held) >= LEAST:
            warning = f"{words}: accuracies on them are too high, and only compare" if words else ""
            return Parts(sorted(set(everything) - set(held)), held, warning=warning)
    why = "there are too few images" if large.any() else f"no class has {OF_A_CLASS} images"
    warning = f"{why} to hold some out, and so to tune by: only a classifier is fitted"
    return Parts(everything, [], warning=warning)


def _some(labels: np.ndarray, able: np.ndarray, seed: int) -> list[int]:
    if not len(able):
        return []
    share = min(2 * SHARE, max(SHARE, WANTED / len(able)), MOST / len(able))
    _, held = split(labels[able].tolist(), share, seed)
    found: list[int] = able[held].tolist()
    return found
