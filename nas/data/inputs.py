"""What a command's inputs hold, as short digests: a run goes on only with what it was begun with, whatever its name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nas.data.pixels import otherwise
from nas.identity import IMAGES, LENGTH, PIXELS, file_digest

if TYPE_CHECKING:
    from nas.data.dataset import ImageData
    from nas.data.images import Images


class Network(Protocol):
    """What a network is built from."""

    def digest(self) -> str:
        """SHA-256 of its document, in hexadecimal digits."""


def identity(
    data: ImageData | None = None, **networks: tuple[Network | str, str | Path | None] | None
) -> dict[str, str | None]:
    """Digests of images and networks, and how images are prepared, by what messages call them.

    Args:
        networks: by option, a network or the name of one of timm's, and its weights: "timm", a file, or None. Options
            that were not given may be None.

    Raises:
        UserError: weights that cannot be read.
    """
    found: dict[str, str | None] = {}
    for option, network in networks.items():
        arch, weights = network or (None, None)
        found[f"the network of --{option}"] = arch if arch is None or isinstance(arch, str) else arch.digest()[:LENGTH]
        found[f"the weights of --{option}"] = str(weights) if weights in (None, "timm") else file_digest(Path(weights))
    if data is not None:
        found[IMAGES] = data_digest(data)
        if told := otherwise(data.pixels, data.demo):
            found[PIXELS] = told
    return found


def data_digest(data: ImageData) -> str:
    """Of the images for training and for validation, as `images_digest`."""
    return images_digest(data.train, data.val)


def images_digest(*parts: Images) -> str:
    """Of the images' content and labels, in order, however the folder that holds them is called; the version of the
    digests in front (see `older`)."""
    import numpy as np

    from nas.data.digests import VERSION, digests

    digest = hashlib.sha256()
    for images in parts:
        digest.update(np.asarray(images.labels, dtype=np.int64).tobytes())
        digest.update(digests(images).tobytes())
    return f"{VERSION}:{digest.hexdigest()[:LENGTH]}"
