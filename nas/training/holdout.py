"""Images that are held out of the training images, to choose by: the validation images tell the final figure alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nas.data.images import split
from nas.data.lineage import seen_among, seen_by

if TYPE_CHECKING:
    from nas.data.images import Images

OF_A_CLASS = 5
"""Images that a class has at least, of which some are held out."""
LEAST, MOST = 20, 2000
"""Images that can choose at all, and that are enough."""
SHARE = 0.1
WANTED = 300
"""Of small sets a larger share is held out, up to twice `SHARE`, to come nearer to this number."""


def hold_out(images: Images, seed: int, start: str | None = None) -> tuple[list[int], list[int]]:
    """Indices of the images to train on, and of those that choose, of each class in proportion; none of the latter
    where there are too few.

    Args:
        start: the weights that the training begins with, as `seen_by` takes them: images that they were trained on
            cannot choose.
    """
    labels, known = np.asarray(images.labels), seen_by(start)
    seen = seen_among(images, known) if known is not None and len(known) else np.zeros(len(labels), bool)
    of_class = np.bincount(labels)
    able = np.flatnonzero((of_class >= OF_A_CLASS)[labels] & ~seen)
    everything = list(range(len(labels)))
    if not len(able):
        return everything, []
    share = min(2 * SHARE, max(SHARE, WANTED / len(able)), MOST / len(able))
    _, held = split(labels[able].tolist(), share, seed)
    if len(held) < LEAST:
        return everything, []
    chosen = able[held].tolist()
    return sorted(set(everything) - set(chosen)), chosen
