"""Where images come from: a function for each kind of name, which finds the images; the caller splits them."""

from __future__ import annotations

import difflib
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from PIL import Image
from timm.data import create_dataset

from nas.connection import offline_if_unreachable
from nas.data.folders import image_folder
from nas.data.found import FoundImages, LabelledImages
from nas.data.images import Rows
from nas.data.listing import natural_key
from nas.data.shards import find_shards, read_index
from nas.errors import DiskFull, UserError, is_full
from nas.files import expanded
from nas.text import first_sentence

if TYPE_CHECKING:
    import datasets

CACHE = "VITNAS_DATA"
"""The environment variable that says where downloads go."""
TORCH = (
    *("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"),
    *("imagenet", "inaturalist", "places365"),
)
VAL_SPLITS = ("validation", "valid", "val", "dev", "test", "eval")
VAL_SHARDS = re.compile(r"(?<![a-z])(val|validation|valid|test)(?![a-z])")
SECRET = -1
"""The hub's label of images whose class is kept back; a split of them cannot validate."""
TIMEOUT = 10.0
"""Seconds in which a host must answer."""


def cache_folder() -> Path:
    return expanded(os.environ.get(CACHE) or "~/.cache/vitnas/data")


def digits() -> FoundImages:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = list((found.images * (255 / 16)).round().astype(np.uint8))
    return FoundImages(
        f"digits (scikit-learn, {len(images):,} images of 8x8 pixels)",
        [str(name) for name in found.target_names],
        LabelledImages(images, found.target.tolist()),
    )


@dataclass(frozen=True)
class TorchImage:
    """A row of a torchvision data set."""

    name: str
    dataset: Any
    row: int

    def read(self) -> Image.Image:
        image: Image.Image = self.dataset[self.row][0]
        return image

    def __str__(self) -> str:
        return f"{self.name}[{self.row}]"


def torch_dataset(name: str) -> FoundImages:
    """A torchvision data set as timm names it, downloaded where it is not there yet."""
    name = name.lower()
    if name not in TORCH:
        near = difflib.get_close_matches(name, TORCH) or TORCH
        raise UserError(f"torch/{name} is not known: did you mean torch/{', torch/'.join(near)}?")
    root = cache_folder() / "torch"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            parts = [_torch_split(name, root, split) for split in ("train", "validation")]
    except Exception as error:  # of any kind, where a file is cut off
        if is_full(error):
            raise DiskFull(root, error=error) from None
        raise UserError(
            f"torch/{name} cannot be had in {root} ({first_sentence(error)}): copy its files there, name another "
            f"folder with ${CACHE}, or give --data DIR of your own images"
        ) from None
    classes, train, val = parts[0][0], parts[0][1], parts[1][1]
    return FoundImages(f"torch/{name}", classes, train, val, "its own validation images")


def _torch_split(name: str, root: Path, split: str) -> tuple[list[str], LabelledImages]:
    with _answer_within(TIMEOUT):
        dataset = create_dataset(f"torch/{name}", str(root), split, download=True)
    if name == "inaturalist":
        dataset.index.sort()  # it comes in the file system's order
        classes, labels = dataset.all_categories, [label for label, _ in dataset.index]
    else:
        classes, targets = dataset.classes, np.asarray(dataset.targets)
        labels = (targets[:, 0] if targets.ndim == 2 else targets).tolist()  # qmnist tells more than the digit
    names = [each if isinstance(each, str) else ", ".join(each) for each in classes]
    return names, LabelledImages(
        Rows(partial(TorchImage, f"torch/{name}, {split}", dataset), np.arange(len(labels))), labels
    )


