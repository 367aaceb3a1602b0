"""Images with labels: how each is decoded, augmented and picked.

Images are decoded when they are asked for. What a random transform does to an image depends on nothing but a `Key`, so
a training that is resumed, or has another number of workers, sees the same pictures.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, InterpolationMode
from torchvision.transforms.functional import resize

from nas.data.decoding import Source, decode, decode_or_name
from nas.data.memory import free_memory
from nas.data.pixels import IMAGENET, Interpolation, Pixels
from nas.errors import UserError
from nas.files import tell

CACHE_LIMIT = 2 * 2**30
CACHE_SHARE = 0.5
_held = 0
"""Bytes in this process's caches."""
DEMO_CROP = (0.7, 1.0)
DEMO_RATIO = (0.9, 1.1)


class Key(NamedTuple):
    """Which image of a pass, and what fixes its augmentation: the `copy`-th time it is shown in that pass."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    copy: int
    epoch: int
    seed: int


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image.

    scale: least share of the image's area that a random crop keeps. hflip: chance of a mirrored image. auto_augment:
    a policy in timm's words, "rand-m9-mstd0.5-inc1". erasing: chance of a rectangle of noise.
    """

    scale: float = 0.35
    hflip: float = 0.5
    auto_augment: str | None = None
    erasing: float = 0.0


class Rows(Sequence[Source]):
    """The sources `fetch(row)` for the given rows, each made when it is asked for."""

    def __init__(self, fetch: Callable[[int], Source], rows: Sequence[int] | np.ndarray) -> None:
        self.fetch, self.rows = fetch, np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Source:  # type: ignore[override]  # no slices
        return self.fetch(int(self.rows[index]))

    def pick(self, indices: Sequence[int]) -> Rows:
        return Rows(self.fetch, self.rows[np.asarray(indices, dtype=np.int64)])


class Images(Dataset["tuple[Tensor, int] | str"]):
    """Map-style: index -> (image (3, R, R) float32, label), or its name where it cannot be decoded or is a
    `nas.data.decoding.Ribbon`.

    files: for images that are read fastest in the order of the files that hold them, the number of each one's file.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Sequence[int],
        transform: Compose,
        files: np.ndarray | None = None,
    ) -> None:
        self.sources, self.labels, self.transform, self.files = sources, labels, transform, files

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        """One image; a random transform draws from the global generators."""
        image = decode_or_name(self.sources[index])
        return image if isinstance(image, str) else (self.transform(image), self.labels[index])

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int] | str]:
        """Many images; random transforms draw from generators that each key seeds, the global ones stay as they are."""
        found = []
        with _generators_kept():
            for key in keys:
                _seed_generators(key)
                found.append(self[key.index])
        return found

    def pick(self, indices: Sequence[int]) -> Images:
        """The images with these indices, in this order."""
        return Images(
            self.sources.pick(indices) if isinstance(self.sources, Rows) else [self.sources[i] for i in indices],
            [self.labels[i] for i in indices],
            self.transform,
            None if self.files is None else self.files[np.asarray(indices, dtype=np.int64)],
        )

    def transformed(self, transform: Compose) -> Images:
        """The same images, otherwise transformed."""
        return Images(self.sources, self.labels, transform, self.files)


def train_transform(
    resolution: int, augmentation: Augmentation | None, demo: bool, pixels: Pixels = IMAGENET
) -> Compose:
    """demo: the digits', which keep a gentle crop of their own and are never mirrored."""
    how = augmentation or Augmentation()
    crop = {"scale": DEMO_CROP, "ratio": DEMO_RATIO, "hflip": 0.0} if demo else {"scale": (how.scale, 1.0)}
    return _transform(
        resolution,
        pixels,
        is_training=True,
        **{"hflip": how.hflip} | crop,
        auto_augment=how.auto_augment,
        re_prob=how.erasing,
        re_mode="pixel",
    )


def plain_transform(resolution: int, pixels: Pixels = IMAGENET) -> Compose:
    """The middle of an image, without augmentation."""
    return _transform(resolution, pixels, is_training=False, crop_pct=pixels.crop_pct)


def _transform(resolution: int, pixels: Pixels, **kwargs: Any) -> Compose:
    found = create_transform(
        (3, resolution, resolution),
        interpolation=pixels.interpolation,
        mean=pixels.mean,
        std=pixels.std,
        color_jitter=None,  # type: ignore[arg-type]
        **kwargs,
    )
    for policy in found.transforms:
        for operation in getattr(policy, "ops", ()):  # of RandAugment
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return found


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """timm's strongest posterization leaves no bit, which Pillow refuses."""
    return (max(1, level_fn(level, hparams)[0]),)


