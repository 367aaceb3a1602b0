"""What a training reads: a network to begin with, images, and networks that teach."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.networks.timm_network import TIMM
from nas.networks.weights import load
from nas.training.request import RANDOM
from nas.training.teachers import find_teacher, own_teacher

if TYPE_CHECKING:
    from torch import nn

    from nas.data.dataset import ImageData
    from nas.networks.targets import Target
    from nas.training.request import TrainRequest
    from search_spaces import Arch
    from search_spaces.network import Network


@dataclass(frozen=True)
class TrainInputs:
    """What a `TrainRequest` names, opened."""

    target: Target
    arch: Arch
    """The network that is trained, for the classes and the resolution of the images."""
    data: ImageData
    parents: tuple[str | None, ...]
    """The weights that it begins with, each "timm" or a file; None: random ones."""


def open_inputs(request: TrainRequest, note: Callable[[str], None]) -> TrainInputs:
    """Find the network and open the images.

    Raises:
        UserError: no such network or images, or they do not go together.
    """
    from nas.data.dataset import open_data
    from nas.export.card import pixels_of
    from nas.networks.targets import find_target

    target = find_target(request.model)
    if target.arch is None:
        raise UserError(f"{request.model} is {target.kind}: give a published name, an arch.json or a folder")
    size = request.resolution or target.arch.resolution
    arch = target.arch.at(size)
    parents = [request.weights]
    if request.oracle is not None:  # its weights are lent to the network
        parents.append(str(find_target(request.oracle).weights or "timm"))
    data = open_data(request.data, size, request.num_classes, request.seed, *parents)
    if data.demo:
        note(f"no --data: trained and evaluated on {data.name}, as a demonstration")
    return TrainInputs(
        target,
        arch.replace(num_classes=len(data.classes)),
        data.at(size, request.recipe.augmentation, pixels_of(target.arch, request.weights)),
        tuple(parents),
    )


def digests_of(request: TrainRequest, inputs: TrainInputs) -> dict[str, str | None]:
    """Digests of everything that the training reads, by what messages call it."""
    from nas.data.inputs import identity
    from nas.networks.targets import find_target

    def network(text: str | None, weights: str | None) -> tuple[Arch | str, str | Path | None] | None:
        if not text:
            return None
        if text.startswith(TIMM):
            return text, weights or "timm"
        target = find_target(text)
        return target.arch or text, weights or target.weights or "timm"

    return identity(
        inputs.data,
        model=(inputs.target.arch, request.weights) if inputs.target.arch is not None else None,
        teacher=network(request.teacher, request.teacher_weights),
        oracle=network(request.oracle, None),
    )


def first_network(request: TrainRequest, inputs: TrainInputs, note: Callable[[str], None]) -> Network:
    """The network as the training begins: with random weights, or the given ones brought to its classes and size."""
    import torch

    from pruning.transfer import transfer
    from search_spaces import create_model

    torch.manual_seed(request.seed)
    model = create_model(inputs.arch)
    if request.weights is None:
        return model
    own = inputs.target.as_trained()
    if request.weights == str(own.weights):
        note(f"begins with the weights of {request.weights} (--weights {RANDOM}: with random ones)")
    assert own.arch is not None
    given = own.arch.replace(num_classes=inputs.arch.num_classes)
    source = load(given, request.weights, what="--weights")
    assert source.loaded is not None
    if source.untrained:
        theirs = source.loaded.classes
        known = f"a classifier of {theirs} classes" if theirs else "no classifier"
        note(
            f"{request.weights} has {known}: one for the {inputs.arch.num_classes} classes of these images begins "
            "untrained"
        )
    if source.loaded.note:
        note(f"{request.weights}: {source.loaded.note}")
    if given.resolution != inputs.arch.resolution:
        note(f"weights of {given.resolution} px, resized to {inputs.arch.resolution} px")
    model.load_state_dict(transfer(given, source.state_dict(), inputs.arch))
    return model


def open_teacher(request: TrainRequest, data: ImageData, note: Callable[[str], None]) -> nn.Module | None:
    """The network that the training learns from, (B, 3, R, R) -> (B, classes); None without one."""
    recipe = request.recipe
    if request.teacher is None:
        if recipe.teacher is not None:
            note(f"the recipe {recipe.name} has the teacher {recipe.teacher}: without one it differs from it")
        return None
    teacher = find_teacher(request.teacher, request.teacher_weights, data.classes, data.pixels)
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
