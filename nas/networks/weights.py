"""A network of ours with its weights: given ones, those beside its Arch, timm's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError

if TYPE_CHECKING:
    from nas.networks.targets import Target
    from search_spaces import Arch
    from search_spaces.network import Network


def load_trained(option: str, target: Target, weights: str | None = None) -> Network:
    """A network of ours with the given weights, or those beside its Arch, or timm's of a published name.

    Args:
        option: what the user named it by, for messages.
        weights: "timm" or a file.

    Raises:
        UserError: an ONNX file, no weights, or weights that do not fit.
    """
    what = f"{option} {target.label}"
    if target.arch is None:
        raise UserError(f"{what} is an ONNX file: give a folder with model.safetensors, or a published name")
    source = weights or target.weights or ("timm" if target.folder is None else None)
    if source is None:
        raise UserError(f"{what} has no model.safetensors: `vitnas train` makes one")
    return load_network(what, target.arch, source)


def load_network(option: str, arch: Arch, weights: str | Path) -> Network:
    """A network with weights: "timm" or a file. option: what the user named them by, for messages.

    Raises:
        UserError: weights that cannot be had or do not fit.
    """
    from search_spaces.checkpoints import WeightsError

    try:
        return create_quietly(arch, weights)
    except WeightsError as error:
        raise UserError(f"{option}: {error}") from None


def create_quietly(arch: Arch, weights: str | Path | None, num_classes: int | None = None) -> Network:
    """As `search_spaces.create_model`, without its warnings: what they say is in the network's `loaded`.

    Raises:
        ArchError, WeightsError: as `create_model`.
    """
    from search_spaces import create_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_model(arch, num_classes, weights)