def split(
    labels: Sequence[int], share: float, seed: int, seen: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Indices for training and validation: `share` of each class, at least one image, goes to validation.

    seen: which images weights were trained on: they do not validate where half as many others do.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    train, val = [], []
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        count = max(1, round(share * len(members)))
        if seen is not None and 2 * (others := int((~seen[members]).sum())) >= count:
            members, count = members[np.argsort(seen[members], kind="stable")], min(count, others)
        val += members[:count].tolist()
        train += members[count:].tolist()
    return sorted(train), sorted(val)


def sample(images: Images, count: int, seed: int) -> Images:
    """At most `count` of the images, picked by `seed`."""
    return images if len(images) <= count else images.pick(_sampled(images, count, seed)[:count])


def shuffled_sample(images: Images, count: int, seed: int) -> Images:
    """At most `count` of the images, picked and put in order by `seed`."""
    return images.pick(np.random.default_rng(seed).permutation(len(images))[:count].tolist())


def sample_first(images: Images, count: int, seed: int) -> Images:
    """All of the images, those of `sample` first."""
    return images if len(images) <= count else images.pick(_sampled(images, count, seed))


def _sampled(images: Images, count: int, seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(len(images))
    return [*np.sort(order[:count]).tolist(), *np.sort(order[count:]).tolist()]


def hold_out(images: Images, count: int, seed: int, seen: np.ndarray | None = None) -> tuple[Images, Images]:
    """(the rest, `count` images), disjoint, each class with its share in both to within one image.

    Which images they are depends on the labels, `count`, `seed` and `seen` alone: from `train` and `calibration` of one
    `ImageData` the same ones are held out. seen: which images weights were trained on: others are held out first.

    Raises:
        UserError: nothing would be left.
    """
    if count >= len(images):
        raise UserError(f"{count:,} images cannot be held out of {len(images):,}")
    rng = np.random.default_rng(seed)
    values = np.asarray(images.labels)
    place = np.empty(len(images))
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        if seen is not None:
            members = members[np.argsort(seen[members], kind="stable")]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(place)
    return images.pick(np.sort(order[count:]).tolist()), images.pick(np.sort(order[:count]).tolist())


class Kept(list[Source]):
    """Sources, some of them in memory; a list that can be watched until it is gone."""


@dataclass(frozen=True)
class Reduced:
    """An image whose shorter side has at most `side` pixels, decoded each time it is read."""

    source: Source
    side: int
    interpolation: Interpolation

    def read(self) -> Image.Image:
        image = decode(self.source)
        return resize(image, self.side, InterpolationMode(self.interpolation)) if min(image.size) > self.side else image

    def __str__(self) -> str:
        return str(self.source)


def cached(images: Images, resolution: int, say: Callable[[str], None] = tell, pixels: Pixels = IMAGENET) -> Images:
    """The images decoded once and kept in memory, for training at up to R = `resolution` pixels a side.

    Each is (H, W, 3) uint8; what is larger than evaluation at R needs (the shorter side R / crop_pct) is reduced to
    that: evaluation at R sees the same pixels as before, a random crop of a part of a large image is less sharp. An
    image takes 3 H W bytes: 50,000 of 32 x 32 pixels 0.16 GB, 8,000 photographs (4:3) at R = 224 2.1 GB. Processes
    that decode share them where they are forked (Linux); each rank has its own.

    All caches of a process together take `CACHE_LIMIT`, or `CACHE_SHARE` of the memory that is free where that is
    less. What has no room is decoded and reduced each time, which `say` is told: the pixels do not depend on memory.
    What cannot be decoded stays where it is.
    """
    global _held
    side, taken = math.floor(resolution / pixels.crop_pct), 0
    room = min(CACHE_LIMIT, CACHE_SHARE * (free_memory() + _held)) - _held
    kept = Kept(Reduced(images.sources[i], side, pixels.interpolation) for i in range(len(images)))
    for i, source in enumerate(kept):
        try:
            values = np.asarray(cast(Reduced, source).read())
        except MemoryError:
            values = None
        except Exception:  # as in Images: it is skipped, counted and named when its turn comes
            continue
        if values is None or taken + values.nbytes > room:
            say(
                f"no memory to keep more than {i:,} of {len(images):,} images decoded: the others are decoded each time"
            )
            break
        kept[i] = values
        taken += values.nbytes
    _held += taken
    weakref.finalize(kept, _release, taken)
    return Images(kept, images.labels, images.transform, images.files)


def _release(count: int) -> None:
    global _held
    _held -= count


def _seed_generators(key: Key) -> None:
    """Seed what timm's transforms draw from: Python's, NumPy's and torch's CPU generator."""
    draws = np.random.SeedSequence((key.seed, key.epoch, key.copy, key.index)).generate_state(3)
    random.seed(int(draws[0]))
    np.random.seed(draws[1])
    torch.default_generator.manual_seed(int(draws[2]))


@contextmanager
def _generators_kept() -> Iterator[None]:
    kept = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.default_generator.set_state(kept[2])
