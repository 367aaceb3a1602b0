"""What a source finds: images with labels, in one part or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.data.images import Source


@dataclass(frozen=True)
class Part:
    sources: Sequence[Source]
    labels: list[int]
    files: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """classes: None where labels are bare numbers. val: None where `train` is to be split; validation: what it is, in
    words. left_out: what was found and not used. notes: what looks odd."""

    name: str
    classes: list[str] | None
    train: Part
    val: Part | None = None
    validation: str = ""
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
