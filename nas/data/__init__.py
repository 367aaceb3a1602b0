"""Real images for training, calibration and evaluation: a folder of classes, or scikit-learn's digits without one.

Images are decoded when they are asked for. A file that cannot be decoded is skipped, counted and named; too large a
share of such files is refused.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import Compose

from nas.errors import UserError

VAL_FOLDERS = ("val", "validation", "test")
FOLDER_VAL_SHARE = 0.1
DIGITS_VAL_SHARE = 0.2
MAX_BROKEN = 0.05
"""Share of the images of one pass that may be broken; one broken image is always skipped, never refused alone."""
BROKEN_BASE = 1000
"""`MAX_BROKEN` is a share of at least this many images (or of all, where there are fewer), so that a few broken files
next to each other refuse no large folder."""
ALL_BROKEN = 8
"""A pass that begins with this many broken images (or consists of them) is refused at once."""
NAMED = 3

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, R, R) float32 and labels (B,) int64."""


class Images(Dataset):
    """Map-style: index -> (image (3, R, R) float32, label), or the file's name where it cannot be decoded."""

    def __init__(self, sources: Sequence[Path | np.ndarray], labels: Sequence[int], transform: Compose) -> None:
        self.sources, self.labels, self.transform = sources, labels, transform

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        source = self.sources[index]
        try:
            image = decode(source)
        except Exception:  # Pillow's decoders raise a dozen kinds, from OSError to struct.error
            return str(source)
        return self.transform(image), self.labels[index]


@dataclass(frozen=True)
class ImageData:
    """A data set, split. `calibration` holds the images of `train` without augmentation; `demo`: not the user's own."""

    name: str
    classes: list[str]
    train: Images
    calibration: Images
    val: Images
    demo: bool


def open_data(path: Path | None, resolution: int, num_classes: int | None, seed: int) -> ImageData:
    """Open an image folder at R = `resolution` pixels a side, normalised with ImageNet's mean and deviation.

    Args:
        path: a folder with train/<class>/ beside val/<class>/ (or validation/, test/), or one of <class>/ folders,
            of whose images `seed` picks a tenth of each class for validation. None: scikit-learn's digits, a
            fifth of each class for validation.
        num_classes: how many classes the caller expects; None takes what there is.

    Raises:
        UserError: no such folder, no classes in it, a class without images, classes that differ between train and
            validation, or a number of classes other than `num_classes`.
    """
    data = _digits(resolution, seed) if path is None else _folder(path, resolution, seed)
    if num_classes is not None and num_classes != len(data.classes):
        raise UserError(f"{data.name} has {len(data.classes)} classes but --num-classes is {num_classes}")
    return data


def decode(source: Path | np.ndarray) -> Image.Image:
    """An RGB image from a file or from grey levels (H, W) uint8."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    with Image.open(source) as image:
        return image.convert("RGB")


def split(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and validation: `share` of each class, at least one image, goes to validation."""
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    train, val = [], []
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        count = max(1, round(share * len(members)))
        val += members[:count].tolist()
        train += members[count:].tolist()
    return sorted(train), sorted(val)


def sample(images: Images, count: int, seed: int) -> Images:
    """At most `count` of the images, picked by `seed`."""
    if len(images) <= count:
        return images
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:count])
    return Images([images.sources[i] for i in chosen], [images.labels[i] for i in chosen], images.transform)


def _digits(resolution: int, seed: int) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    labels = digits.target.tolist()
    train, val = split(labels, DIGITS_VAL_SHARE, seed)
    augment = _transform(resolution, is_training=True, scale=(0.7, 1.0), ratio=(0.9, 1.1), hflip=0.0)
    plain = _transform(resolution, is_training=False, crop_pct=1.0)

    def part(indices: list[int], transform: Compose) -> Images:
        return Images([images[i] for i in indices], [labels[i] for i in indices], transform)

    return ImageData(
        name=f"digits (scikit-learn, {len(images):,} images of 8x8 pixels)",
        classes=[str(name) for name in digits.target_names],
        train=part(train, augment),
        calibration=part(train, plain),
        val=part(val, plain),
        demo=True,
    )


