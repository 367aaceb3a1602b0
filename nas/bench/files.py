"""The files that runtimes load, made in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.bench.shapes import static_shape
from nas.data.lineage import TIMM, remark
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.evaluate.precision import MORE, HeldOut, Price, judging, quantize_within
from nas.export.artifact import Exporter, export_here, lower_precision, write_trained
from nas.export.onnx_input import fix_shape
from nas.export.quantize import NOISE, Recipe, calibration_images, quantize
from nas.measure.runtime import Settings
from nas.process import WorkerError

if TYPE_CHECKING:
    from nas.bench.request import BenchRequest, Waiting
    from nas.export.onnx_input import OnnxInput
    from nas.networks.targets import Target


class Calibration:
    """Images that int8 is calibrated on and judged by. Raises UserError where they cannot be had, or nothing needs
    them."""

    def __init__(self, options: BenchRequest, folder: Path, notes: list[str]) -> None:
        self._folder, self._notes, self._data = folder, notes, None
        int8 = any(settings.precision == "int8" for settings in options.settings)
        if options.data is None:
            notes += [NOISE] * int8
        elif not int8:
            raise UserError("--data is for calibrating int8: add --precision int8")
        else:
            from nas.data.dataset import open_data

            given = [_weights(target) for target in options.targets]
            weights: dict[Path | str, None] = {each: None for each in given if each}
            self._data = open_data(options.data, 224, None, 0, *weights)

    def held_out(self, path: Path, name: str, target: Target) -> HeldOut:
        """The validation images, with --data, for a file with trained weights. What is known to be among its training
        images, or is not known not to be, is noted.

        Raises:
            UserError: it does not know their classes, or does not say how an image becomes its input.
        """
        assert self._data is not None
        found = HeldOut.of(self._data.val, self._data.classes, path, name)
        line = remark(_weights(target), self._data.val, "validation")
        if line and line not in self._notes:
            self._notes.append(line)
        return found

    def at(self, resolution: int, target: Target) -> str | None:
        """The file (.npy) of float32 images (N, 3, R, R), prepared as the network's own; None without --data."""
        if self._data is None:
            return None
        pixels = pixels_of_target(target)
        path = self._folder / f"images-{resolution}-{pixels}.npy"
        if not path.exists():
            images, skipped = calibration_images(self._data.at(resolution, pixels=pixels), resolution, MORE)
            np.save(path, images)
            if skipped and skipped not in self._notes:
                self._notes.append(skipped)
        return str(path)


class Files:
    """Makes the files that runtimes load, in a process of its own: a network may crash it, or fill its memory."""

    def __init__(
        self,
        folder: Path,
        targets: Mapping[str, Target],
        inputs: Mapping[str, OnnxInput],
        options: BenchRequest,
        calibration: Calibration,
        waiting: Waiting,
        notes: list[str],
    ) -> None:
        self._folder, self._targets, self._inputs, self._shapes = folder, targets, inputs, options.shapes
        self._calibration = calibration
        self._made: dict[tuple[str, Settings], Path] = {}
        self._max_drop, self._notes = options.max_drop, notes
        self.prices: dict[tuple[str, str], Price] = {}
        """What int8 costs on the validation images, by label and runtime."""
        self._label = ""  # what is being made
        self._child = Exporter(
            module="nas.bench.files",
            timeout_s=options.timeout_s,
            waiting=lambda *waited: waiting(self._label, *waited),
        )

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()

    def of(self, label: str, settings: Settings) -> Path:
        """The network's file for these settings, whatever the threads. Raises WorkerError where it cannot be made."""
        key, self._label = (label, replace(settings, threads=1)), label
        if key not in self._made:
            self._made[key] = self._make(label, settings, self._folder / str(len(self._made)))
        return self._made[key]

    def _make(self, label: str, settings: Settings, stem: Path) -> Path:
        target, source = self._targets[label], dict[str, Any]()
        weights = target.weights if target.trained_at is None else None
        if target.network is not None:
            resolution = target.network.resolution
            method, source = "export", {"document": target.network.to_json()}
            if weights:
                method, source = "trained", source | {"weights": str(weights)}
        else:
            given = self._inputs[label]
            shape = static_shape(given, self._shapes, settings.batch_size, target.resolution)
            resolution = shape[-1]
            method, source = "fix", {"source": str(given.path), "name": given.name, "shape": shape}
            if given.quantised:
                settings = replace(settings, precision="fp32")  # there is nothing left to convert
        images = self._calibration.at(resolution, target) if settings.precision == "int8" else None
        if images is None or (target.network is not None and weights is None):
            return self._child.call(method, settings, stem, images, **source)
        full = self._child.call(method, replace(settings, precision="fp32"), stem, None, **source)
        recipe = self._recipe(label, settings, full, images)
        return self._child.call("quantize", settings, stem, images, recipe=asdict(recipe)) if recipe else full

    def _recipe(self, label: str, settings: Settings, path: Path, images: str) -> Recipe | None:
        """The recipe by which a float32 file is to become int8: the default one where validation images cannot judge
        it, which is noted. None: it has become int8, by the recipe that they choose."""
        key = label, judging(settings.runtime)
        if key in self.prices:  # another batch size
            return self.prices[key].recipe
        try:
            held_out = self._calibration.held_out(path, label, self._targets[label])
        except UserError as error:
            self._notes.append(f"{label}: what int8 costs is not known: {error}")
            return Recipe()
        try:
            price = quantize_within(path, np.load(images), held_out, key[1], self._max_drop, settings.threads)
        except UserError as error:
            raise WorkerError(str(error)) from None
        self.prices[key] = price
        self._notes += [f"{label}: {line}" for line in price.lines]
        return None


def _weights(target: Target) -> Path | str | None:
    """Where a network's weights are; None: they are random."""
    return target.onnx or target.as_trained().weights


def pixels_of_target(target: Target) -> Pixels:
    """As the file says, or as the weights want that the network's folder holds, or that timm has of it."""
    from nas.export.card import Card, pixels_of

    if target.network is not None:
        weights = target.as_trained().weights or (TIMM if target.folder is None else None)
        return pixels_of(target.network, weights)
    preprocess = Card.read(target.onnx).preprocess if target.onnx else None
    return preprocess.pixels if preprocess else IMAGENET


def _trained(document: str, weights: str, settings: dict[str, Any], stem: str, images: str | None) -> dict[str, str]:
    """In the child: a network with its weights, in float32."""
    from nas.export.folder import card_for
    from nas.networks.build import from_document

    network, path = from_document(document), Path(f"{stem}.onnx")
    card, _ = card_for(network, weights)
    write_trained(network, Path(weights), path, Settings(**settings).batch_size, card)
    return {"path": str(path)}


def _quantize(settings: dict[str, Any], stem: str, images: str, recipe: dict[str, Any]) -> dict[str, str]:
    """In the child: the float32 file at `stem` as int8."""
    path = Path(f"{stem}.onnx")
    quantize(path, np.load(images), Recipe(**recipe | {"kept": tuple(recipe["kept"])}))
    return {"path": str(path)}


def _fix(
    source: str, name: str, shape: list[int], settings: dict[str, Any], stem: str, images: str | None
) -> dict[str, str]:
    """In the child: a user's ONNX file with this shape of its input, in this precision."""
    path = Path(f"{stem}.onnx")
    fix_shape(Path(source), name, shape, path)
    lower_precision(path, Settings(**settings), np.load(images) if images else None)
    return {"path": str(path)}


if __name__ == "__main__":
    from nas.process import serve

    serve({"export": export_here, "trained": _trained, "fix": _fix, "quantize": _quantize})
