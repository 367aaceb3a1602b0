"""WebDataset shards: uncompressed tar files of name.jpg beside name.cls, which holds the label, a number or a word; or
beside name.json, which holds it as "label".

An index of where each image lies is read once and kept, so shards are images like any others: counted, split by class,
sampled and shuffled without a pass over their pixels. Their pixels are read from the shards each time they are shown.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from filelock import FileLock
from torchvision.datasets.folder import IMG_EXTENSIONS

from nas.data.images import Rows
from nas.data.listing import natural_key
from nas.errors import UserError
from nas.files import drafted

FORMAT = 2
"""Of the index that is kept."""
LABEL, DOCUMENT = ".cls", ".json"
KEYS = ("label", "cls", "class", "target")
"""Of a label in a JSON document."""
SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".gif", ".avif", ".jp2")
LONGEST = 200
LARGEST = 2**31
"""What the number of a class is below."""
HEADER = 512


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
    """Where the images of `shards` lie: a row each of the number of its shard, its place there and its label.
    classes: of labels in words."""

    shards: list[Path]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    classes: list[str] | None
    left_out: tuple[str, ...]

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
    try:
        names = list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError:  # a shell takes these braces as they are
        names = [pattern]
    found = []
    for name in names:
        here = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * Path(name).is_file()
        if not here:
            raise UserError(f"{name}: no such shard")
        found += map(Path, here)
    return list(dict.fromkeys(found))


def read_index(shards: list[Path], cache: Path) -> Index:
    """The index of these shards, from `cache` where they have not changed since it was read.

    Raises:
        UserError: a shard is no tar file, holds no images, or an image without a label; a damaged index.
    """
    marks = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    path = cache / f"{hashlib.sha256(json.dumps([FORMAT, marks]).encode()).hexdigest()[:24]}.npz"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            found = [_scan(shard) for shard in shards]
            columns, classes = _columns(found, shards)
            left_out = [line for each in found for line in each.left_out]
            with drafted(path) as draft:
                np.savez(draft, columns=columns, classes=np.array(classes, str), left_out=np.array(left_out, str))
    try:
        with np.load(path, allow_pickle=False) as kept:
            file, offset, size, label = kept["columns"]
            words, lost = kept["classes"].tolist(), kept["left_out"].tolist()
    except (OSError, MemoryError):
        raise
    except Exception:  # numpy's errors are of many kinds
        raise UserError(f"{path} is damaged: remove it, and the shards are read again") from None
    return Index(shards, file, offset, size, label, words or None, tuple(lost))


@dataclass(frozen=True)
class Shard:
    """A shard's images. places: offset and size of each; labels: a number or a word each; left_out: in words."""

    names: list[str]
    places: list[tuple[int, int]]
    labels: list[int | str]
    left_out: list[str]


