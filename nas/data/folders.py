"""Folders of images: which of them are splits and classes, which files are images, and what is left out and why."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from nas.data.found import FoundImages, LabelledImages
from nas.data.listing import LeftOut, count_of, files_of, images_in, is_image, natural_key, read_anyway, visible
from nas.errors import UserError
from nas.units import listed, shown

SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
BESIDE_SPLIT = re.compile(r"(set|sets|data|dataset|images|imgs|img|split|folder)$")
"""Ends the names of splits: train_set, TestImages."""


@dataclass(frozen=True)
class Scan:
    """The images below each class folder of `root`. deep: classes whose images all lie in folders of their own."""

    root: Path
    images: dict[str, list[Path]]
    deep: dict[str, list[str]]
    suffixes: dict[str, Counter[str]]

    def part(self, classes: Sequence[str]) -> LabelledImages:
        found = [(path, label) for label, name in enumerate(classes) for path in self.images.get(name, ())]
        return LabelledImages([path for path, _ in found], [label for _, label in found])


def image_folder(name: str) -> FoundImages:
    """The images of a folder of <class>/ folders, or of train/ beside val/ or test/, however these are called.

    Raises:
        UserError: no such folder, one that does not say which of its folders are classes, or a class without images.
    """
    path = Path(name)
    names, left_out = _folders_in(path, name), LeftOut()
    train, val = _splits(path, names)
    if train is None or val is None:
        _check_level(path, names)
        found = _scan(path, left_out)
        classes = _classes(found)
        odd = [f"a class is called {shown(each)!r}, as a split is" for each in classes if split_of(each)]
        return FoundImages(name, classes, found.part(classes), left_out=left_out.lines(), notes=(*odd, *_notes(found)))
    left_out.whole += sorted(set(names) - {train, val})
    found, judges = _scan(path / train, left_out), _scan(path / val, left_out)
    classes = _classes(found)
    judging, odd = _matched(judges, classes, train)
    return FoundImages(
        name,
        classes,
        found.part(classes),
        judging.part(classes),
        f"{val}/",
        left_out.lines(),
        (*_notes(found), *odd),
    )


def folder_part(name: str, split: str | None) -> FoundImages:
    """The images of a folder that networks are judged on, as `train`; `validation` says which they are, "" where they
    are all that there are. Any number of classes may have some.

    Args:
        split: train, val, test or all; None: val, or else test, or all of a folder without parts.

    Raises:
        UserError: no such folder, one that does not say which of its folders are classes, one without this part, or
            without images.
    """
    path = Path(name)
    names = _folders_in(path, name)
    of = {each: sorted(found for found in names if split_of(found) == each) for each in SPLITS}
    left_out = LeftOut()
    if not (of["train"] and (of["val"] or of["test"])) and not (names and all(map(split_of, names))):
        _check_level(path, names)
        if split not in (None, "all"):
            raise UserError(f"{shown(name)} has class folders, and no {split}/ beside others: leave --split out")
        chosen, scans = [], [_scan(path, left_out)]
    else:
        parts = [found for each in of.values() for found in each]
        chosen = parts if split == "all" else of[split] if split else of["val"] or of["test"]
        if not chosen:
            have = " and ".join(f"{shown(found)}/" for found in parts)
            lacks = f"{split}/" if split else "val/ or test/"
            raise UserError(f"{shown(name)} has {have} but no {lacks}: say which to judge on, as --split train")
        left_out.whole += sorted(set(names) - set(parts))
        scans = [_scan(path / each, left_out) for each in chosen]
    images: dict[str, list[Path]] = {}
    for label, found in (item for scan in scans for item in scan.images.items()):
        images.setdefault(unicodedata.normalize("NFC", label), []).extend(found)
    classes = sorted(sorted(label for label, found in images.items() if found), key=natural_key)
    if not classes:
        raise UserError(f"{shown(name)} holds no images: {shown(name)}/<class>/*.jpg is needed")
    empty = [shown(label) for label, found in images.items() if not found]
    note = [f"no images of {listed(empty)}: accuracy says nothing of them"] if empty else []
    whole = Scan(path, images, {}, {})
    words = " and ".join(f"{each}/" for each in chosen)
    return FoundImages(name, classes, whole.part(classes), None, words, left_out.lines(), tuple(note))


def split_of(name: str) -> str | None:
    """ "train", "val" or "test" for a folder that is called so, whatever its case and form."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    core = [stem for word in words if (stem := BESIDE_SPLIT.sub("", word))]
    return next((split for split, known in SPLITS.items() if len(core) == 1 and core[0] in known), None)


def _folders_in(path: Path, name: str) -> list[str]:
    """The visible folders in a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not path.exists():
        raise UserError(f"{shown(name)}: no such folder")
    if not path.is_dir():
        raise UserError(f"{shown(name)} is not a folder: {_instead(path)}")
    return [entry.name for entry in visible(path, None) if entry.is_dir()]


def _splits(path: Path, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The folders to train on and to validate on; None for one that is not there.

    Raises:
        UserError: several that could be either.
    """
    of = {split: sorted(name for name in names if split_of(name) == split) for split in SPLITS}
    if not of["train"] or not (of["val"] or of["test"]):
        return None, None
    chosen = of["train"], of["val"] or of["test"]
    for each, what in zip(chosen, ("training", "validation"), strict=True):
        if len(each) > 1:
            both = " and ".join(f"{shown(name)}/" for name in each)
            raise UserError(f"{shown(str(path))} has {both}, which could all be its {what} images: leave one")
    return chosen[0][0], chosen[1][0]


