"""How large a network is: parameters and multiply-accumulates."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.networks.build import create, for_inference
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.text import first_line

if TYPE_CHECKING:
    from search_spaces import Arch

TIMM_COUNTED = "MACs: of convolutions, matrix products and attention; nothing else is counted in timm's networks"


@dataclass(frozen=True)
class Counts:
    """Of a network."""

    params: int
    """Trainable parameters, as it is trained."""
    macs: int
    """Multiply-accumulates of one image, as it is exported: BatchNorm folded, branches merged. Of an Arch, those that
    `search_spaces.widths.Table.macs` counts; of timm's networks, those that torch's FlopCounterMode does
    (TIMM_COUNTED)."""


@functools.lru_cache(maxsize=64)
def counts_of(network: Arch | TimmNetwork) -> Counts:
    """Count a network without memory for its weights, or arithmetic: an Arch in less than a millisecond.

    Raises:
        UserError: it cannot be built, or cannot run at its resolution.
    """
    from search_spaces import ArchError, count

    if isinstance(network, TimmNetwork):
        return _of_timm(network)
    try:
        found = count(network)
    except ArchError as error:
        raise UserError(str(error)) from None
    return Counts(found.params, found.macs)


def _of_timm(network: TimmNetwork) -> Counts:
    import torch

    from pruning.macs import count_macs

    size = network.resolution
    with torch.device("meta"):
        model = create(network)
        try:
            macs = count_macs(for_inference(model), torch.empty(1, 3, size, size))[""]
        except Exception as error:  # timm's networks raise whatever their authors thought of
            raise UserError(f"{TIMM}{network.name} cannot run at {size} px: {first_line(error)}") from None
    return Counts(sum(each.numel() for each in model.parameters() if each.requires_grad), macs)
