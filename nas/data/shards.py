"""WebDataset shards: uncompressed tar files of name.jpg beside name.cls, which holds the label as a number.

An index of where each image lies is read once and kept, so shards are images like any others: counted, split by class,
sampled and shuffled without a pass over their pixels. Their pixels are read from the shards each time they are shown.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from filelock import FileLock
from torchvision.datasets.folder import IMG_EXTENSIONS

from nas.data.images import Rows
from nas.errors import UserError
from nas.files import drafted

LABEL = "cls"
HEADER = 512
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Member:
    """`size` bytes of a shard from `offset` on."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        try:
            header = Member(self.shard, self.offset - HEADER, HEADER).read()
            return f"{self.shard}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape').name}"
        except (OSError, tarfile.HeaderError):
            return f"{self.shard} from byte {self.offset}"


@dataclass(frozen=True)
class Index:
    """Where the images of `shards` lie: a row each of the number of its shard, its place there and its label."""

    shards: list[Path]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def rows(self, wanted: set[Path]) -> np.ndarray:
        """The images of these shards."""
        return np.flatnonzero(np.isin(self.file, [i for i, shard in enumerate(self.shards) if shard in wanted]))

    def sources(self, rows: np.ndarray) -> Rows:
        return Rows(partial(_member, self), rows)


def find_shards(pattern: str) -> list[Path]:
    """All .tar files below a folder, or those that a pattern with {0000..0127}, {a,b} or * names.

    Raises:
        UserError: there are none, or one that the braces name is missing.
    """
    if Path(pattern).is_dir():
        found = sorted(Path(pattern).rglob("*.tar"))
        if not found:
            raise UserError(f"{pattern} holds no shards (*.tar)")
        return found
    found = []
    for name in _expand(pattern):
        here = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * Path(name).is_file()
        if not here:
            raise UserError(f"{name}: no such shard")
        found += map(Path, here)
    return list(dict.fromkeys(found))


def read_index(shards: list[Path], cache: Path) -> Index:
    """The index of these shards, from `cache` where they have not changed since it was read.

    Raises:
        UserError: a shard is no tar file, holds no images, or an image without a label.
    """
    marks = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    path = cache / f"{hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:24]}.npz"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            found = [_scan(shard) for shard in shards]
            file = np.repeat(np.arange(len(shards)), [len(rows) for rows in found])
            with drafted(path) as draft:
                np.savez(draft, columns=np.stack([file, *np.concatenate(found).T]))
    with np.load(path, allow_pickle=False) as kept:
        return Index(shards, *kept["columns"])


def _scan(shard: Path) -> np.ndarray:
    """(images, 3) int64: offset, size and label of each."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as file:
            for member in file:
                file.members = []  # tarfile would keep them all
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.partition(".")
                if not member.isfile() or not stem:
                    continue
                key = str(path.parent / stem)
                if f".{suffix.lower()}" in IMG_EXTENSIONS:
                    if key in images:
                        raise UserError(f"{shard} holds two images called {key}")
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix == LABEL:
                    labels[key] = _label(file.extractfile(member).read(), shard, member.name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard} is not a whole, uncompressed tar file: {error}") from None
    if not images:
        raise UserError(f"{shard} holds no images ({', '.join(IMG_EXTENSIONS)})")
    for key, (name, *_) in images.items():
        if key not in labels:
            raise UserError(f"{shard}: {name} has no {key}.{LABEL} with its label beside it")
    return np.array([(offset, size, labels[key]) for key, (_, offset, size) in images.items()], dtype=np.int64)


def _label(text: bytes, shard: Path, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{shard}: {name} says {text[:20]!r}, not the number of a class") from None


def _member(index: Index, row: int) -> Member:
    return Member(index.shards[index.file[row]], int(index.offset[row]), int(index.size[row]))


def _expand(pattern: str) -> list[str]:
    """{a,b} and {08..11}, in one another too, as a shell expands them."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    between = RANGE.fullmatch(found[1])
    if between:
        first, last = between.groups()
        options = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        options = found[1].split(",")
    each = (_expand(pattern[: found.start()] + option + pattern[found.end() :]) for option in options)
    return list(dict.fromkeys(name for names in each for name in names))