def _folder(path: Path, resolution: int, seed: int) -> ImageData:
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give one of images, <class>/*.jpg")
    val_root = next((path / name for name in VAL_FOLDERS if (path / name).is_dir()), None)
    if val_root is not None and (path / "train").is_dir():
        classes, *train = _scan(path / "train")
        val_classes, *val = _scan(val_root)
        for name in sorted(set(classes) ^ set(val_classes), key=natural_key):
            here, there = ("train", val_root.name) if name in classes else (val_root.name, "train")
            raise UserError(f"{path}: class {name!r} is in {here}/ but not in {there}/")
    else:
        classes, files, labels = _scan(path)
        for label, count in sorted(Counter(labels).items()):
            if count < 2:
                name = path / classes[label]
                raise UserError(f"{name} holds one image: two or more are needed, one of them for validation")
        train, val = (
            ([files[i] for i in part], [labels[i] for i in part]) for part in split(labels, FOLDER_VAL_SHARE, seed)
        )
    if len(classes) < 2:
        raise UserError(f"{path} has one class ({classes[0]!r}): give two or more, or train/ beside val/")
    plain = _transform(resolution, is_training=False)
    return ImageData(
        name=str(path),
        classes=classes,
        train=Images(*train, _transform(resolution, is_training=True, scale=(0.35, 1.0))),
        calibration=Images(*train, plain),
        val=Images(*val, plain),
        demo=False,
    )


def _scan(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """Classes (the visible folders in `root`, in timm's order), and the images anywhere below each with its label."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root} has no class folders: {root}/<class>/*.jpg is needed")
    classes = sorted(names, key=natural_key)
    number = {name: label for label, name in enumerate(classes)}
    found = make_dataset(root, number, is_valid_file=_is_image, allow_empty=True)
    labels = [label for _, label in found]
    empty = set(number.values()) - set(labels)
    if empty:
        raise UserError(f"{root / classes[min(empty)]} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return classes, [Path(file) for file, _ in found], labels


def _is_image(file: str) -> bool:
    path = Path(file)
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def _transform(resolution: int, **kwargs: Any) -> Compose:
    return create_transform((3, resolution, resolution), interpolation="bicubic", color_jitter=None, **kwargs)


class Loader(DataLoader):
    """Batches of the images that can be decoded: one with broken files is smaller, one with nothing else is left out.

    skipped: names of the broken files met so far.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Batch]:
        """One pass.

        Raises:
            UserError: more broken images than `MAX_BROKEN` allows, or nothing else at its beginning.
        """
        seen, broken = 0, []
        total = len(self.dataset)
        for images, labels, names in super().__iter__():
            seen += len(labels) + len(names)
            broken += names
            self.skipped += [name for name in names if name not in self.skipped]
            most = max(1, MAX_BROKEN * max(seen, min(total, BROKEN_BASE)))
            if len(broken) > most or len(broken) == seen >= min(ALL_BROKEN, total):
                raise UserError(
                    f"{len(broken)} of the first {seen} images ({len(broken) / seen:.0%}) cannot be decoded, "
                    f"{MAX_BROKEN:.0%} may be: {_first(broken)}"
                )
            if len(labels):
                yield images, labels


def loader(dataset: Images, batch_size: int, shuffle: bool, seed: int, workers: int = 0) -> Loader:
    """Batches in an order that `seed` fixes, another one each pass; `workers` processes decode (0: this one)."""
    return Loader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(seed),
    )


def skipped_line(loaders: Sequence[Loader]) -> str | None:
    """What to tell the user about the files that could not be decoded; None where all could."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(each.skipped for each in loaders)))
    if not names:
        return None
    return f"skipped {len(names)} image{'s' * (len(names) > 1)} that cannot be decoded: {_first(names)}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [item for item in items if isinstance(item, str)]
