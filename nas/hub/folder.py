"""The files of a repository, made from a network's folder; nothing in them names folders, users or hosts of this
machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.export.card import LABELS, PREPROCESS, Card, load_onnx, metadata_of
from nas.export.onnx_input import OnnxInput
from nas.export.quantize import left_in_float
from nas.files import replace_file, scratch, unwritable
from nas.hub.facts import RunFacts, public
from nas.hub.page import OnnxFacts, Subject, page
from nas.hub.request import PushedFile
from nas.networks.counts import counts_of
from nas.networks.hub import ARCH, CONFIG, ONNX, WEIGHTS
from nas.networks.targets import find_target
from nas.networks.timm_form import PretrainedForm, TimmForm
from nas.networks.timm_network import TimmNetwork

if TYPE_CHECKING:
    from nas.hub.request import PushRequest
    from search_spaces import Arch

PAGE = "README.md"


def write_repository(request: PushRequest, folder: Path) -> list[PushedFile]:
    """Write what is to be uploaded into a folder, and nothing else: arch.json, model.safetensors, model.onnx and those
    of other precisions, preprocess.json, labels.txt, config.json (timm's form) and README.md.

    Returns:
        The files, in the order of their names.

    Raises:
        UserError: no such network, one without trained weights or model.onnx, or a folder that cannot be written.
        DiskFull: there is no room.
    """
    target = find_target(request.run)
    network, source, weights = target.require(), target.folder, target.weights
    if source is None:
        raise UserError(f"{request.run}: give the folder of a run, or `vitnas export {request.run} --weights timm` it")
    if weights is None:
        raise UserError(f"{request.run} has no trained weights: `vitnas train` makes some")
    if not (source / ONNX).is_file():
        raise UserError(f"{request.run} has no {ONNX}: `vitnas export {request.run} --out DIR`, then push that folder")
    card = Card.read(source)
    if card.preprocess is None:
        raise UserError(f"{request.run} does not say how its images are prepared: export it again")
    try:
        replace_file(folder / ARCH, network.to_json())
        _write_weights(weights, folder / WEIGHTS)
        card.write(folder)
        replace_file(folder / CONFIG, form_of(network, card).model_dump_json(indent=1, exclude_none=True) + "\n")
        names = [ONNX, *sorted(path.name for path in source.glob("model.*.onnx"))]
        files = [_write_onnx(source / name, folder / name) for name in names]
        counts = counts_of(network)
        about = Subject(
            request.repository, request.revision, network, counts.params, counts.macs, files, RunFacts.of(source)
        )
        replace_file(folder / PAGE, page(about))
    except OSError as error:
        raise unwritable(folder, error) from None
    written = (ARCH, WEIGHTS, PREPROCESS, LABELS, CONFIG, PAGE, *names)
    return [PushedFile(name, (folder / name).stat().st_size) for name in sorted(written) if (folder / name).is_file()]


def write_to(request: PushRequest, folder: Path) -> list[PushedFile]:
    """As `write_repository`, into a new folder, all of it or nothing.

    Raises:
        UserError: there is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder} is not an empty folder: give a new one")
    with scratch() as draft:
        files = write_repository(request, draft)
        there = folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in draft.iterdir():
                shutil.copyfile(path, folder / path.name)
        except OSError as error:
            for file in files:
                (folder / file.name).unlink(missing_ok=True)
            if not there and folder.is_dir():
                folder.rmdir()
            raise unwritable(folder, error) from None
    return files


def form_of(network: Arch | TimmNetwork, card: Card) -> TimmForm:
    """The config.json of a network whose card has its pixels. A network of timm's is named in it, so that timm loads
    the repository too."""
    assert card.preprocess is not None
    how = card.preprocess
    architecture = classifier = first_conv = None
    fixed = True
    if isinstance(network, TimmNetwork):
        import timm

        config = timm.get_pretrained_cfg(network.name)
        assert config is not None, "a TimmNetwork has one"
        architecture, fixed = config.architecture, config.fixed_input_size
        classifier, first_conv = config.classifier, config.first_conv
    told = PretrainedForm(
        input_size=(3, how.size, how.size),
        interpolation=how.interpolation,
        crop_pct=how.crop_pct,
        mean=how.mean,
        std=how.std,
        num_classes=network.num_classes,
        fixed_input_size=fixed,
        classifier=classifier,
        first_conv=first_conv,
    )
    labels = tuple(card.classes) if card.classes else None
    return TimmForm(architecture=architecture, num_classes=network.num_classes, label_names=labels, pretrained_cfg=told)


def _write_weights(source: Path, path: Path) -> None:
    """Copy safetensors; without metadata, which may be anything."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save

    try:
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
        if metadata:
            replace_file(path, save(load_file(source)))
        else:
            shutil.copyfile(source, path)
    except SafetensorError as error:
        raise UserError(f"{source}: damaged or cut off, not a readable safetensors file ({error})") from None


def _write_onnx(source: Path, path: Path) -> OnnxFacts:
    """Copy an ONNX file; what it says of images and machine says nothing of this one's folders and users."""
    import onnx

    card, model = Card.read(source), load_onnx(source)
    told, found = public(card), metadata_of(model)
    if told == card:
        shutil.copyfile(source, path)
    else:
        model = onnx.load(source)
        onnx.helper.set_model_props(model, found | told.metadata())
        onnx.save(model, path)
    (image,) = [each for each in model.graph.input if each.name not in {one.name for one in model.graph.initializer}]
    batch = image.type.tensor_type.shape.dim[0]
    kind = onnx.TensorProto.UINT8 if told.in_graph else onnx.TensorProto.FLOAT
    plain = (
        image.name == "images"
        and image.type.tensor_type.elem_type == kind
        and (batch.dim_value == 1 or bool(batch.dim_param))
        and told.classes is not None
    )
    left = left_in_float(model) if OnnxInput.read(source).quantised else None
    return OnnxFacts(path.name, path.stat().st_size, told, plain, left)
