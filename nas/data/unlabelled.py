"""Images without labels: a network that knows the classes gives its own answers for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nas.data.dataset import VAL_SHARE, ImageData
from nas.data.images import Images, plain_transform, split
from nas.data.listing import LeftOut, images_in, natural_key
from nas.errors import UserError
from nas.units import shown

LEAST = 20
"""Images that are needed, those that validate included."""


def open_unlabelled(folder: str, classes: Sequence[str], resolution: int, seed: int) -> ImageData:
    """The images of a folder and of all below it, with their numbers for labels until `with_answers` gives others.

    Args:
        classes: of the network that will label them.
        seed: picks a tenth of them for validation.

    Raises:
        UserError: no such folder, or too few images in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{shown(folder)}: no such folder")
    left_out = LeftOut()
    files = sorted(images_in(path, os.path.realpath(path), left_out, set()))
    if len(files) < LEAST:
        raise UserError(f"{shown(folder)} holds {len(files)} images: --unlabelled needs {LEAST} or more")
    files.sort(key=lambda each: natural_key(str(each.relative_to(path))))
    parts = split([0] * len(files), VAL_SHARE, seed)
    train, val = (Images([files[i] for i in part], range(len(part)), plain_transform(resolution)) for part in parts)
    validation = f"{VAL_SHARE:.0%}, picked by seed {seed}; the unpruned network's answers are the labels"
    name, left = f"{folder}, without labels", left_out.lines()
    data = ImageData(name, list(classes), train, train, val, demo=False, validation=validation, left_out=left)
    return data.at(resolution)


def with_answers(data: ImageData, train: Sequence[int], val: Sequence[int]) -> ImageData:
    """The same images with these labels."""

    def labelled(images: Images, labels: Sequence[int]) -> Images:
        return Images(images.sources, labels, images.transform, images.files)

    return replace(
        data,
        train=labelled(data.train, train),
        calibration=labelled(data.calibration, train),
        val=labelled(data.val, val),
    )
