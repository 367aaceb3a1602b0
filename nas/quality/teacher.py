"""A teacher that is no parent: one in a folder that has the user's classes as it is, any other one tuned on the user's
images first, once, as a parent is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nas.errors import FAULTS, TrainingError, UserError, is_full, reason
from nas.identity import file_digest
from nas.networks.build import classifier_of
from nas.networks.pretrained import Pretrained
from nas.networks.targets import Target, find_target
from nas.quality.ready import with_weights
from nas.quality.tuning import Role, check_weights, tune

if TYPE_CHECKING:
    from torch import nn

    from nas.data.pixels import Pixels
    from nas.quality.trainer import CandidateTrainer


def sized(name: str, px: int, say: Callable[[str], None]) -> str:
    """A teacher's name with the resolution that it has: what the name says, that of the network in a folder, or `px`;
    the published one, which is told, of a network that takes no images of so many pixels a side.

    Raises:
        UserError: no such network.
    """
    target = find_target(name)
    if target.resolution is not None or target.folder is not None:
        return name
    try:
        target.at(px)
    except UserError:
        own = target.require().resolution
        say(f"the teacher {name} takes no images of {px} px: it is tuned, and asked, at {own} px")
        px = own
    return f"{name}@{px}"


def check_named(name: str, trainer: CandidateTrainer) -> None:
    """See that a network can teach; that it is tuned first is told.

    Raises:
        UserError: it cannot.
    """
    from nas.training.teachers import find_teacher

    target = find_target(name)
    if _knows(target, trainer):
        find_teacher(name, None, trainer.data.classes, weights_from=trainer.plan.weights_from)
        return
    network = target.require().replace(num_classes=len(trainer.data.classes))
    classifier_of(with_weights(network, _weights_of(target, trainer).path))
    trainer.say(f"the teacher {name} is tuned on your images before the final trainings")


def named_teacher(name: str, given: Pixels, trainer: CandidateTrainer) -> nn.Module:
    """A network that teaches: (B, 3, R, R) -> (B, classes), of images made with `given`. One that is published, or of
    other classes, is tuned now where the run's folder does not have it.

    Raises:
        TrainingError: it cannot be tuned. UserError: it cannot be had.
    """
    from nas.export.card import pixels_of
    from nas.training.teachers import find_teacher, fitting

    target, classes = find_target(name), trainer.data.classes
    if _knows(target, trainer):
        return find_teacher(name, None, classes, given, trainer.plan.weights_from, trainer.say)
    weights = _weights_of(target, trainer)
    network = target.require().replace(num_classes=len(classes))
    own = pixels_of(target.require(), target.weights or "timm")
    check_weights(name, network.resolution, weights, trainer, Role.TEACHER)
    try:
        with trainer.alone():
            model = tune(name, network, weights, trainer, Role.TEACHER, own)
    except FAULTS as error:
        if is_full(error):
            raise
        raise TrainingError(f"it cannot be tuned: {reason(error)}") from error
    return fitting(name, model, (len(classes), len(classes)), network.resolution, own, given)


def _knows(target: Target, trainer: CandidateTrainer) -> bool:
    """Whether a network has as many classes as the user's images: one in a folder; those of a published one are others,
    however many."""
    return target.require().num_classes == len(trainer.data.classes) and target.folder is not None


def _weights_of(target: Target, trainer: CandidateTrainer) -> Pretrained:
    """The weights in a folder, or the published ones, which do not become the study's: it goes on without a teacher,
    too.

    Raises:
        UserError: they cannot be had.
    """
    if target.folder is None:
        return trainer.weights.apart().get(target.as_trained().require())
    weights = target.weights
    if weights is None:
        raise UserError(f"--teacher {target.label} has no model.safetensors: `vitnas train` makes one")
    return Pretrained(target.label, weights, "folder", file_digest(weights), None)