@contextmanager
def _answer_within(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@dataclass(frozen=True)
class HubImage:
    """A row of a Hugging Face data set whose column `image` is not decoded."""

    name: str
    dataset: datasets.Dataset
    image: str
    row: int

    def read(self) -> bytes:
        found = self.dataset[self.row][self.image]
        return found["bytes"] or Path(found["path"]).read_bytes()

    def __str__(self) -> str:
        return f"{self.name}[{self.row}]"


def hub_dataset(name: str) -> FoundImages:
    """A data set that `datasets` loads, from Hugging Face's hub or a folder."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"hfds/{name} needs the package datasets: pip install 'vitnas[huggingface]'") from None
    with nullcontext() if Path(name).exists() else offline_if_unreachable():
        try:
            splits = datasets.load_dataset(name)
        except Exception as error:  # of any kind: what is wrong lies in the data set or its host
            if is_full(error):
                raise DiskFull(datasets.config.HF_DATASETS_CACHE, error=error) from None
            elsewhere = (
                ""
                if Path(name).exists()
                else f": fetch https://huggingface.co/datasets/{name} elsewhere and give hfds/FOLDER, or --data DIR"
            )
            raise UserError(f"hfds/{name} cannot be loaded ({first_sentence(error)}){elsewhere}") from None
    if "train" not in splits:
        raise UserError(f"hfds/{name} has no split 'train' but {', '.join(splits)}")
    image, label = _columns(splits["train"].features, name)
    values = {split: _column(splits[split], label) for split in ("train", *VAL_SPLITS) if split in splits}
    feature = splits["train"].features[label]
    known = [each for column in values.values() for each in column if each is not None]
    classes = None
    if isinstance(feature, datasets.ClassLabel):
        classes = feature.names
    elif all(isinstance(each, str) for each in known):
        classes = sorted(set(known), key=natural_key)
        number = {each: i for i, each in enumerate(classes)} | {None: None}
        values = {split: [number[each] for each in column] for split, column in values.items()}
    elif not all(isinstance(each, int) for each in known):
        raise UserError(f"hfds/{name}: column {label} holds no labels but {feature}")
    labels = {split: [SECRET if each is None else each for each in column] for split, column in values.items()}
    parts = {
        split: LabelledImages(_hub_rows(f"hfds/{name}, {split}", splits[split], image, len(values)), values)
        for split, values in labels.items()
        if split == "train" or min(values) > SECRET
    }
    val = next((split for split in VAL_SPLITS if split in parts), None)
    return FoundImages(
        f"hfds/{name}" + f" (label: {label})" * (label != "label"),
        classes,
        parts["train"],
        parts[val] if val else None,
        f"split {val}",
        tuple(f"split {split}" for split in splits if split not in ("train", val)),
    )


def _columns(features: datasets.Features, name: str) -> tuple[str, str]:
    """The columns of images and labels; of several labels the one with most classes."""
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    named = {column: f.num_classes for column, f in features.items() if isinstance(f, datasets.ClassLabel)}
    plain = [column for column in ("label", "labels", "target", "class") if column in features]
    largest = max(named, key=lambda column: named[column], default=None)
    label = "label" if "label" in features else largest or next(iter(plain), None)
    if not images or label is None:
        raise UserError(f"hfds/{name} needs a column of images and one of labels, but has {', '.join(features)}")
    return "image" if "image" in images else images[0], label


def _column(dataset: datasets.Dataset, column: str) -> list[Any]:
    return list(dataset.select_columns([column])[:][column])


def _hub_rows(name: str, dataset: datasets.Dataset, image: str, count: int) -> Rows:
    import datasets

    stored = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Rows(partial(HubImage, name, stored, image), np.arange(count))


def shards(name: str) -> FoundImages:
    """Shards; those with val, validation or test in their names, or below a folder called so, are for validation."""
    found = find_shards(name)
    cache = cache_folder() / "shards"
    try:
        index = read_index(found, cache)
    except OSError as error:
        raise UserError(f"cannot write to {cache} ({error.strerror}): ${CACHE} names another") from None
    base = Path(os.path.commonpath([path.parent for path in found]))
    val = {path for path in found if VAL_SHARDS.search(str(path.relative_to(base)).lower())}
    if len(val) == len(found):
        val = set()

    def part(wanted: set[Path]) -> LabelledImages:
        rows = index.rows(wanted)
        return LabelledImages(index.sources(rows), index.label[rows].tolist(), index.file[rows])

    names = sorted(path.name for path in val)
    what = names[0] if len(names) == 1 else f"{len(names)} shards from {names[0]} on" if names else ""
    return FoundImages(name, index.classes, part(set(found) - val), part(val) if val else None, what, index.left_out)


SOURCES: dict[str, Callable[[str], FoundImages]] = {"torch/": torch_dataset, "hfds/": hub_dataset, "wds/": shards}
"""By timm's prefixes."""


def find(name: str) -> FoundImages:
    """The images of that name: with one of the prefixes of `SOURCES`, else a pattern of shards, else a folder."""
    for prefix, source in SOURCES.items():
        if name.lower().startswith(prefix):
            return source(name[len(prefix) :])
    named = name.endswith(".tar") or "{" in name
    return shards(name) if named and not Path(name).is_dir() else image_folder(name)
