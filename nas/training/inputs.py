"""What a training reads: a network to begin with, images, and networks that teach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.networks.timm_network import TIMM
from nas.networks.weights import load, load_as_trained
from nas.training.start import Start, find_start
from nas.training.teachers import (
    OtherClassesError,
    find_feature_teacher,
    find_teacher,
    own_teacher,
    published_teacher,
    teacher_in_folder,
    tuning_of,
)

if TYPE_CHECKING:
    from torch import nn

    from nas.data.dataset import ImageData
    from nas.data.images import Images
    from nas.networks.hub import Bytes
    from nas.networks.targets import Target
    from nas.networks.timm_network import TimmModel, TimmNetwork
    from nas.training.course import StartRecord
    from nas.training.lessons import FeatureTeacher
    from nas.training.request import TrainRequest
    from search_spaces import Arch
    from search_spaces.network import Network

UNLABELLED_IMAGES = "the images of --unlabelled"


@dataclass(frozen=True)
class TrainInputs:
    """What a `TrainRequest` names, opened."""

    target: Target
    network: Arch | TimmNetwork
    """The one that is trained, for the classes and the resolution of the images."""
    start: Start
    """The weights that it begins with."""
    data: ImageData
    train: Images
    """Those that it is trained on: all for training, but for the ones held out."""
    held: Images
    """Those that choose, plain (`nas.training.holdout`); none where nothing is to be chosen."""
    parents: tuple[str | None, ...]
    """What was trained before, each "timm" or a file; None: random weights."""
    fine_tunes: bool
    """Whether a linear probe comes first, and the better of the two is kept."""

    @property
    def plain(self) -> Images:
        """Those for training, without augmentation."""
        return self.train.transformed(self.data.calibration.transform)


def open_inputs(
    request: TrainRequest,
    note: Callable[[str], None],
    progress: Bytes | None = None,
    known: StartRecord | None = None,
    start: Start | None = None,
) -> TrainInputs:
    """Find the network and its weights, and open the images.

    Args:
        progress: told of the bytes of a download.
        known: the weights that a finished training began with, which may be gone.
        start: the weights, where they have been found.

    Raises:
        UserError: no such network, weights or images, or they do not go together.
    """
    from nas.data.dataset import open_data
    from nas.export.card import pixels_of
    from nas.networks.targets import find_target
    from nas.training.holdout import hold_out

    target = find_target(request.model)
    own = target.require()
    size = request.resolution or own.resolution
    if target.resolution not in (None, size):
        raise UserError(f"{request.model} and --resolution {size}: give one of them")
    network = own.at(size)
    try:
        start = start or find_start(request, progress)
    except UserError:
        if known is None:
            raise
        start = Start.of(known)
    if request.weights_from is not None and not start.published and published_teacher(request) is None:
        note(f"--weights-from {request.weights_from} is not used: nothing here begins with published weights")
    if start.path is None and request.oracle is None and request.recipe.batch_norm == "frozen":
        raise UserError(
            f"--recipe {request.recipe.name} trains with frozen BatchNorm, which random weights cannot be trained "
            "with: give --weights FILE, or --recipe quick"
        )
    parents = [start.parent]
    if request.oracle is not None:  # its weights are lent to the network
        parents.append(str(find_target(request.oracle).weights or "timm"))
    data = open_data(request.data, size, request.num_classes, request.seed, *parents)
    if data.demo:
        note(f"no --data: trained and evaluated on {data.name}, as a demonstration")
    pixels = pixels_of(own, "timm" if start.published else start.path)
    data = data.at(size, request.recipe.augmentation, pixels)
    fine_tunes = start.path is not None and request.recipe.from_probe and request.oracle is None
    network = network.replace(num_classes=len(data.classes))
    train, held = data.train, data.calibration.pick([])
    if fine_tunes and not request.probe:
        parts = hold_out(data.train, request.seed, start.parent)
        plain = data.train.transformed(data.calibration.transform)
        train, held = data.train.pick(parts.train), plain.pick(parts.judge)
        if parts.warning:
            note(parts.warning)
    return TrainInputs(target, network, start, data, train, held, tuple(parents), fine_tunes)


def digests_of(request: TrainRequest, inputs: TrainInputs, known: Mapping[str, str | None]) -> dict[str, str | None]:
    """Digests of everything that the training reads, by what messages call it.

    known: those that it was begun with; an older vitnas kept none of timm's weights.
    """
    from nas.data.images import Images
    from nas.data.inputs import identity, images_digest
    from nas.data.listing import images_below
    from nas.networks.targets import find_target
    from nas.training.lessons import UNLABELLED

    def network(text: str | None, weights: str | None) -> tuple[Arch | TimmNetwork | str, str | Path | None] | None:
        if not text:
            return None
        if text.startswith(TIMM):
            return text, weights or "timm"
        target = find_target(text)
        return target.network or text, weights or target.weights or "timm"

    goes_on = known.get("the weights of --teacher") == "timm" and request.weights_from is None
    taught_by = request.teacher_weights if goes_on else teacher_in_folder(request) or request.teacher_weights
    found = identity(
        inputs.data,
        model=(inputs.target.network, None) if inputs.target.network is not None else None,
        teacher=network(request.teacher, taught_by),
        oracle=network(request.oracle, None),
    )
    key = "the weights of --model"
    found[key] = "timm" if known.get(key) == "timm" and inputs.start.published else inputs.start.digest
    if request.unlabelled is not None:
        paths = images_below(request.unlabelled)
        more = Images(paths, [UNLABELLED] * len(paths), inputs.data.calibration.transform)
        found[UNLABELLED_IMAGES] = images_digest(more)
    return found


def first_network(
    request: TrainRequest, inputs: TrainInputs, note: Callable[[str], None]
) -> tuple[Network | TimmModel, bool]:
    """The network as the training begins: with random weights, or the given ones brought to its classes and size; and
    whether its classifier is of the given weights, too."""
    import torch

    from nas.networks.build import create
    from pruning.transfer import transfer
    from search_spaces import Arch

    torch.manual_seed(request.seed)
    model, start = create(inputs.network), inputs.start
    if start.line:
        note(start.line)
    if start.path is None:
        return model, False
    source = _source(inputs, start.path)
    assert source.loaded is not None
    if source.untrained:
        theirs = source.loaded.classes
        known = f"a classifier of {theirs} classes" if theirs else "no classifier"
        classes = inputs.network.num_classes
        note(f"{start.path} has {known}: one for the {classes} classes of these images begins untrained")
    if source.loaded.note:
        note(f"{start.path}: {source.loaded.note}")
    if isinstance(source.arch, Arch) and isinstance(inputs.network, Arch):
        if source.arch.resolution != inputs.network.resolution:
            note(f"weights of {source.arch.resolution} px, resized to {inputs.network.resolution} px")
        model.load_state_dict(transfer(source.arch, source.state_dict(), inputs.network))
    else:
        model.load_state_dict(source.state_dict())
    return model, not source.untrained


def _source(inputs: TrainInputs, weights: Path) -> Network | TimmModel:
    """The network that weights were trained as, at their own resolution; timm itself resizes those of its networks."""
    given, own, wanted = inputs.target.arch, inputs.target.as_trained().arch, inputs.network
    if given is None or own is None:
        return load(wanted, weights, what="--weights")
    likely = own.resolution, wanted.resolution, given.resolution
    return load_as_trained(own.replace(num_classes=wanted.num_classes), weights, *likely, what="--weights")


def open_teacher(
    request: TrainRequest, data: ImageData, note: Callable[[str], None], tune: Callable[[TrainRequest], None]
) -> nn.Module | FeatureTeacher | None:
    """The network that the training learns from: (B, 3, R, R) -> (B, classes), or its features; None without one.

    tune: trains one of other classes on the images, whose logits are to be learnt.
    """
    recipe = request.recipe
    if request.teacher is None:
        if recipe.teacher is not None:
            note(f"the recipe {recipe.name} has the teacher {recipe.teacher}: without one it differs from it")
        return None
    if recipe.distillation == "features":
        found = find_feature_teacher(request, data, note)
        more = f", on {len(found.unlabelled):,} unlabelled images too" if found.unlabelled is not None else ""
        note(f"features of {request.teacher} are matched{more}")
        return found
    try:
        teacher = find_teacher(
            request.teacher, request.teacher_weights, data.classes, data.pixels, request.weights_from, note
        )
    except OtherClassesError:
        own = tuning_of(request)
        note(f"the teacher {request.teacher} is of other classes: it is fine-tuned on these images, in {own.folder}")
        tune(own)
        teacher = own_teacher("--teacher", str(own.folder), None, data.classes, data.pixels)
    note(f"{recipe.distillation} distillation from {request.teacher}")
    return teacher


def lend_oracle(
    request: TrainRequest, model: nn.Module, data: ImageData, device: str, note: Callable[[str], None]
) -> AbstractContextManager[None]:
    """Give a network the weights of the oracle asked for, if one is; returns what to enter while it is trained."""
    if request.oracle is None:
        return nullcontext()
    from search_spaces.oracle import start_from, with_oracle

    oracle = own_teacher("--oracle", request.oracle, None, data.classes, data.pixels)
    start_from(model, oracle)
    note(f"weights from the oracle {request.oracle}, which chooses the tokens in training")
    return with_oracle(model, oracle.to(device))
