"""Trainings of a search's candidates: the weights of the best few, for where it ends before its final trainings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from nas.export.folder import save_weights
from nas.units import counted

if TYPE_CHECKING:
    from torch import nn

FOLDER, SUFFIX = "kept", ".safetensors"
MOST = 5
KEY = "vitnas.kept"
"""Under which the metadata of the weights' file holds a `Kept`."""


@dataclass(frozen=True)
class Kept:
    """One of them. epochs and images: of its training; 0 epochs where it is as that begins. top1: percent of `judged`
    training images held out from it. score: what it was ranked by when it ended."""

    epochs: int
    images: int
    top1: float
    judged: int
    score: float

    @property
    def words(self) -> str:
        what = (
            f"the search's own training of {counted(self.epochs, 'epoch')} of {self.images:,} images, not a full one"
            if self.epochs
            else "a pretrained network as its tuning begins, with no epoch of its own"
        )
        judged = f"its accuracy there is on {self.judged:,} training images held out, which also chose it"
        return f"best/ holds {what}; {judged}"


def path_of(folder: Path, digest: str) -> Path:
    """Where the weights of an Arch are, if they are kept."""
    return folder / f"{digest[:16]}{SUFFIX}"


def read(path: Path) -> Kept | None:
    """What is known of weights; None where there are none that a search has kept."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return TypeAdapter(Kept).validate_json(file.metadata()[KEY])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):  # another worker has removed it
        return None


def keep(folder: Path, digest: str, network: nn.Module, facts: Kept, scores: Mapping[str, float]) -> None:
    """Write a network's weights if it is among the best `MOST`, and remove those of all others.

    scores: of Archs by digest, as they rank now; those of other workers may be missing, and count as they ended.
    """
    ranks = {path_of(folder, key): score for key, score in scores.items()}
    own = path_of(folder, digest)
    for path in folder.glob(f"[!.]*{SUFFIX}"):
        if path not in ranks:
            found = read(path)
            ranks[path] = found.score if found else float("-inf")
    there = {own, *(path for path in ranks if path.is_file())}
    best = sorted(there, key=lambda path: -ranks.get(path, facts.score))[:MOST]
    if own in best:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(network, own, {KEY: json.dumps(asdict(facts))})
    for path in there.difference(best):
        path.unlink(missing_ok=True)
