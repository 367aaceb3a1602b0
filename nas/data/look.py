"""What looks odd in a data set: images of one colour, and the same image twice where it should not be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from nas.data.decoding import decode
from nas.data.digests import digests
from nas.data.images import Images
from nas.units import shown

if TYPE_CHECKING:
    from nas.data.dataset import ImageData

PROBED = 8
SIDE = 64
NEAR = 3
"""Levels of 255 that look like one."""
FLAT = 0.98
"""Share of its pixels near one value that makes an image flat."""


def oddities(data: ImageData) -> list[str]:
    """A line for each thing that looks odd."""
    return list(data.notes) if data.demo else [*data.notes, *_flat(data.train), *_twice(data)]


def _flat(images: Images) -> Iterator[str]:
    """Where most of a few images are of nearly one value: masks, or levels that were read in another scale."""
    flat, seen, least, greatest = 0, 0, 255, 0
    for i in np.linspace(0, len(images) - 1, min(PROBED, len(images)), dtype=int):
        try:
            pixels = np.asarray(decode(images.sources[i]).resize((SIDE, SIDE), Image.Resampling.NEAREST), int)
        except Exception:  # it is skipped and named when its turn comes
            continue
        seen += 1
        near = np.abs(pixels - np.median(pixels, axis=(0, 1))) <= NEAR
        flat += near.all(-1).mean() >= FLAT
        least, greatest = min(least, pixels.min()), max(greatest, pixels.max())
    if 2 * flat > seen:
        yield (
            f"{flat} of {seen} training images looked at are of nearly one value "
            f"(levels {least} to {greatest} of 0 to 255): see whether their pixels are stored in another scale"
        )


def _twice(data: ImageData) -> Iterator[str]:
    train, val = digests(data.train), digests(data.val)
    both = np.flatnonzero(np.isin(val, train))
    if len(both):
        name = shown(str(data.val.sources[int(both[0])]))
        yield (
            f"{len(both):,} of {len(val):,} validation images are training images too ({name}): accuracy is too high"
        )
    order = np.lexsort((np.asarray(data.train.labels), train))
    sorted_digests, labels = train[order], np.asarray(data.train.labels)[order]
    differ = np.flatnonzero((sorted_digests[1:] == sorted_digests[:-1]) & (labels[1:] != labels[:-1]))
    if len(differ):
        names = [shown(str(data.train.sources[int(order[differ[0] + k])])) for k in (0, 1)]
        yield f"{len(differ):,} training images are in two classes ({names[0]} and {names[1]})"
