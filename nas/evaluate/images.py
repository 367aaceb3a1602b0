"""The images that networks are judged on: one part of a data set, without those that they are known to have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nas.data.folders import folder_part
from nas.data.found import FoundImages, LabelledImages
from nas.data.images import Images, plain_transform, sample
from nas.data.lineage import remark, seen_among, seen_by
from nas.data.sources import SOURCES, find
from nas.errors import UserError
from nas.units import counted

LIMIT_SEED = 0


@dataclass(frozen=True)
class JudgedImages:
    """What networks are judged on."""

    name: str
    """Of the data set, as the user gave it."""
    part: str
    """Which of its images these are, in words; "" where they are all."""
    classes: list[str]
    """Names of those that have images, by label; bare numbers where the data set has no names."""
    images: Images
    """Their sources and labels; the transform is not used."""
    notes: tuple[str, ...]
    """What was left out, what looks odd, and which images a network has been trained on."""


def open_images(name: str, split: str | None, limit: int | None, trained: Sequence[str | Path | None]) -> JudgedImages:
    """Find the images to judge networks on.

    Args:
        name: a data set as `nas.data.dataset.open_data` takes it, or a folder of one of its parts.
        split: train, val, test or all. None: those for validation, or else for testing; of a data set without parts
            those that no network was trained on, as far as that is known, or else all.
        limit: how many at most, picked at random; None: all.
        trained: the networks' weights, each "timm", a file, or None for random ones.

    Raises:
        UserError: no such data, no such part, or no images in it.
    """
    found = _found(name, split)
    images = Images(found.train.sources, found.train.labels, plain_transform(1), found.train.files)
    part, notes = found.validation, [*(f"Left out: {line}" for line in found.left_out), *found.notes]
    if split is None and not part:
        images, part = _unseen(images, trained)
    if limit is not None and limit < len(images):
        notes.append(f"{limit:,} of {counted(len(images), 'image')} are judged, picked at random (--limit)")
        images = sample(images, limit, LIMIT_SEED)
    notes += filter(None, (remark(each, images, "judged") for each in _folders(trained)))
    labels = sorted(set(images.labels))
    classes = [str(label) if found.classes is None else found.classes[label] for label in labels]
    number = {label: i for i, label in enumerate(labels)}
    own = Images(images.sources, [number[label] for label in images.labels], images.transform, images.files)
    return JudgedImages(name, part, classes, own, tuple(notes))


def _folders(trained: Sequence[str | Path | None]) -> list[str | Path | None]:
    """One file of each folder: of all of its weights the same is known."""
    return list({each.parent if isinstance(each, Path) else each: each for each in trained}.values())


def _found(name: str, split: str | None) -> FoundImages:
    """The images as `train`; `validation` says which they are."""
    folder = Path(name).is_dir() or not (
        name.lower().startswith(tuple(SOURCES)) or name.endswith(".tar") or "{" in name
    )
    if folder:
        return folder_part(name, split)
    found = find(name)
    if found.val is None:
        if split not in (None, "all", "train"):
            raise UserError(f"{name} has no part {split}: leave --split out")
        return replace(found, validation="")
    if split == "test":
        raise UserError(f"{name} is read in two parts, train and val ({found.validation}): give one of these")
    if split == "train":
        return replace(found, val=None, validation="its training images")
    if split == "all":
        both = [*found.train.sources, *found.val.sources]
        return replace(
            found, train=LabelledImages(both, found.train.labels + found.val.labels), val=None, validation="all parts"
        )
    return replace(found, train=found.val, val=None)


def _unseen(images: Images, trained: Sequence[str | Path | None]) -> tuple[Images, str]:
    """Those that no network was trained on, where some were and others were not, and what they are in words."""
    known = [seen for each in trained if (seen := seen_by(each)) is not None and len(seen)]
    if not known:
        return images, ""
    seen = seen_among(images, np.unique(np.concatenate(known)))
    if seen.all() or not seen.any():
        return images, ""
    kept = np.flatnonzero(~seen).tolist()
    whose = "the network" if len(trained) == 1 else "these networks"
    return images.pick(
        kept
    ), f"the {len(kept):,} of {len(images):,} that {whose} was not trained on; --split all for all"
