"""The network that is pruned, and where its weights come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.export.card import LABELS
from nas.networks.targets import find_target
from nas.networks.weights import load
from nas.prune import steps
from nas.prune.images import PruneJob
from nas.prune.request import PruneRequest

if TYPE_CHECKING:
    from search_spaces import Arch
    from search_spaces.network import Network


def find_source(job: PruneJob, request: PruneRequest) -> tuple[Arch, str | Path | None]:
    """The network's Arch, and its weights: "timm", a file, or None for random ones.

    Raises:
        UserError: there is no such network, or it has no Arch.
    """
    target = find_target(request.model)
    given = request.data or request.unlabelled
    if target.folder is not None and given is None and (known := trained_on(target.folder)):
        job.note(f"{request.model} was trained on {known}: --data {known} prunes it on those images")
    if target.arch is None:
        usual = "give a published name, an arch.json or a folder"
        hint = "only timm/NAME itself is pruned, with timm's weights" if target.timm else usual
        raise UserError(f"{request.model} is {target.kind}: {hint}")
    if request.weights is not None:
        return target.arch, request.weights
    if target.weights is not None:
        return target.arch, target.weights
    return target.arch, "timm" if given is not None and target.folder is None else None


def load_source(
    job: PruneJob, request: PruneRequest, arch: Arch, weights: str | Path | None
) -> tuple[Network, steps.First]:
    """The network with its weights, and what it needs first: it may have none, or another classifier.

    Raises:
        UserError: weights that do not fit, or cannot be had.
    """
    import torch

    from search_spaces import create_model

    torch.manual_seed(request.seed)
    if request.unlabelled and weights is None:
        raise UserError(f"{request.model} has no weights: --unlabelled needs a trained network")
    if weights is None:
        job.note(f"no weights given{'' if request.data else ' and no --data'}; {steps.brief_line(job)}")
        job.state.found["weights"] = None
        return create_model(arch), "training"
    found = steps.find_published(job, request, arch) if weights == "timm" else None
    if request.unlabelled and weights == "timm" and found is None:
        raise UserError(f"{request.model}'s weights cannot be had: --unlabelled needs a trained network")
    if weights == "timm" and found is None:
        return create_model(arch), "training"
    model = load(arch, found.path if found else weights)
    if request.unlabelled and model.untrained:
        raise UserError(
            f"weights {weights} have no classifier for {arch.num_classes} classes: --unlabelled needs its own, "
            "and --num-classes where it has other classes"
        )
    first: steps.First = steps.first_of(job, model, f"weights {weights}") if model.untrained else "nothing"
    if first == "nothing" and job.data.demo:
        job.note(f"no --data: pruned, tuned and evaluated on {job.data.name}")
    if model.loaded and model.loaded.note:
        job.note(f"{weights}: {model.loaded.note}")
    job.state.found["weights"] = str(weights)
    return model, first


def classes_of(model: str, count: int) -> list[str]:
    """Names of a network's classes, as its folder has them; else their numbers."""
    folder = find_target(model).folder
    path = None if folder is None else folder / LABELS
    names = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
    return names if len(names) == count else [str(number) for number in range(count)]


def trained_on(folder: Path) -> str | None:
    """The --data of the run that made a network, as its folder says; None where it does not, or there was none."""
    for name in ("metrics.json", "prune.json"):
        try:
            found = json.loads((folder / name).read_text())["options"]["data"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, str):
            return found
    return None
