"""Photographs that are always at hand, as bytes and as a network takes them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from nas.data.pixels import Pixels

CROPS = 32
SMALLEST = 96
"""Side of a crop, in px, before it is brought to the network's size."""


def photographs(size: int, pixels: Pixels) -> np.ndarray:
    """CROPS different squares of the photographs that scikit-learn ships, a temple and a flower; always the same.

    Returns:
        float32 (CROPS, 3, R, R) with R = `size`.
    """
    import numpy as np
    from PIL import Image

    random, found, pictures = np.random.default_rng(0), [], _pictures()
    for i in range(CROPS):
        picture = pictures[i % len(pictures)]
        side = int(random.integers(SMALLEST, min(picture.size), endpoint=True))
        left, top = (int(random.integers(0, whole - side, endpoint=True)) for whole in picture.size)
        square = picture.crop((left, top, left + side, top + side))
        found.append(np.asarray(square.resize((size, size), Image.Resampling[pixels.interpolation.upper()])))
    return from_bytes(np.stack(found), pixels)


@cache
def _pictures() -> tuple[Image, ...]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(each) for each in load_sample_images().images)


def from_bytes(values: np.ndarray, pixels: Pixels) -> np.ndarray:
    """uint8 (N, R, R, 3) -> float32 (N, 3, R, R), normalised."""
    import numpy as np

    return np.ascontiguousarray(pixels.normalise(values).transpose(0, 3, 1, 2))


def to_bytes(values: np.ndarray, pixels: Pixels) -> np.ndarray:
    """float32 (N, 3, R, R), normalised -> uint8 (N, R, R, 3), the nearest there are."""
    import numpy as np

    shares = values.transpose(0, 2, 3, 1) * np.array(pixels.std) + np.array(pixels.mean)
    found: np.ndarray = (shares * 255).round().clip(0, 255).astype(np.uint8)
    return found
