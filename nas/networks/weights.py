"""A network with its weights: given ones, those beside its arch.json, or timm's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.networks.targets import Target, find_target

if TYPE_CHECKING:
    from search_spaces import Arch
    from search_spaces.network import Network


def load(network: str | Path | Target | Arch, weights: str | Path | None = None, what: str | None = None) -> Network:
    """A network with its weights, in training mode: (B, 3, R, R) -> (B, classes) logits.

    What the weights lacked, and what was left out of them, is in the network's `untrained` and `loaded`.

    Args:
        network: a published name, an arch.json or a run's folder (see `nas.networks.targets.find_target`), or an Arch.
        weights: "timm", or a file of PyTorch or safetensors. None: model.safetensors beside the arch.json, or timm's of
            a published name.
        what: how messages call the network or its weights. None: by the name it is given by.

    Raises:
        UserError: no such network, one of timm's or an ONNX file, no weights, or weights that do not fit.
    """
    from search_spaces import Arch, ArchError, create_model
    from search_spaces.checkpoints import WeightsError

    if isinstance(network, Arch):
        arch, source, named = network, weights, what or ""
        if source is None:
            raise UserError(f'{named or arch.family}: give its weights, "timm" or a file')
    else:
        target = network if isinstance(network, Target) else find_target(str(network))
        named = what or target.label
        arch, source = _arch_of(target, named), weights or _weights_of(target, named)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return create_model(arch, weights=source)
    except (ArchError, WeightsError) as error:
        raise UserError(f"{named}: {error}" if named else str(error)) from None


def _arch_of(target: Target, named: str) -> Arch:
    if target.arch is None:
        raise UserError(f"{named} is {target.kind}: give a folder with model.safetensors, or a published name")
    return target.arch


def _weights_of(target: Target, named: str) -> str | Path:
    if target.weights is not None:
        return target.weights
    if target.folder is not None:
        raise UserError(f"{named} has no model.safetensors: `vitnas train` makes one")
    return "timm"
