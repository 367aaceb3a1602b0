"""Identities: what must agree for a run or a study to go on, such as digests of its inputs, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nas.errors import UserError

IMAGES = "the images of --data"
PIXELS = "the pixels"
"""How images become a network's input, in words; left out where that is as a network from scratch has it."""
LENGTH = 16
"""Hexadecimal digits of a digest."""


def file_digest(path: Path, length: int = LENGTH) -> str:
    """The SHA-256 of a file's content: its first hexadecimal digits, 64 at most.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:length]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def text_digest(text: str) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def changed(known: Mapping[str, str | None], found: Mapping[str, str | None]) -> str:
    """What differs between two identities, in words; "" where nothing does."""
    return " and ".join(name for name in {**known, **found} if known.get(name) != found.get(name))


def older(known: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether an earlier vitnas digested the images of a run: its digest compares with none of today's."""
    begun, now = known.get(IMAGES), found.get(IMAGES)
    return begun is not None and now is not None and begun.rpartition(":")[0] != now.rpartition(":")[0]


def differences(known: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Every key that differs, with both values, those of an inner mapping as "hardware.cpu"; "" where none does."""
    return "; ".join(f"{key} {old}, this command says {new}" for key, old, new in _differing(known, found))


def _differing(known: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in {**known, **found}:
        old, new = known.get(key, "unset"), found.get(key, "unset")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from ((f"{key}.{inner}", *values) for inner, *values in _differing(old, new))
        elif old != new:
            yield key, old, new
