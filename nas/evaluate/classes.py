"""Which output of a network stands for which class of the images: by name, never by order."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.units import listed, shown

if TYPE_CHECKING:
    from timm.data import ImageNetInfo

NAMED = 8
"""Classes that a message names."""


@dataclass(frozen=True)
class Matched:
    """outputs: the network's output of each class of the images. names: of all outputs. how: what they were matched by,
    in words; "" where it is by their names."""

    outputs: tuple[int, ...]
    names: tuple[str, ...]
    how: str = ""


def match(classes: Sequence[str], names: Sequence[str] | None, outputs: int, label: str) -> Matched:
    """Find the classes of images among those of a network, which may have more.

    By its names; as WordNet ids, where the network is of one of ImageNet's sets; by number, where it says no names and
    the classes are called 0, 1, 2...

    Args:
        classes: of the images.
        names: of the network's outputs; None: it does not say them.
        outputs: how many it has.
        label: how messages call it.

    Raises:
        UserError: a class that the network does not know, or two outputs of its name.
    """
    wanted = [_plain(each) for each in classes]
    if names is not None:
        places = {_plain(name): i for i, name in enumerate(names)}
        if all(each in places for each in wanted):
            twice = Counter(map(_plain, names))
            several = [shown(name) for name, plain in zip(classes, wanted, strict=True) if twice[plain] > 1]
            if several:
                raise UserError(
                    f"{label} has several outputs called {listed(several)}: which one is meant cannot be told"
                )
            return Matched(tuple(places[each] for each in wanted), tuple(names))
    imagenet = _imagenet(outputs)
    if imagenet is not None:
        described = [imagenet.index_to_description(i) for i in range(outputs)]
        ids = {name: i for i, name in enumerate(imagenet.label_names())}
        if all(each in ids for each in wanted) and (names is None or list(names) == described):
            return Matched(
                tuple(ids[each] for each in wanted), tuple(described), "as WordNet ids of ImageNet's classes"
            )
    if names is None and all(each.isascii() and each.isdecimal() and int(each) < outputs for each in wanted):
        numbered = tuple(str(i) for i in range(outputs))
        return Matched(tuple(int(each) for each in wanted), numbered, "by number: class folder 0 is the first output")
    raise UserError(_mismatch(classes, wanted, names, outputs, label))


def read_labels(path: Path) -> list[str]:
    """Names of classes, one a line, in the order of a network's outputs, as labels.txt has them, in UTF-8. Empty lines
    at the end are not read.

    Raises:
        UserError: it cannot be read, is empty, or has an empty line between names.
    """
    try:
        found = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--labels {path} is no text in UTF-8: give one name a line") from None
    except OSError as error:
        raise UserError(f"--labels {path}: {error.strerror}") from None
    while found and not found[-1]:
        found.pop()
    if not found:
        raise UserError(f"--labels {path} is empty: give one name a line")
    if "" in found:
        raise UserError(f"--labels {path}: line {found.index('') + 1} is empty: give one name a line")
    return found


def _plain(name: str) -> str:
    """As names are compared: accents in one form, what is no text as a card writes it."""
    return unicodedata.normalize("NFC", name.encode(errors="surrogateescape").decode(errors="replace"))


def _imagenet(outputs: int) -> ImageNetInfo | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": outputs})
    found = ImageNetInfo(subset) if subset else None
    return found if found is not None and found.num_classes() == outputs else None


def _mismatch(
    classes: Sequence[str], wanted: Sequence[str], names: Sequence[str] | None, outputs: int, label: str
) -> str:
    has = f"the {len(classes):,} class{'es' * (len(classes) != 1)} of the images"
    if names is None:
        return (
            f"{label} does not say what its {outputs:,} classes are called ({has}: {_some(classes)}): give their "
            "names in the order of its outputs, one a line, as --labels FILE"
        )
    known = {_plain(name) for name in names}
    strange = [name for name, plain in zip(classes, wanted, strict=True) if plain not in known]
    folded = {name.strip().casefold(): name for name in known}
    near = {name: folded[plain] for name in strange if (plain := _plain(name).strip().casefold()) in folded}
    renamed = listed([f"{_quoted(name)} to {_quoted(to)}" for name, to in near.items()], NAMED)
    hint = f"rename {renamed}" if near else "rename or remove these folders"
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        hint = f"{_some(twice)} stand{'s' * (len(twice) == 1)} there more than once"
    return f"{label} does not know {_some(strange)} of {has}; its {len(names):,} are {_some(names)}: {hint}"


def _some(names: Sequence[str]) -> str:
    return listed(map(_quoted, names), NAMED)


def _quoted(name: str) -> str:
    """A name in one line, in quotes where it is empty, or blanks begin or end it."""
    return shown(name) if name and name == name.strip() else repr(shown(name))
