"""Identities: what must agree for a run or a study to go on, such as digests of its inputs, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

IMAGES = "the images of --data"


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
