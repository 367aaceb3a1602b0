"""The images of a command: the user's own, a public data set, or scikit-learn's digits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.found import FoundImages, LabelledImages
from nas.data.images import Augmentation, Images, plain_transform, sample, split, train_transform
from nas.data.lineage import remark, seen_among, seen_by
from nas.data.pixels import IMAGENET, Pixels
from nas.data.sources import digits, find
from nas.errors import UserError
from nas.units import shown

if TYPE_CHECKING:
    import numpy as np


SOME = 32


SPARSE = 1000
"""Classes that bare numbers may make without a thought of how many of them have images."""


VAL_SHARE = 0.1


DIGITS_VAL_SHARE = 0.2


@dataclass(frozen=True)
class ImageData:
    """A data set, split into images for training and for validation."""

    name: str
    classes: list[str]
    """Names in label order."""
    train: Images
    calibration: Images
    """The images of `train` without augmentation."""
    val: Images
    demo: bool
    """Whether these are scikit-learn's digits, not the user's own images."""
    validation: str = ""
    """Which images validate, in words."""
    left_out: tuple[str, ...] = ()
    """What was found and is not used."""
    notes: tuple[str, ...] = ()
    """What looks odd."""
    pixels: Pixels = IMAGENET
    """How all of them become a network's input."""

    def at(self, resolution: int, augmentation: Augmentation | None = None, pixels: Pixels | None = None) -> ImageData:
        """The same images at R = `resolution` pixels a side, `train` augmented so (None: `Augmentation()`).

        Digits are seen whole, keep a gentle crop of their own in training and are never mirrored, whatever `pixels`
        and the augmentation say of these.

        Args:
            pixels: the network's; None: as before.
        """
        how = pixels or self.pixels
        how = how.whole() if self.demo else how
        plain = plain_transform(resolution, how)
        return replace(
            self,
            train=self.train.transformed(train_transform(resolution, augmentation, self.demo, how)),
            calibration=self.calibration.transformed(plain),
            val=self.val.transformed(plain),
            pixels=how,
        )


def open_data(
    name: str | Path | None, resolution: int, num_classes: int | None, seed: int, *weights: str | Path | None
) -> ImageData:
    """Open a data set at R = `resolution` pixels a side, with ImageNet's `Pixels`.

    Args:
        name: one of
            a folder with train/<class>/ beside val/<class>/ (or validation/, test/), or one of <class>/ folders;
            torch/NAME, a torchvision data set, downloaded to $VITNAS_DATA (~/.cache/vitnas/data) where it is missing;
            hfds/NAME, a data set of Hugging Face's hub, or hfds/FOLDER, anything its package `datasets` loads;
            wds/FOLDER, or a pattern such as train-{0000..0127}.tar: WebDataset shards;
            None, scikit-learn's digits.
            Of images without a validation split `seed` picks a tenth of each class (of digits a fifth) for it. Shards
            for validation have val, validation or test in their names.
        num_classes: how many classes the caller expects; None takes what there is.
        weights: what a network begins with, each "timm" or a file: images that it was trained on do not validate, where
            that can be, and a note says how many do.

    Raises:
        UserError: no such data, it cannot be downloaded, no classes in it, one class only, a class without images,
            classes that differ between train and validation, a number of classes other than `num_classes`, or a label
            beyond it.
    """
    found = digits() if name is None else find(str(name))
    demo = name is None
    classes = _classes(found, num_classes)
    train, val, validation = found.train, found.val, found.validation
    if val is None:
        _require_two_of_each(found, classes)
        share = DIGITS_VAL_SHARE if demo else VAL_SHARE
        images = _images(train, resolution)
        known = seen_by(*weights)
        seen = None if known is None or not len(known) else seen_among(images, known)
        train_images, val_images = (images.pick(part) for part in split(train.labels, share, seed, seen))
        validation = f"{share:.0%} of each class, picked by seed {seed}"
        if known is not None and seen is not None and seen.any() and not seen_among(val_images, known).any():
            named = list(dict.fromkeys(str(each) for each in weights if (of := seen_by(each)) is not None and len(of)))
            validation = f"those that {' and '.join(named)} {'was' if len(named) == 1 else 'were'} not trained on"
    else:
        train_images, val_images = (_images(part, resolution) for part in (train, val))
    told = [remark(each, val_images, "validation") for each in dict.fromkeys(weights)]
    data = ImageData(
        found.name,
        classes,
        train_images,
        train_images,
        val_images,
        demo=demo,
        validation=validation,
        left_out=found.left_out,
        notes=(*found.notes, *filter(None, told)),
    )
    return data.at(resolution)


def some_of(images: Images) -> np.ndarray | None:
    """What can be decoded of SOME of the images, always the same ones, float32 (N, 3, R, R), to check a network on;
    None of none."""
    import numpy as np

    some = sample(images, SOME, seed=0)
    pixels = [item[0] for item in (some[i] for i in range(len(some))) if not isinstance(item, str)]
    return np.stack(pixels) if pixels else None


def _images(part: LabelledImages, resolution: int) -> Images:
    return Images(part.sources, part.labels, plain_transform(resolution), part.files)


def _classes(found: FoundImages, num_classes: int | None) -> list[str]:
    labels = {*found.train.labels, *(found.val.labels if found.val else ())}
    if min(labels) < 0:
        raise UserError(
            f"{found.name} has images without a label (or with label {min(labels)}): {_with_label(found, min(labels))}"
        )
    if found.classes is None:
        if num_classes is None and max(labels) >= max(SPARSE, 10 * len(labels)):
            raise UserError(
                f"{_with_label(found, max(labels))} has label {max(labels):,}, but {len(labels)} labels are in use: "
                f"number them from 0, or give --num-classes {max(labels) + 1}"
            )
        classes = [str(label) for label in range(max(max(labels) + 1, num_classes or 0))]
        if num_classes is not None and len(classes) > num_classes:
            raise UserError(
                f"{found.name} has label {max(labels)} but --num-classes {num_classes} ends at {num_classes - 1}"
            )
    else:
        classes = list(found.classes)
    if len(set(found.train.labels)) < 2:
        only = classes[found.train.labels[0]]
        beside = "" if found.val else ", or train/ beside val/"
        raise UserError(f"{found.name} has one class ({only!r}): give two or more{beside}")
    if num_classes is not None and num_classes != len(classes):
        raise UserError(f"{found.name} has {len(classes)} classes but --num-classes is {num_classes}")
    return classes


def _with_label(found: FoundImages, label: int) -> str:
    part = next(part for part in (found.train, found.val) if part and label in part.labels)
    return shown(str(part.sources[part.labels.index(label)]))


def _require_two_of_each(found: FoundImages, classes: list[str]) -> None:
    for label, count in sorted(Counter(found.train.labels).items()):
        if count < 2:
            where = f"{found.name}/{classes[label]}"
            raise UserError(f"{where} holds one image: two or more are needed, one of them for validation")
