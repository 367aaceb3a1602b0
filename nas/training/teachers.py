"""Trained networks that teach another one.

One that does not know the classes of the images is fine-tuned on them first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from nas.data.images import Images, plain_transform
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.export.card import pixels_of
from nas.networks.targets import find_target
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.networks.weights import load

if TYPE_CHECKING:
    from torch import nn

    from nas.data.dataset import ImageData
    from nas.training.lessons import FeatureTeacher
    from nas.training.request import TrainRequest

TEACHER = "teacher"
"""What the folder of a teacher's own training is called, in that of its student."""


class OtherClassesError(UserError):
    """A teacher that does not know the classes of the images."""


def find_teacher(text: str, weights: str | None, classes: list[str], pixels: Pixels = IMAGENET) -> nn.Module:
    """A trained network that takes the student's images, made with `pixels`: (B, 3, R, R) -> (B, classes).

    Raises:
        UserError: no such network, weights that cannot be had, or random ones. OtherClassesError: it has another number
            of classes.
    """
    if not text.startswith(TIMM):
        return own_teacher("--teacher", text, weights, classes, pixels)
    import timm

    name, _, _ = text.removeprefix(TIMM).partition("@")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:3])
        raise UserError(f"--teacher {text}: timm has no such network" + (f", but {near}" if near else ""))
    target = find_target(text)
    network = cast(TimmNetwork, target.timm)
    if weights is None:
        model = load(network, "timm", what=f"--teacher {text}")
    else:
        network = network.replace(num_classes=len(classes))
        model = load(network, weights, what="--teacher-weights")
        if model.untrained:
            raise OtherClassesError(f"--teacher-weights: {weights}: another classifier, which would teach nothing")
    config = cast("dict[str, Any]", model.pretrained_cfg)
    fixed = network.resolution if target.resolution or config.get("fixed_input_size") else None
    own = pixels_of(network, weights or "timm")
    return _fitting(f"--teacher {text}", model, (network.num_classes, len(classes)), fixed, own, pixels)


def find_feature_teacher(text: str, weights: str | None, data: ImageData, unlabelled: str | None) -> FeatureTeacher:
    """A trained network of any classes, whose features of the student's images teach. unlabelled: a folder of more.

    Raises:
        UserError: no such network, weights that cannot be had, no linear classifier, or a folder without images.
    """
    from nas.data.folders import images_below
    from nas.networks.build import classifier_of
    from nas.training.lessons import UNLABELLED, FeatureTeacher

    target = find_target(text)
    given = weights or ("timm" if text.startswith(TIMM) else None)
    model = load(target, given, what=f"--teacher {text}")
    classifier_of(model)
    pixels = pixels_of(model.arch, given or target.weights or "timm")
    plain = plain_transform(model.arch.resolution, pixels.whole() if data.demo else pixels)
    more = None
    if unlabelled is not None:
        paths = images_below(unlabelled)
        more = Images(paths, [UNLABELLED] * len(paths), plain)
    return FeatureTeacher(model, plain, data.calibration.transform, more)


def own_teacher(
    option: str, text: str, weights: str | None, classes: list[str], pixels: Pixels = IMAGENET
) -> nn.Module:
    """A network that teaches, of ours or in a folder; errors as in `find_teacher`."""
    target = find_target(text)
    model = load(target, weights, what=f"{option} {text}")
    if model.untrained:
        raise OtherClassesError(f"{option} {text}: weights with another classifier, which would teach nothing")
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
        raise OtherClassesError(
            f"{option} has {classes[0]} classes and the data {classes[1]}: fine-tune it on the data first"
        )
    first: list[nn.Module] = []
    if resolution is not None:
        first.append(Resize((resolution, resolution)))
    if (own.mean, own.std) != (given.mean, given.std):
        pairs = list(zip(own.mean, own.std, given.mean, given.std, strict=True))
        first.append(Normalize([(m - m0) / s0 for m, _, m0, s0 in pairs], [s / s0 for _, s, _, s0 in pairs]))
    return nn.Sequential(*first, model)


def tuning_of(request: TrainRequest) -> TrainRequest:
    """The fine-tuning of a student's teacher on the student's images: a run of its own in the student's folder, for the
    student's epochs, ten at most, or half of its minutes."""
    from nas.training.recipes import FINETUNE
    from nas.training.request import choose_recipe

    assert request.teacher is not None
    return replace(
        request,
        model=request.teacher,
        weights=request.teacher_weights,
        recipe=choose_recipe(FINETUNE.name, min(FINETUNE.epochs, request.recipe.epochs)),
        folder=request.folder / TEACHER,
        resolution=None,
        teacher=None,
        teacher_weights=None,
        oracle=None,
        minutes=None if request.minutes is None else request.minutes / 2,
    )
