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
    from torch import nn

    from nas.data.images import Images
    from nas.quality.trainer import CandidateTrainer
    from search_spaces import Arch
    from search_spaces.network import Network

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
            f"matter is judged with a linear probe; `vitnas train {text} --data ... ` first makes a better parent"
        )
    images = sample(trainer.halves(arch.resolution)[0], SCORED_IMAGES, trainer.seed)
    judged, shape = model, arch.replace(num_classes=classes)
    if shape != arch:
        judged = _probed(model, shape, images, trainer)
    try:
        scores = score(judged, anatomy(shape), loader(images, 32, shuffle=False, seed=trainer.seed), "taylor")
    except ImportanceError as error:
        raise UserError(f"--parent {text}: {error}") from None
    return Parent(text, arch, model.state_dict(), scores, seen)


def _probed(model: nn.Module, arch: Arch, images: Images, trainer: CandidateTrainer) -> Network:
    """A copy with a linear probe. arch: its own, for the user's classes."""
    from nas.quality.ready import give_probe
    from search_spaces import create_model

    probed = create_model(arch)
    own, given = probed.state_dict(), model.state_dict()
    probed.load_state_dict({name: given[name] if given[name].shape == own[name].shape else own[name] for name in own})
    give_probe(probed, images, trainer, trainer.data.pixels)
    return probed.cpu()


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
