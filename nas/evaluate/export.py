"""`vitnas export`: a network's files, where int8 is judged on held-out images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nas.errors import UserError
from nas.evaluate.precision import quantize_file
from nas.export.card import PREFIX, Accuracy, metadata_of
from nas.export.folder import data_beside, drafted_network, refuse_run, write_folder
from nas.export.options import PLAIN, FileOptions
from nas.export.quantize import MAX_DROP, check_max_drop
from nas.files import tell
from nas.networks.targets import find_target


def export(
    network: str,
    folder: Path | str,
    weights: str | None = None,
    num_classes: int | None = None,
    options: FileOptions = PLAIN,
    data: str | None = None,
    max_drop: float = MAX_DROP,
) -> str:
    """Write a network's folder: arch.json, model.onnx and, where there are weights, model.safetensors.

    Args:
        network: a published name, an arch.json, a run's folder, timm/NAME or hf-hub:REPO.
        weights: "timm", or a file of PyTorch or safetensors; None: those beside the arch.json, or random ones.
        num_classes: None: the network's own.
        options: of the ONNX file.
        data: images to check it on, as `nas.data.dataset.open_data` takes them; None: those of the run that the weights
            are from, where they are here, or else photographs. int8 needs some: those for training calibrate it, those
            for validation judge it.
        max_drop: points of top-1 that int8 may cost.

    Returns:
        What was written, how nearly ONNX Runtime and PyTorch agree, and what int8 costs.

    Raises:
        UserError: the folder is a run's own, no such network or data, a network that cannot be exported, or int8 that
            costs more than it may; nothing has been written then.
    """
    from nas.data.dataset import open_data

    options.check()
    check_max_drop(max_drop, options.precision == "int8")
    refuse_run(Path(folder))
    if options.precision != "int8":
        return write_folder(network, Path(folder), weights, num_classes, options, data)
    target = find_target(network)
    used = weights or (str(target.weights) if target.weights else None)
    name = data or (data_beside(Path(used)) if used not in (None, "timm") else None)
    if name is None:
        raise UserError("--precision int8 needs --data: images to calibrate it on, and to judge it by")
    if used is None:
        raise UserError(f"--precision int8: {network} has no trained weights here to judge: give --weights")
    size = target.require().resolution
    images = open_data(name, size, None, 0, used)
    folder = Path(folder)
    with drafted_network(folder) as draft:
        line = write_folder(network, draft, weights, num_classes, replace(options, precision="fp32"), data)
        path = draft / "model.onnx"
        price = quantize_file(path, images, network, max_drop, tell)
        if not price.within:
            raise UserError(f"infeasible, nothing is written: {price.refusal}")
        _tell_accuracy(path, Accuracy.counted(price.top1, price.images, images.name))
    cost, *more = price.lines
    return "\n".join([f"{folder}/model.onnx: {cost}", *more, f"in fp32: {line.partition(': ')[2]}", *images.notes])


def _tell_accuracy(path: Path, accuracy: Accuracy) -> None:
    """Let a file's card tell it, in place of the accuracy and the latency of its float32 weights."""
    import onnx

    model = onnx.load(path)
    facts = metadata_of(model) | {f"{PREFIX}accuracy": accuracy.model_dump_json()}
    facts.pop(f"{PREFIX}latency", None)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)