def _check_level(path: Path, names: Sequence[str]) -> None:
    """Refuse what has no class folders but splits, or one folder which has the classes."""
    root = shown(str(path))
    if names and all(map(split_of, names)):
        have = " and ".join(f"{shown(name)}/" for name in sorted(names))
        hint = f"give {root}/{shown(names[0])} to split it, or add val/" if len(names) == 1 else "add the other"
        lacks = "val/ or test/" if split_of(names[0]) == "train" else "train/"
        raise UserError(f"{root} has {have} but no {lacks}: {hint}")
    if len(names) == 1 and (inner := _inner(path / names[0])):
        raise UserError(f"{root} holds one folder: did you mean {shown(str(inner))}?")
    if not names:
        shards = f"; for its shards write wds/{root}" if any(path.glob("*.tar")) else ""
        raise UserError(f"{root} has no class folders: {root}/<class>/*.jpg is needed{shards}")


def _inner(path: Path) -> Path | None:
    """The first folder at or below `path`, one folder in another, that holds several; None where images come first."""
    while True:
        entries = list(visible(path, None))
        inside = [entry.name for entry in entries if entry.is_dir()]
        if len(inside) > 1 and not any(is_image(entry) for entry in entries if not entry.is_dir()):
            return path
        if len(inside) != 1:
            return None
        path = path / inside[0]


def _scan(root: Path, left_out: LeftOut) -> Scan:
    """The images below each visible folder in `root`, and what is left out.

    Raises:
        UserError: there are no folders.
    """
    images, deep, suffixes = {}, {}, {}
    above = os.path.realpath(root)
    for entry in sorted(visible(root, left_out), key=lambda entry: natural_key(entry.name)):
        if not entry.is_dir():
            if is_image(entry):
                left_out.loose.append(entry.name)
            continue
        if read_anyway(entry, above):
            left_out.links.append(entry.name)
            continue
        other = LeftOut()
        found = sorted(images_in(Path(entry.path), above, other, {os.path.realpath(entry.path)}))
        images[entry.name], suffixes[entry.name] = found, other.suffixes
        inside = {path.relative_to(entry.path).parts[0] for path in found if path.parent != Path(entry.path)}
        if len(inside) > 1 and all(path.parent != Path(entry.path) for path in found):
            deep[entry.name] = sorted(inside, key=natural_key)
        left_out.suffixes += other.suffixes
        left_out.folders += other.folders
        left_out.links += [os.path.relpath(link, root) for link in other.links]
        left_out.special += [os.path.relpath(path, root) for path in other.special]
    if not images:
        shards = f"; for its shards write wds/{root}" if any(root.glob("*.tar")) else ""
        raise UserError(f"{shown(str(root))} has no class folders: {shown(str(root))}/<class>/*.jpg is needed{shards}")
    return Scan(root, images, deep, suffixes)


def _classes(found: Scan) -> list[str]:
    """Class names in timm's order.

    Raises:
        UserError: one without images.
    """
    for name, images in found.images.items():
        if not images:
            other = found.suffixes[name]
            what = f" but {files_of(other)}" if other else ""
            where = shown(str(found.root / name))
            raise UserError(f"{where} holds no images{what}: add some, or remove the folder")
    return sorted(sorted(found.images), key=natural_key)


def _matched(found: Scan, classes: Sequence[str], train: str) -> tuple[Scan, list[str]]:
    """Validation images under the names of the training classes, and what to note of classes without any.

    Raises:
        UserError: images of a class that has none to train on.
    """
    known = {unicodedata.normalize("NFC", name): name for name in classes}
    images = {known.get(unicodedata.normalize("NFC", name), name): paths for name, paths in found.images.items()}
    root = shown(str(found.root))
    for name in sorted(set(images) - set(classes), key=natural_key):
        if images[name]:
            near = next((each for each in classes if each.casefold() == name.casefold()), None)
            hint = f"rename it to {shown(near)}" if near else f"remove it, or add images to {train}/{shown(name)}"
            raise UserError(f"class {shown(name)!r} is in {root}/ but not in {train}/: {hint}")
    if not any(images.values()):
        raise UserError(f"{root} holds no images: add some, or remove it")
    lacking = [shown(name) for name in classes if not images.get(name)]
    note = [f"{found.root.name}/ has no images of {listed(lacking)}: accuracy says nothing of them"] if lacking else []
    return Scan(found.root, images, found.deep, found.suffixes), note


def _notes(found: Scan) -> Iterator[str]:
    """What looks odd in the folders."""
    alike = sorted(found.images, key=lambda name: (_plain(name), name))
    for _, same in groupby(alike, _plain):
        names = [repr(shown(name)) for name in same]
        if len(names) > 1:
            yield f"the classes {' and '.join(names)} differ in case or spaces only"
    if found.deep:
        name, inside = next(iter(found.deep.items()))
        yield (
            f"{count_of(len(found.deep), 'class')} of {len(found.images)} hold folders of their own "
            f"({shown(name)}: {listed([shown(each) for each in inside])}): their images all count as {shown(name)}"
        )


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip().replace(" ", "").replace("_", "").replace("-", "")


def _instead(path: Path) -> str:
    """What to do with a file in place of a folder."""
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith((".zip", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".7z", ".rar")):
        return "unpack it and give the folder"
    return "give one of images, <class>/*.jpg"
