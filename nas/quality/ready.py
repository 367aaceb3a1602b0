"""A published network with its own weights, and the linear probe that makes it one of the user's classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.networks.timm_network import TimmNetwork

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from nas.data.images import Images
    from nas.data.pixels import Pixels
    from nas.quality.trainer import CandidateTrainer
    from search_spaces import Arch


def own_pixels(network: Arch | TimmNetwork) -> Pixels:
    """How images are prepared for a published network's weights."""
    from nas.export.card import pixels_of

    return pixels_of(network, "timm")


def with_weights(network: Arch | TimmNetwork, weights: Path) -> nn.Module:
    """A published network at its resolution, with weights of whatever resolution; a classifier for other classes is
    untrained.

    Raises:
        UserError: they do not fit.
    """
    from nas.networks.weights import load, load_as_trained, resized
    from search_spaces.weights import published_name

    if isinstance(network, TimmNetwork):
        return load(network, weights, what=f"timm/{network.name}")
    trained = load_as_trained(network, weights, network.resolution, what=published_name(network) or "")
    return trained if trained.arch == network else resized(trained, network)


def give_probe(model: nn.Module, images: Images, trainer: CandidateTrainer, pixels: Pixels) -> None:
    """Make a linear probe the classifier of a network that `create` or `load` made.

    Args:
        images: what it is fitted to, at the network's resolution; they are taken without augmentation.

    Raises:
        UserError: a network without a linear classifier, or features that no probe can be fitted to.
    """
    from nas.networks.build import arch_of
    from nas.training import probe

    plain = trainer.plain(images, arch_of(model).resolution, pixels)

    def told(done: int) -> None:
        trainer.progress("linear probe", done, len(plain))

    classes = len(trainer.data.classes)
    probe.give_probe(model, trainer.batches(plain), classes, trainer.seed, trainer.device, told)
