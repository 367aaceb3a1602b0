"""A network's folder: arch.json, model.safetensors and model.onnx."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.lineage import SEEN
from nas.errors import UserError
from nas.export.agreement import Agreement, agreement
from nas.export.card import LABELS, PREPROCESS, Card, Preprocess, described, pixels_of
from nas.export.onnx import label_onnx, to_file
from nas.export.options import FileOptions
from nas.files import drafted, replace_file, scratch, unwritable
from nas.networks.build import create, for_inference
from nas.networks.pretrained import find_pretrained
from nas.networks.targets import find_target
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.networks.weights import load
from nas.text import first_line

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from nas.networks.timm_network import TimmModel
    from search_spaces import Arch
    from search_spaces.network import Network

OF_A_NETWORK = (
    *("model.onnx", "model.*.onnx", "model.safetensors", SEEN),
    *("metrics.json", "prune.json", PREPROCESS, LABELS),
)
"""What vitnas writes beside a network's document."""


def save_model(model: Network | TimmModel, folder: Path, with_weights: bool = True) -> None:
    """Write a network as arch.json and, unless told not to, model.safetensors.

    Raises:
        DiskFull: there is no room for it.
        UserError: a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "arch.json", model.arch.to_json())
        if with_weights:
            save_weights(model, folder / "model.safetensors")
    except OSError as error:
        raise unwritable(folder, error) from None


def save_onnx(
    model: Network | TimmModel,
    folder: Path,
    options: FileOptions,
    trained: bool,
    card: Card,
    images: np.ndarray | None = None,
) -> Agreement:
    """Write a network as model.onnx, its card beside it; where that fails there is no model.onnx afterwards, rather
    than an older one.

    images: of the kind it is for, float32 (N, 3, R', R'), as its card says, to compare on; None: photographs.

    Raises:
        DiskFull: there is no room for it.
        UserError: a folder that cannot be written, a network that cannot be exported, or one whose ONNX form disagrees
            with PyTorch (see `agreement`).
    """
    arch, inferring, path = model.arch, for_inference(model), folder / "model.onnx"
    oracle = copy.deepcopy(model).eval() if isinstance(arch, TimmNetwork) else inferring  # timm's fusing is checked too
    card = card.of_file(options)
    try:
        path.unlink(missing_ok=True)
        card.write(folder)
        with drafted(path) as draft:
            to_file(inferring, draft, arch.resolution, options, card.pixels)
            label_onnx(draft, arch, trained, card)
            return agreement(oracle, draft, arch.resolution, options, images, card.pixels)
    except OSError as error:
        raise unwritable(folder, error) from None
    except (RuntimeError, ValueError, MemoryError) as error:
        raise UserError(f"this network cannot be exported: {first_line(error)}") from None


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a network's state dict as safetensors."""
    from safetensors.torch import save

    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    replace_file(path, save(tensors, metadata))


def refuse_run(folder: Path) -> None:
    """Raises UserError for the folder of a training, a pruning or a search, or a search's best/: what it says of its
    files would be of others."""
    best = folder.resolve().name == "best" and (folder.resolve().parent / "result.json").is_file()
    if best or (folder / "state").is_dir() or (folder / "result.json").is_file():
        raise UserError(f"{folder} is a run's own folder: give another --out")


def write_folder(
    network: str, folder: Path, weights: str | None, num_classes: int | None, options: FileOptions, data: str | None
) -> str:
    """`nas.evaluate.export.export` in fp32 and fp16."""
    target = find_target(network)
    found = target.require()
    given = weights or target.weights
    return export_folder(found, folder, str(given) if given else None, num_classes, options, data)


def export_folder(
    network: Arch | TimmNetwork,
    folder: Path,
    weights: str | None,
    num_classes: int | None,
    options: FileOptions,
    data: str | None = None,
) -> str:
    """Write arch.json, model.onnx with its card and, where weights are given, model.safetensors; returns what was done.

    Of weights that vitnas trained, the card, metrics.json and the images they have seen are taken from the folder they
    lie in.

    Raises:
        UserError: a folder that cannot be written, weights that cannot be had or do not fit, no such data, or an ONNX
            network that disagrees with PyTorch (see `agreement`).
    """
    from search_spaces import ArchError

    try:
        wanted = network if num_classes is None else network.replace(num_classes=num_classes)
        found = find_pretrained(wanted) if weights == "timm" else None
        model = create(wanted) if weights is None else load(wanted, found.path if found else weights)
    except ArchError as error:
        raise UserError(str(error)) from None
    if weights is not None and model.untrained:
        raise UserError(_other_classifier(model, weights))
    card, facts = card_for(model.arch, weights)
    images = _images(data, weights, card)
    agreed = str(replace_network(model, folder, options, weights is not None, card, facts, images))
    what = "with random, untrained weights"
    if found:
        agreed += f"; {found.line}"
    if model.loaded:
        what = "with the given weights" + (f" ({model.loaded.note})" if model.loaded.note else "")
        if card.classes is None:
            agreed += f"; the weights do not say what their classes are called, and {PREPROCESS} is what vitnas does"
    named = f"{TIMM}{network.name}" if isinstance(network, TimmNetwork) else network.family
    return f"{folder}/model.onnx: {named} {what}; {agreed}"