def _scan(shard: Path) -> Shard:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int | str] = {}
    documents: dict[str, tuple[str, int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as file:
            for member in file:
                file.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                path = PurePosixPath(member.name)
                if not member.isfile() or path.name.startswith("."):
                    continue
                key, suffix, place = str(path.with_suffix("")), path.suffix.lower(), (member.offset_data, member.size)
                if suffix in SUFFIXES:
                    if key in images:
                        raise UserError(f"{shard} holds two images called {key}")
                    images[key] = (member.name, *place)
                elif suffix == LABEL:
                    content = file.extractfile(member)
                    assert content is not None  # it is a file
                    labels[key] = _label(content.read(), f"{shard}: {member.name}")
                elif suffix == DOCUMENT:
                    documents[key] = (member.name, *place)
    except (tarfile.TarError, OSError, EOFError) as error:
        packed = ": it is compressed, unpack it to a plain .tar first" if _compressed(shard) else f": {error}"
        raise UserError(f"{shard} is not a whole, uncompressed tar file{packed}") from None
    if not images:
        raise UserError(f"{shard} holds no images ({', '.join(SUFFIXES)})")
    return _labelled(shard, images, labels, documents)


def _labelled(
    shard: Path,
    images: dict[str, tuple[str, int, int]],
    labels: dict[str, int | str],
    documents: dict[str, tuple[str, int, int]],
) -> Shard:
    """Each image with the label of its name, whose dots may begin a suffix of several parts (0001.seg.png)."""
    of_sample: dict[str, list[str]] = {}
    for key in images:
        of_sample.setdefault(_sample(key), []).append(key)
    taken, used, parts = Shard([], [], [], []), set(), []
    for key, (name, offset, size) in images.items():
        sample = _sample(key)
        owner = key if key in labels or key in documents else sample
        if owner != key and sample in images:
            parts.append(name)
            continue
        if owner in labels:
            label = labels[owner]
        elif owner in documents:
            document, *at = documents[owner]
            label = _label_in(Member(shard, *at).read(), f"{shard}: {document}", f"{name} has no {key}{LABEL}")
        else:
            raise UserError(f"{shard}: {name} has no {key}{LABEL} with its label beside it, nor {key}{DOCUMENT}")
        if owner != key and len(of_sample[sample]) > 1:
            raise UserError(f"{shard}: {' and '.join(of_sample[sample][:2])} have one label, {owner}{LABEL}")
        used.add(owner)
        taken.names.append(name)
        taken.places.append((offset, size))
        taken.labels.append(label)
    if parts:
        taken.left_out.append(f"{len(parts):,} images that are parts of others ({parts[0]})")
    if lonely := [key for key in labels if key not in used]:
        taken.left_out.append(f"{len(lonely):,} labels without an image that Pillow can open ({lonely[0]}{LABEL})")
    return taken


def _sample(key: str) -> str:
    """A name up to its first dot, as WebDataset groups the files of a sample."""
    path = PurePosixPath(key)
    return str(path.parent / path.name.partition(".")[0])


def _columns(found: list[Shard], shards: list[Path]) -> tuple[np.ndarray, list[str]]:
    """(4, images) int64: the number of each one's shard, offset, size and label; and the classes of labels in words.

    Raises:
        UserError: numbers and words.
    """
    words = sorted({label for each in found for label in each.labels if isinstance(label, str)}, key=natural_key)
    number = {word: i for i, word in enumerate(words)}
    rows = []
    for i, each in enumerate(found):
        for name, place, label in zip(each.names, each.places, each.labels, strict=True):
            if words and isinstance(label, int):
                raise UserError(
                    f"{shards[i]}: {name} has the label {label} but others words ({words[0]!r}): write one kind"
                )
            rows.append((i, *place, number[label] if isinstance(label, str) else label))
    return np.array(rows, dtype=np.int64).T, words


def _label(text: bytes, name: str) -> int | str:
    """A number, or a word."""
    word = text.decode(errors="replace").strip()
    try:
        return _whole(float(word) if "." in word else int(word), name)
    except ValueError:
        pass
    if not word or not word.isprintable() or len(word) > LONGEST:
        raise UserError(f"{name} says {text[:20]!r}: a label is the number or the name of a class")
    return word


def _label_in(document: bytes, name: str, why: str) -> int | str:
    """The label of a JSON document."""
    try:
        found = json.loads(document)
    except ValueError:
        raise UserError(f"{name} is no JSON document, and {why}") from None
    for key in KEYS:
        value = found.get(key) if isinstance(found, dict) else None
        if isinstance(value, str):
            return _label(value.encode(), name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _whole(value, name)
    raise UserError(f"{why} with its label beside it, nor has {name} one ({', '.join(KEYS)})")


def _whole(value: float, name: str) -> int:
    if not -LARGEST < value < LARGEST or value != int(value):
        raise UserError(f"{name} says {value!s:.20}: a label is the number of a class, from 0, or its name")
    return int(value)


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


def _member(index: Index, row: int) -> Member:
    return Member(index.shards[index.file[row]], int(index.offset[row]), int(index.size[row]))
