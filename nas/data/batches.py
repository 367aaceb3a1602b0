"""Batches of images in an order, and with an augmentation, that seed and epoch fix."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from nas.data.decoding import MAX_ASPECT, Ribbon
from nas.data.images import Images, Key
from nas.errors import UserError
from nas.lock import in_turn
from nas.process import die_with_parent
from nas.threads import adapt
from nas.units import listed, shown

MAX_BROKEN = 0.05
"""Share of the images of one pass that may be broken; one broken image is always skipped, never refused alone."""
BROKEN_BASE = 1000
"""`MAX_BROKEN` is a share of at least this many images (or of all, where there are fewer), so that a few broken files
next to each other refuse no large folder."""
ALL_BROKEN = 8
"""A pass that begins with this many broken images (or consists of them) is refused at once."""
NAMED = 3
SHUFFLE_BUFFER = 8192
"""Images in files are shown at most this many places after their turn in the files' order: the window that is read at
any time stays small enough for the operating system's cache."""

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, R, R) float32 and labels (B,) int64."""


class Order(Sampler[Key]):
    """One rank's part of a pass. Of the order that (seed, epoch) fix, rank r of W has each W-th image from the r-th on.

    Ranks have disjoint parts of equal length; the last len(images) % W places of the order are left out. With
    `repeats` each image has that many places in a row, on one rank after another, and the pass keeps its length, so it
    shows 1 / `repeats` of the images: repeated augmentation, Hoffer et al., Augment Your Batch, 2019.
    """

    def __init__(self, images: Images, shuffle: bool, seed: int, rank: int, world_size: int, repeats: int) -> None:
        self.images, self.shuffle, self.seed, self.repeats = images, shuffle, seed, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch = self.left_out = 0

    def __len__(self) -> int:
        return len(self.images) // self.world_size

    def __iter__(self) -> Iterator[Key]:
        order = self._shuffled() if self.shuffle else torch.arange(len(self.images))
        epoch = self.epoch
        begin = self.rank + self.left_out * self.world_size
        for place in range(begin, len(self) * self.world_size, self.world_size):
            yield Key(int(order[place // self.repeats]), place % self.repeats, epoch, self.seed)

    def _shuffled(self) -> Tensor:
        count = len(self.images)
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        if self.images.files is None:
            return torch.randperm(count, generator=generator)
        files = torch.from_numpy(self.images.files)
        turn = torch.randperm(int(files.max()) + 1, generator=generator)
        by_file = torch.argsort(turn[files], stable=True)
        delay = SHUFFLE_BUFFER * torch.rand(count, generator=generator, dtype=torch.float64)
        return by_file[torch.argsort(torch.arange(count) + delay)]


class Loader(DataLoader[Any]):
    """Batches of the images that can be decoded: one with broken files is smaller, one with nothing else is left out.

    epoch: the number of the next pass, which fixes its order and augmentation. taken: batches of the pass until now,
    those left out too. skipped: names of the broken files met so far.
    """

    def __init__(self, images: Images, batch_size: int, order: Order, workers: int) -> None:
        super().__init__(
            images,
            batch_size=batch_size,
            sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_enter,
            collate_fn=_collate,
            generator=torch.Generator(),  # of its own: a pass draws nothing from the global one
        )
        self._order, self._size = order, batch_size
        self.epoch = self.taken = self._left_out = 0
        self.skipped: list[str] = []

    def set_epoch(self, epoch: int, left_out: int = 0) -> None:
        """Make the next pass that of `epoch`, without its first batches; each pass begun adds one."""
        self.epoch, self._left_out = epoch, left_out

    def close(self) -> None:
        """End the processes that decode; another pass starts new ones."""
        iterator, self._iterator = self._iterator, None  # where torch keeps them between passes
        if iterator is not None:
            # now, not when the last traceback that holds it is gone
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own class
        """One pass.

        Raises:
            UserError: more broken images than `MAX_BROKEN` allows, or nothing else at its beginning.
            MemoryError, RuntimeError: no memory for an image or a batch, or a process that decodes has died.
        """
        self.taken, self._left_out = self._left_out, 0
        self._order.epoch, self._order.left_out = self.epoch, self.taken * self._size
        self.epoch += 1
        broken: list[str] = []
        seen = unused = 0
        try:
            for images, labels, names in in_turn(super().__iter__()):
                adapt()
                self.taken += 1
                seen += len(labels) + len(names)
                broken += [name for name in names if not isinstance(name, Ribbon)]
                unused += len(names)
                self.skipped += [name for name in names if name not in self.skipped]
                self._refuse_if_too_many(broken, seen)
                if unused == seen >= min(ALL_BROKEN, len(self._order)):
                    raise UserError(f"none of the first {seen} images can be used: {skipped_line([self])}")
                if len(labels):
                    yield images, labels
        except Exception as error:
            self.close()
            raise _without_traceback(error) from None

    def _refuse_if_too_many(self, broken: list[str], seen: int) -> None:
        total = len(self._order)
        most = max(1, MAX_BROKEN * max(seen, min(total, BROKEN_BASE)))
        if len(broken) > most or len(broken) == seen >= min(ALL_BROKEN, total):
            raise UserError(
                f"{len(broken)} of the first {seen} images ({len(broken) / seen:.0%}) cannot be decoded, "
                f"{MAX_BROKEN:.0%} may be: {_first(broken)}"
            )


def loader(
    images: Images,
    batch_size: int,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    repeats: int = 1,
) -> Loader:
    """Batches in an order that `seed` and the epoch fix, another one each pass.

    The order and what augmentation does to each image are the same for any number of workers, and in a training that
    goes on at epoch e after `set_epoch(e)`.

    Args:
        workers: processes that decode (0: this one); they live until the loader does not, or is closed.
        rank, world_size: which of how many equal, disjoint parts of each pass this loader has. `Order` says which
            images are left out where the parts do not come out even: to evaluate, leave `world_size` at 1.
        repeats: how often a pass shows each of its images, augmented differently each time; it keeps its length.
    """
    return Loader(images, batch_size, Order(images, shuffle, seed, rank, world_size, repeats), workers)


class Skipping(Protocol):
    """skipped: names of the images that a loader could not use."""

    @property
    def skipped(self) -> Sequence[str]: ...


def skipped_line(loaders: Sequence[Skipping]) -> str | None:
    """What to tell the user about the images that could not be used; None where all could."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(each.skipped for each in loaders)))
    broken = [name for name in names if not isinstance(name, Ribbon)]
    ribbons = [name for name in names if isinstance(name, Ribbon)]
    lines = [
        f"skipped {len(found)} image{'s' * (len(found) > 1)} {why}: {_first(found)}"
        for found, why in (
            (broken, "that cannot be decoded"),
            (ribbons, f"more than {MAX_ASPECT} times as long as wide"),
        )
        if found
    ]
    return "; ".join(lines) or None


def _first(names: Sequence[str]) -> str:
    return listed(map(shown, names), NAMED)


def _enter(worker: int) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains, which ends this one


def _without_traceback(error: Exception) -> Exception:
    """What a process that decodes raised or died of, where it was that: torch puts its traceback into the message."""
    text = str(error)
    if "DataLoader worker (pid" in text:
        return RuntimeError(
            "a process that decodes images has died, most often for want of memory or of room in /dev/shm: "
            "give fewer --workers"
        )
    if "in DataLoader worker process" in text:
        return type(error)(text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: "))
    return error


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [item for item in items if isinstance(item, str)]
