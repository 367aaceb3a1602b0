"""Which files in a folder are images, and what else lies there. PyTorch is not imported."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from nas.errors import UserError
from nas.units import listed, shown

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of images, without a look: torchvision's IMG_EXTENSIONS."""
SYSTEM_FOLDERS = frozenset(
    ("@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found")
)
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
NO_IMAGES = frozenset((".txt", ".xml", ".json", ".csv", ".yaml", ".yml", ".md", ".html", ".npy", ".cls"))
"""Suffixes of what lies beside images: not opened."""
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What a file without a known suffix may be: formats with a signature."""
UNREAD = frozenset(("MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS", "PDF"))
"""Formats that Pillow names but does not decode by itself."""


@dataclass
class LeftOut:
    """What is found and not used. suffixes: of files that are no images; folders: hidden ones and the system's; links:
    to folders that are read anyway; special: pipes, devices and links that lead nowhere; loose: images beside the
    class folders; whole: folders beside the splits."""

    suffixes: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def lines(self) -> tuple[str, ...]:
        found = [f"{name}/" for name in self.whole]
        if self.loose:
            found.append(f"{count_of(len(self.loose), 'image')} beside the class folders ({listed(self.loose)})")
        found += [f"folder{'s' * (count > 1)} {_times(name, count)}" for name, count in self.folders.items()]
        found += [f"link {name} (to a folder that is read anyway)" for name in self.links]
        found += [f"{name} (no regular file)" for name in self.special]
        if self.suffixes:
            found.append(files_of(self.suffixes))
        return tuple(map(shown, found))


def files_of(suffixes: Counter[str]) -> str:
    """Files that are no images, by suffix."""
    kinds = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common()]
    return f"files that Pillow cannot open ({listed(kinds)})"


def natural_key(name: str) -> list[int | str]:
    """Sorts names by the numbers in them, whatever their case: those of timm's function, which fails where an exponent
    or a number in a circle stands alone."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def images_below(name: str, left_out: LeftOut | None = None) -> list[Path]:
    """All images in a folder and in those below it, in order of their paths.

    Args:
        left_out: what else lies there is added to it.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    found = sorted(images_in(Path(name), os.path.realpath(name), left_out or LeftOut(), set()))
    if not found:
        raise UserError(f"{shown(name)} holds no images")
    return found


def images_in(folder: Path, above: str, left_out: LeftOut, visited: set[str]) -> Iterator[Path]:
    """All images below a folder; each real folder once."""
    for entry in visible(folder, left_out):
        if entry.is_dir():
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if read_anyway(entry, above) or real in visited:
                    left_out.links.append(entry.path)
                    continue
                visited.add(real)
            yield from images_in(Path(entry.path), above, left_out, visited)
        elif is_image(entry):
            yield Path(entry.path)
        else:
            left_out.suffixes[os.path.splitext(entry.name)[1].lower()] += 1


def visible(folder: Path, left_out: LeftOut | None) -> Iterator[os.DirEntry[str]]:
    """What is neither hidden nor an operating system's own; folders of these kinds are counted."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        raise UserError(f"{shown(str(folder))} cannot be read: {error.strerror}") from None
    for entry in found:
        try:
            folder_like, special = entry.is_dir(), not (entry.is_dir() or entry.is_file())
        except OSError:  # links in a circle
            folder_like, special = False, True
        if special:
            if left_out is not None:
                left_out.special.append(entry.path)
        elif entry.name.startswith(".") or entry.name.lower() in (SYSTEM_FOLDERS if folder_like else SYSTEM_FILES):
            if folder_like and left_out is not None:
                left_out.folders[entry.name] += 1
        else:
            yield entry


def read_anyway(entry: os.DirEntry[str], above: str) -> bool:
    """Whether a link leads into the data set itself, or to a folder that holds it."""
    if not entry.is_symlink():
        return False
    real = os.path.realpath(entry.path)
    return os.path.commonpath((real, above)) in (real, above)


def is_image(entry: os.DirEntry[str]) -> bool:
    """By suffix, where it is one of the usual; else whether Pillow can open it."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in SUFFIXES:
        return True
    if suffix in NO_IMAGES:
        return False
    own = Image.registered_extensions().get(suffix)
    formats = [each for each in dict.fromkeys((own, *FORMATS)) if each in Image.OPEN and each not in UNREAD]
    try:
        with Image.open(entry.path, formats=formats):
            return True
    except Exception:  # of a dozen kinds
        return False


def count_of(count: int, what: str) -> str:
    return f"{count:,} {what}{'es' * what.endswith('s') or 's' if count > 1 else ''}"


def _times(name: str, count: int) -> str:
    return f"{name}/" + (f" ({count:,} times)" if count > 1 else "")
