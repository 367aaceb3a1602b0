"""From an Arch or a timm network to a module, here or in a child process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from nas.networks.timm_network import create_timm

if TYPE_CHECKING:
    from torch import nn

    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch


def to_document(network: Arch | TimmNetwork) -> str:
    """The JSON of a network: an arch.json, or {"timm": NAME, "resolution": pixels}."""
    from search_spaces import Arch

    if isinstance(network, Arch):
        return network.to_json()
    return json.dumps({"timm": network.name, "resolution": network.resolution})


def from_document(text: str) -> Arch | TimmNetwork:
    """The inverse of `to_document`; raises ArchError where it is neither."""
    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch

    document = json.loads(text)
    if "timm" in document:
        return TimmNetwork(document["timm"], document["resolution"])
    return Arch.from_json(text)


def build(network: Arch | TimmNetwork) -> nn.Module:
    """The network for inference, BatchNorm folded (timm's as far as timm can), with the same random weights always."""
    import torch

    from search_spaces import Arch, fold
    from search_spaces.registry import FAMILIES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fold(FAMILIES[network.family].build(network)) if isinstance(network, Arch) else create_timm(network)
        randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    """Weights of variance 1 / fan-in and small biases, for a folded network.

    The usual initial values are no use here: folded, they let the signal die out, so that the logits hardly depend on
    the image, there is nothing to calibrate int8 with, and zeros (last gammas of residual branches) can be quicker to
    multiply than what a trained network has. These keep it at the size of the image, within float16.
    """
    for name, value in model.named_parameters():
        if value.ndim > 1:
            bound = (3 / value[0].numel()) ** 0.5
            value.data.uniform_(-bound, bound)
        elif name.endswith("bias"):
            value.data.uniform_(-0.05, 0.05)
