"""Trained networks that teach another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.export.card import pixels_of
from nas.networks.targets import find_target
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.networks.weights import load

if TYPE_CHECKING:
    from torch import nn


def find_teacher(text: str, weights: str | None, classes: list[str], pixels: Pixels = IMAGENET) -> nn.Module:
    """A trained network that takes the student's images, made with `pixels`: (B, 3, R, R) -> (B, classes).

    Raises:
        UserError: no such network, weights that cannot be had, random ones, or another number of classes.
    """
    if not text.startswith(TIMM):
        return own_teacher("--teacher", text, weights, classes, pixels)
    import timm

    name = text.removeprefix(TIMM)
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:3])
        raise UserError(f"--teacher {text}: timm has no such network" + (f", but {near}" if near else ""))
    network = TimmNetwork(name)
    if weights is None:
        model = load(network, "timm", what=f"--teacher {text}")
    else:
        network = network.replace(num_classes=len(classes))
        model = load(network, weights, what="--teacher-weights")
        if model.untrained:
            raise UserError(f"--teacher-weights: {weights}: another classifier, which would teach nothing")
    config = cast("dict[str, Any]", model.pretrained_cfg)
    fixed = network.resolution if config.get("fixed_input_size") else None
    own = pixels_of(network, weights or "timm")
    return _fitting(f"--teacher {text}", model, (network.num_classes, len(classes)), fixed, own, pixels)


def own_teacher(
    option: str, text: str, weights: str | None, classes: list[str], pixels: Pixels = IMAGENET
) -> nn.Module:
    """A network of ours that teaches."""
    target = find_target(text)
    model = load(target, weights, what=f"{option} {text}")
    if model.untrained:
        raise UserError(f"{option} {text}: weights with another classifier, which would teach nothing")
    counts = model.arch.num_classes, len(classes)
    own = pixels_of(model.arch, weights or target.weights or "timm")
    return _fitting(f"{option} {text}", model, counts, model.arch.resolution, own, pixels)


def _fitting(
    option: str, model: nn.Module, classes: tuple[int, int], resolution: int | None, own: Pixels, given: Pixels
) -> nn.Module:
    """A network that takes a student's images: at its own resolution (None: any) and with its own mean and deviation.

    Args:
        classes: the network's, and the data's.
        own: what the network was trained with.
        given: what the student's images are made with; their interpolation and crop stay.
    """
    from torch import nn
    from torchvision.transforms.v2 import Normalize, Resize

    if classes[0] != classes[1]:
        raise UserError(f"{option} has {classes[0]} classes and the data {classes[1]}: fine-tune it on the data first")
    first: list[nn.Module] = []
    if resolution is not None:
        first.append(Resize((resolution, resolution)))
    if (own.mean, own.std) != (given.mean, given.std):
        pairs = list(zip(own.mean, own.std, given.mean, given.std, strict=True))
        first.append(Normalize([(m - m0) / s0 for m, _, m0, s0 in pairs], [s / s0 for _, s, _, s0 in pairs]))
    return nn.Sequential(*first, model)
