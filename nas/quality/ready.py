"""A published network with its own weights, and the linear probe that makes it one of the user's classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.networks.timm_network import TimmNetwork

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from nas.data.images import Images
    from nas.data.pixels import Pixels
    from nas.quality.trainer import CandidateTrainer
    from search_spaces import Arch

ALIVE = 1e-3
"""The standard deviation of a channel that is alive, over the largest of all, is above this."""


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
    from nas.training.probe import find_features, fit_probe, install

    plain = trainer.plain(images, arch_of(model).resolution, pixels)

    def told(done: int) -> None:
        trainer.progress("linear probe", done, len(plain))

    found = find_features(model, trainer.batches(plain), trainer.device, progress=told)
    values = without_dead(found.values)
    install(model, fit_probe(values, found.labels, len(trainer.data.classes), trainer.seed))


def without_dead(features: Tensor) -> Tensor:
    """Features (N, F) with those of channels that are all but dead held at their mean, so that a probe leaves them out.

    Such channels are what a cut leaves. A probe standardises its features, and what is rounding would have weights of
    thousands, which the first update of a training turns into noise: a network cut to a fifth of its parameters fell
    from 76.9 to 25.0% of four classes.
    """
    deviation = features.std(0, correction=0)
    return features.where(deviation > ALIVE * deviation.max(), features.mean(0))
