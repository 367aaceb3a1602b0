"""The trained network that candidates inherit from, and how its units are scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.lineage import TIMM, remark
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.quality.trainer import Parent

if TYPE_CHECKING:
    from nas.quality.trainer import CandidateTrainer

SCORED_IMAGES = 512
"""Images that the importance of its units is measured on."""


def find_parent(text: str, trainer: CandidateTrainer, say: Callable[[str], None]) -> Parent:
    """A trained network: a folder's own weights, or timm's of a published name, scored on the user's images.

    Raises:
        UserError: no weights, or weights that do not fit.
    """
    from nas.data.batches import loader
    from nas.data.images import sample
    from nas.networks.targets import find_target
    from nas.networks.weights import load
    from pruning.importance import ImportanceError, score
    from pruning.units import anatomy
    from search_spaces import Arch

    target = find_target(text)
    model = load(target, what=f"--parent {text}")
    arch = model.arch
    if not isinstance(arch, Arch):
        raise UserError(f"--parent {text} is {target.kind}: give a published name, or a folder of a network of ours")
    seen = remark(target.weights or TIMM, trainer.halves(arch.resolution)[1], "judging") or ""
    if seen:
        say(seen)
    classes = len(trainer.data.classes)
    if arch.num_classes != classes:
        say(
            f"{text} has {arch.num_classes} classes and your images {classes}: it cannot teach, and which of its units "
            f"matter is judged by magnitude; `vitnas train {text} --data ... ` first makes a better parent"
        )
        return Parent(text, arch, model.state_dict(), score(model, anatomy(arch), [], "magnitude"), seen)
    images = sample(trainer.halves(arch.resolution)[0], SCORED_IMAGES, trainer.seed)
    try:
        scores = score(model, anatomy(arch), loader(images, 32, shuffle=False, seed=trainer.seed), "taylor")
    except ImportanceError as error:
        raise UserError(f"--parent {text}: {error}") from None
    return Parent(text, arch, model.state_dict(), scores, seen)


def parent_weights(name: str | None) -> str | Path | None:
    """Where a parent's weights are; None without a parent."""
    from nas.networks.targets import find_target

    return None if name is None else find_target(name).weights or TIMM


def parent_pixels(name: str | None) -> Pixels:
    """How a parent's images are prepared, and so its children's; ImageNet's without a parent."""
    from nas.export.card import pixels_of
    from nas.networks.targets import find_target

    if name is None:
        return IMAGENET
    target = find_target(name)
    return IMAGENET if target.network is None else pixels_of(target.network, target.weights or TIMM)
