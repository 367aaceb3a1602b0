"""Trained networks that teach another one.

One that does not know the classes of the images is fine-tuned on them first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nas.data.images import Images, plain_transform
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import DiskFull, UserError
from nas.export.card import pixels_of
from nas.networks.pretrained import find_here, find_pretrained
from nas.networks.targets import Target, find_target
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.networks.weights import load, load_as_trained, resized
from nas.training.begun import as_begun

if TYPE_CHECKING:
    from torch import nn

    from nas.data.dataset import ImageData
    from nas.networks.timm_network import TimmModel
    from nas.training.lessons import FeatureTeacher
    from nas.training.request import TrainRequest
    from search_spaces import Arch
    from search_spaces.network import Network

TEACHER = "teacher"
"""What the folder of a teacher's own training is called, in that of its student."""


class OtherClassesError(UserError):
    """A teacher that does not know the classes of the images."""


def find_teacher(
    text: str,
    weights: str | None,
    classes: list[str],
    pixels: Pixels = IMAGENET,
    weights_from: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """A trained network that takes the student's images, made with `pixels`: (B, 3, R, R) -> (B, classes).

    Args:
        weights_from: a folder where published weights are looked for first.
        note: told where they are found, and what is resized.

    Raises:
        UserError: no such network, weights that cannot be had, or random ones. OtherClassesError: it has another number
            of classes.
    """
    if not text.startswith(TIMM):
        return own_teacher("--teacher", text, weights, classes, pixels, weights_from, note)
    target = _target_of(text)
    network = cast(TimmNetwork, target.timm)
    if _is_published(target, weights):
        found, _ = _with_weights(f"--teacher {text}", target, weights, weights_from, note)
        model = cast("TimmModel", found)
    else:
        network = network.replace(num_classes=len(classes))
        model = load(network, cast(str, weights), what="--teacher-weights")
    if model.untrained:
        raise OtherClassesError(f"--teacher {text}: weights with another classifier, which would teach nothing")
    config = cast("dict[str, Any]", model.pretrained_cfg)
    fixed = network.resolution if target.resolution or config.get("fixed_input_size") else None
    own = pixels_of(network, weights or "timm")
    return fitting(f"--teacher {text}", model, (network.num_classes, len(classes)), fixed, own, pixels)


def find_feature_teacher(request: TrainRequest, data: ImageData, note: Callable[[str], None]) -> FeatureTeacher:
    """A trained network of any classes, whose features of the student's images teach, and of `unlabelled` ones.

    Raises:
        UserError: no such network, weights that cannot be had, no linear classifier, or a folder without images.
    """
    from nas.data.listing import images_below
    from nas.networks.build import classifier_of
    from nas.training.lessons import UNLABELLED, FeatureTeacher

    text, unlabelled = cast(str, request.teacher), request.unlabelled
    what, target = f"--teacher {text}", _target_of(text)
    model, source = _with_weights(what, target, request.teacher_weights, request.weights_from, note)
    classifier_of(model)
    pixels = pixels_of(model.arch, source)
    plain = plain_transform(model.arch.resolution, pixels.whole() if data.demo else pixels)
    more = None
    if unlabelled is not None:
        paths = images_below(unlabelled)
        more = Images(paths, [UNLABELLED] * len(paths), plain)
    return FeatureTeacher(model, plain, data.calibration.transform, more)


def own_teacher(
    option: str,
    text: str,
    weights: str | None,
    classes: list[str],
    pixels: Pixels = IMAGENET,
    weights_from: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """A network that teaches, of ours or in a folder; errors as in `find_teacher`."""
    model, source = _with_weights(f"{option} {text}", find_target(text), weights, weights_from, note)
    if model.untrained:
        raise OtherClassesError(f"{option} {text}: weights with another classifier, which would teach nothing")
    counts = model.arch.num_classes, len(classes)
    own = pixels_of(model.arch, source)
    return fitting(f"{option} {text}", model, counts, model.arch.resolution, own, pixels)


def published_teacher(request: TrainRequest) -> Target | None:
    """The teacher that is to have its published weights; None where there is none, or it has others."""
    target = _target_of(request.teacher) if request.teacher is not None else None
    return target if target is not None and _is_published(target, request.teacher_weights) else None


def teacher_in_folder(request: TrainRequest) -> str | None:
    """The file of a teacher's published weights in a folder of the user's; None where none of them is used."""
    target = published_teacher(request)
    if target is None:
        return None
    found = find_here(target.as_trained().require(), request.weights_from)
    return str(found.path) if found is not None and found.source == "folder" else None


def _target_of(text: str) -> Target:
    """As `find_target`; raises UserError, with names that are near, for a network that timm has not."""
    import timm

    name, _, _ = text.removeprefix(TIMM).partition("@")
    if text.startswith(TIMM) and not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:3])
        raise UserError(f"--teacher {text}: timm has no such network" + (f", but {near}" if near else ""))
    return find_target(text)


def _is_published(target: Target, weights: str | None) -> bool:
    """Whether a teacher has its published weights."""
    return target.network is not None and (weights == "timm" or (weights is None and target.folder is None))


def _with_weights(
    what: str, target: Target, weights: str | None, weights_from: Path | None, note: Callable[[str], None]
) -> tuple[Network | TimmModel, str | Path]:
    """A network with its weights, at the target's resolution, and where they are from, as `pixels_of` takes it."""
    if not _is_published(target, weights):
        source = file = weights or target.weights
    else:
        try:
            pretrained = find_pretrained(target.as_trained().require(), weights_from)
        except DiskFull:
            raise
        except UserError as error:
            raise type(error)(f"{what}: {error}") from None
        note(pretrained.line)
        file, source = pretrained.path, "timm"
    if file is None or source is None or target.arch is None:
        return load(target, file, what), source or "timm"
    return _resized(what, target.arch, target.as_trained().require().resolution, file, note), source


def _resized(what: str, arch: Arch, own: int, file: str | Path, note: Callable[[str], None]) -> Network:
    """A network with the weights of a file, brought to its resolution; own: that of what was published, in px."""
    found = load_as_trained(arch, file, arch.resolution, own, what=what)
    trained = found.arch
    if trained.resolution == arch.resolution:
        return found
    note(
        f"{what}: weights of {trained.resolution} px, resized to {arch.resolution} px (@{trained.resolution} behind "
        "its name takes them as they are)"
    )
    return resized(found, arch)


def fitting(
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
    student's epochs, ten at most, or by the number of images where the student's are; or half of its minutes. One that
    an older vitnas has begun goes on as then."""
    from nas.training.recipes import FINETUNE
    from nas.training.request import choose_recipe

    assert request.teacher is not None
    epochs = None if request.recipe.by_images else min(FINETUNE.epochs, request.recipe.epochs)
    looks = request.weights_from is not None and published_teacher(request) is not None
    tuning = replace(
        request,
        model=request.teacher,
        weights=request.teacher_weights,
        recipe=choose_recipe(FINETUNE.name, epochs),
        folder=request.folder / TEACHER,
        resolution=None,
        teacher=None,
        teacher_weights=None,
        weights_from=request.weights_from if looks else None,
        oracle=None,
        minutes=None if request.minutes is None else request.minutes / 2,
    )
    return as_begun(tuning)
