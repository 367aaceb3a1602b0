"""An image, from wherever it is stored, in eight bits of red, green and blue: the same in training and in use.

PyTorch is not imported.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

BACKGROUND = "white"
"""What shows through transparent pixels: the page that such pictures are drawn for."""
MAX_ASPECT = 100
"""Length over width of a picture at most: its shorter side is brought to the network's, whatever the longer becomes."""
DEEPEST = 65535


class Stored(Protocol):
    """An image that is fetched when it is read; str() names it for the user."""

    def read(self) -> bytes | Image.Image:
        """The encoded image, or the decoded one."""


Source = Path | np.ndarray | Stored


class Ribbon(str):
    """The name of an image beyond `MAX_ASPECT`, which is left out."""


class RibbonError(ValueError):
    """An image is longer than `MAX_ASPECT` allows."""


def decode_or_name(source: Source) -> Image.Image | str:
    """The image, see `decode`, or its name where it cannot be decoded or is a `Ribbon`."""
    try:
        return decode(source)
    except MemoryError:  # the machine's fault, not the file's
        raise MemoryError(f"{source} cannot be decoded") from None
    except RibbonError:
        return Ribbon(source)
    except Exception:  # Pillow's decoders raise a dozen kinds, from OSError to struct.error
        return str(source)


def decode(source: Source) -> Image.Image:
    """An RGB image from a file, a stored image, or grey levels (H, W) or colours (H, W, 3) uint8.

    Transparent pixels let white through, grey of more than 8 bits is scaled to 8, and a turned camera's picture is
    turned back as its EXIF orientation says.

    Raises:
        RibbonError: the picture is longer than `MAX_ASPECT` allows.
        Exception: it is broken.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    found = source if isinstance(source, Path) else source.read()
    if isinstance(found, Image.Image):
        return to_rgb(found)
    with Image.open(BytesIO(found) if isinstance(found, bytes) else found) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """What `decode` makes of an opened image, which it turns upright in place."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise RibbonError
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):  # which convert() would clip
        return Image.fromarray(_levels(np.asarray(image, np.float64), image.mode == "F")).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")
    return image.convert("RGB")


def _levels(values: np.ndarray, floats: bool) -> np.ndarray:
    """Grey in 8 bits, of 16 bits, of floats from 0 to 1 or to 255, or of any others, scaled from their least to their
    greatest value."""
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError("pixels that are not finite")
    if low < 0 or high > DEEPEST:
        values = (values - low) * (255 / (high - low) if high > low else 0)
    elif floats and high <= 255:
        values = values * (255 if high <= 1 else 1)
    else:
        values = values * (255 / DEEPEST)
    return values.round().astype(np.uint8)
