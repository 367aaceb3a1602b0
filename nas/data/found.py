"""What a source finds: images with labels, in one part or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.data.decoding import Source


@dataclass(frozen=True)
class LabelledImages:
    """Images with a label each."""

    sources: Sequence[Source]
    labels: list[int]
    files: np.ndarray | None = None
    """(N,) the number of the file that holds each, for images that are read fastest in the order of their files."""


@dataclass(frozen=True)
class FoundImages:
    """What a source holds, before it is split and checked."""

    name: str
    classes: list[str] | None
    """Names in label order; None where labels are bare numbers."""
    train: LabelledImages
    val: LabelledImages | None = None
    """None: some of `train` are to be picked."""
    validation: str = ""
    """What `val` is, in words."""
    left_out: tuple[str, ...] = ()
    """What was found and is not used."""
    notes: tuple[str, ...] = ()
    """What looks odd."""