def card_for(arch: Arch | TimmNetwork, weights: str | None) -> tuple[Card, list[Path]]:
    """The card of a network with weights, and the files beside these that are true of them.

    Of a run's model.safetensors they are the run's own, without accuracy and metrics where the network is another.
    """
    if weights is None:
        return Card.untrained(arch.resolution), []
    if weights == "timm":
        return Card.timm(arch), []
    path = Path(weights)
    own = Preprocess.own(arch.resolution, pixels_of(arch, path))
    seen = [path.with_name(SEEN)] if path.with_name(SEEN).is_file() else []
    if path.name != "model.safetensors" or not described(path.parent):
        return Card(preprocess=own), seen
    card = Card.read(path.parent)
    document = path.with_name("arch.json")
    if document.is_file() and document.read_text() == arch.to_json():
        facts = (path.with_name(name) for name in ("metrics.json", "prune.json"))
        return card.model_copy(update={"preprocess": own}), [*seen, *(each for each in facts if each.is_file())]
    classes = card.classes if card.classes and len(card.classes) == arch.num_classes else None
    return Card(preprocess=own, classes=classes), seen


def _images(data: str | None, weights: str | None, card: Card) -> np.ndarray | None:
    """What a file is checked on, float32 (N, 3, R, R): images of `data`, or of the data that the weights' folder names;
    None where there are none."""
    from nas.data.dataset import open_data, some_of

    if card.preprocess is None:
        return None
    name = data or (data_beside(Path(weights)) if weights else None)
    if name is None:
        return None
    try:
        found = open_data(name, card.preprocess.size, None, 0).at(card.preprocess.size, pixels=card.pixels)
        return some_of(found.val)
    except UserError:
        if data:
            raise
        return None


def data_beside(weights: Path) -> str | None:
    """The folder of images that weights were trained on, by the run they lie in; None where it is not here."""
    run = weights.parent
    for result in (run / "metrics.json", run / "prune.json", run.parent / "result.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            name = json.loads(result.read_text())["data"]["name"]
            return name if isinstance(name, str) and Path(name).is_dir() else None
    return None


def replace_network(
    model: Network | TimmModel,
    folder: Path,
    options: FileOptions,
    trained: bool,
    card: Card,
    facts: Sequence[Path] = (),
    images: np.ndarray | None = None,
) -> Agreement:
    """Write arch.json, model.onnx, its card and, of a trained network, model.safetensors; all of them or none. No file
    that speaks of an earlier network stays.

    facts: files that speak of this one, to be copied. images: as `save_onnx`.

    Returns, Raises:
        As `save_onnx`.
    """
    with drafted_network(folder) as draft:
        save_model(model, draft, with_weights=trained)
        agreed = save_onnx(model, draft, options, trained, card, images)
        for fact in facts:
            replace_file(draft / fact.name, fact.read_bytes())
    return agreed


@contextmanager
def drafted_network(folder: Path) -> Iterator[Path]:
    """A place for a network's files, which move to `folder` at the end, all of them or none; those of an earlier
    network go from it, where its document says that there is one.

    Raises:
        DiskFull: there is no room for them.
        UserError: a folder that cannot be written.
    """
    try:
        with scratch(folder) as draft:
            yield draft
            for pattern in OF_A_NETWORK if (folder / "arch.json").is_file() else ():
                for earlier in folder.glob(pattern):
                    earlier.unlink()
            for path in draft.iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _other_classifier(model: Network | TimmModel, weights: str) -> str:
    """Why weights leave a network's classifier untrained, and what to do."""
    classes = model.loaded.classes if model.loaded else None
    if classes is None:
        return f"{weights} has no classifier: `vitnas train --weights` trains one"
    named = "1 class" if classes == 1 else f"{classes} classes"
    return (
        f"{weights} has a classifier of {named} and the network one of {model.arch.num_classes}: "
        f"add --num-classes {classes}, or train it with `vitnas train --weights`"
    )
