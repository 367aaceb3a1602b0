"""From an Arch or a timm network to a module: for training, for inference, here or in a child process."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, cast, overload

from nas.errors import UserError
from nas.networks.timm_network import TIMM, TimmNetwork, create_timm
from nas.text import first_line

if TYPE_CHECKING:
    from torch import nn

    from nas.networks.timm_network import TimmModel
    from search_spaces import Arch
    from search_spaces.network import Network


def from_document(text: str | bytes) -> Arch | TimmNetwork:
    """The network of a document, as `to_json` of either kind writes it.

    Raises:
        ArchError: it is no Arch. UserError: it is no network of timm's, though it says so.
    """
    from search_spaces import Arch

    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return Arch.from_json(text)  # which says what is wrong
    return TimmNetwork.from_json(text) if isinstance(document, dict) and "timm" in document else Arch.from_json(text)


@overload
def create(network: Arch) -> Network: ...
@overload
def create(network: TimmNetwork) -> TimmModel: ...
def create(network: Arch | TimmNetwork) -> Network | TimmModel:
    """The network for training, with random weights of the global generator: (B, 3, R, R) -> (B, classes) logits.

    It carries what it was built from as `arch`. Nothing is fetched.

    Raises:
        UserError: it cannot be built.
    """
    from search_spaces import ArchError, create_model

    if isinstance(network, TimmNetwork):
        try:
            return create_timm(network)
        except Exception as error:  # timm's networks raise whatever their authors thought of
            raise UserError(
                f"{TIMM}{network.name} cannot be built at {network.resolution} px for {network.num_classes} classes: "
                f"{first_line(error)}"
            ) from None
    try:
        return create_model(network)
    except ArchError as error:
        raise UserError(str(error)) from None


def arch_of(model: nn.Module) -> Arch | TimmNetwork:
    """What a network that `create` or `load` made was built from."""
    return cast("Arch | TimmNetwork", model.arch)


def classifier_of(model: nn.Module) -> list[nn.Linear]:
    """The last linear layer of a network that `create` or `load` made; of one with a second head for distillation,
    both, whose mean it returns in eval mode.

    Raises:
        UserError: a network of timm's without a classifier, or with one that is not linear.
    """
    from torch import nn

    network = arch_of(model)
    if not isinstance(network, TimmNetwork):
        return [layer for layer in model.get_submodule("head").modules() if isinstance(layer, nn.Linear)]
    found = [model.get_submodule(name) for name in classifier_names(model)]
    layers = [layer for layer in found if isinstance(layer, nn.Linear)]
    if not found or len(layers) < len(found):
        what = type(found[0]).__name__ if found else "none"
        raise UserError(f"{TIMM}{network.name}: its classifier is no linear layer ({what}): choose another network")
    return layers


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Paths of the classifier's layers in a network of timm's."""
    names = cast("dict[str, str | tuple[str, ...] | None]", model.pretrained_cfg).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def for_inference(model: nn.Module) -> nn.Module:
    """A copy of a network that `create` or `load` made, in eval mode and without gradients: same outputs, BatchNorm
    folded; timm's as far as timm can fuse it."""
    from search_spaces import fold

    return _fused(copy.deepcopy(model)) if isinstance(arch_of(model), TimmNetwork) else fold(model)


def _fused(model: nn.Module) -> nn.Module:
    """timm's network for inference, in place."""
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model.eval().requires_grad_(False), inplace=True)


def build(network: Arch | TimmNetwork) -> nn.Module:
    """The network for inference, BatchNorm folded (timm's as far as timm can), with the same random weights always."""
    import torch

    from search_spaces import Arch, fold
    from search_spaces.registry import FAMILIES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(network, Arch):
            model = fold(FAMILIES[network.family].build(network))
        else:
            model = _fused(create_timm(network))
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
