"""What a command's inputs hold, as digests by name: a run goes on only with what it was begun with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMAGES = "the images of --data"


def changed(known: Mapping[str, str | None], found: Mapping[str, str | None]) -> str:
    """What differs between two identities, in words; "" where nothing does."""
    return " and ".join(name for name in {**known, **found} if known.get(name) != found.get(name))


def older(known: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether an earlier vitnas digested the images of a run: its digest compares with none of today's."""
    begun, now = known.get(IMAGES), found.get(IMAGES)
    return begun is not None and now is not None and begun.rpartition(":")[0] != now.rpartition(":")[0]
