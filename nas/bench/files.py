"""The files that runtimes load, made in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from nas.bench.shapes import static_shape
from nas.data.lineage import TIMM, remark
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.evaluate.precision import MORE, HeldOut, Price, judging, lower_within
from nas.export.artifact import Exporter, export_here, lower_precision, write_trained
from nas.export.onnx_input import fix_shape
from nas.export.options import FileOptions
from nas.export.quantize import NOISE, Recipe, calibration_images, quantize
from nas.measure.runtime import LOWER, RUNTIMES, Settings

if TYPE_CHECKING:
    from nas.bench.request import BenchRequest, Waiting
    from nas.data.dataset import ImageData
    from nas.export.onnx_input import OnnxInput
    from nas.networks.targets import Target


JUDGING = 10
"""Times as long as another step the judging of a file may take: some thousand images, and several recipes."""


class Calibration:
    """Images that int8 is calibrated on, and lower precisions are judged by. Raises UserError where they cannot be had,
    or nothing needs them."""

    def __init__(self, options: BenchRequest, folder: Path, notes: list[str]) -> None:
        self._folder, self._notes = folder, notes
        self._data: ImageData | None = None
        self.name, self.weights = options.data or "", list[str]()
        """Of the data, and where its networks' weights are, as `nas.data.dataset.open_data` takes them."""
        if options.data is None:
            return
        if not any(settings.precision in LOWER for settings in options.settings):
            raise UserError("--data is for judging lower precisions: add --precision int8, fp16 or bf16")
        given = dict.fromkeys(_weights(target) for target in options.targets)
        self.weights = [str(each) for each in given if each]
        self._data = _opened(self.name, tuple(self.weights))

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self._data is not None

    def remark(self, target: Target) -> None:
        """Note what is known to be among a network's training images, or is not known not to be."""
        assert self._data is not None
        line = remark(_weights(target), self._data.val, "validation")
        if line and line not in self._notes:
            self._notes.append(line)

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
        self.prices: dict[tuple[str, str, str], Price] = {}
        """What lower precisions cost on the validation images, by label, runtime and precision."""
        self._label = ""  # what is being made
        self._child = Exporter(
            module="nas.bench.files",
            timeout_s=options.timeout_s,
            waiting=lambda *waited: waiting(self._label, *waited),
        )
        self._judge = Exporter(
            module="nas.bench.files",
            timeout_s=options.timeout_s * JUDGING,
            waiting=lambda *waited: waiting(self._label, *waited),
        )

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()
        self._judge.__exit__()

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
            if weights and RUNTIMES[settings.runtime].artifact == "onnx":
                method, source = "trained", source | {"weights": str(weights)}
        else:
            given = self._inputs[label]
            shape = static_shape(given, self._shapes, settings.batch_size, target.resolution)
            resolution = shape[-1]
            method, source = "fix", {"source": str(given.path), "name": given.name, "shape": shape}
            if given.quantised:
                settings = replace(settings, precision="fp32")  # there is nothing left to convert
                line = f"{label} is int8 already, and not judged: `vitnas evaluate` tells its accuracy."
                if self._calibration.given and line not in self._notes:
                    self._notes.append(line)
        if settings.precision == "int8" and not self._calibration.given and NOISE not in self._notes:
            self._notes.append(NOISE)
        images = self._calibration.at(resolution, target) if settings.precision == "int8" else None
        judged = settings.precision in LOWER and self._calibration.given
        if not judged or method == "export":
            if judged and weights:
                self._notes.append(f"{label}: what {settings.precision} costs on {settings.runtime} was not judged")
            return self._child.call(method, settings, stem, images, **source)
        full = self._child.call(method, replace(settings, precision="fp32"), stem, None, **source)
        if self._judged(label, settings, full, images):
            return full
        price = self.prices.get(self._key(label, settings))
        recipe = (price and price.recipe) or Recipe()
        return self._child.call("lower", settings, stem, images, recipe=asdict(recipe))

    @staticmethod
    def _key(label: str, settings: Settings) -> tuple[str, str, str]:
        return label, judging(settings.runtime), settings.precision

    def _judged(self, label: str, settings: Settings, path: Path, images: str | None) -> bool:
        """Turn a float32 file into what is loaded for a lower precision and judge it, in place; of int8 by the recipe
        that the validation images choose. False: it is as it was, as it has been judged at another batch size, or
        cannot be, which is noted."""
        key = self._key(label, settings)
        if key in self.prices:
            return False
        images_of = self._calibration
        source = {"data": images_of.name, "weights": images_of.weights, "name": label, "max_drop": self._max_drop}
        told = _Told.read(self._judge.call("judge", settings, path.with_suffix(""), images, **source))
        if told.price is None:
            self._notes.append(f"{label}: what {settings.precision} costs is not known: {told.unknown}")
            return False
        self.prices[key] = told.price
        self._calibration.remark(self._targets[label])
        self._notes += [f"{label}: {line}" for line in told.price.lines]
        return True


@dataclass(frozen=True)
class _Told:
    """What the child says of a file that it has judged, beside which it lies."""

    price: Price | None
    unknown: str = ""
    """Why there is no price."""

    @classmethod
    def read(cls, path: Path) -> _Told:
        found: _Told = TypeAdapter(cls).validate_json(path.read_bytes())
        return found


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
    """In the child: a network with its weights, in the precision of the settings."""
    from nas.export.folder import card_for
    from nas.networks.build import from_document

    network, path, own = from_document(document), Path(f"{stem}.onnx"), Settings(**settings)
    card, _ = card_for(network, weights)
    write_trained(network, Path(weights), path, FileOptions(own.batch_size), card)
    lower_precision(path, own, np.load(images) if images else None)
    return {"path": str(path)}


def _lower(settings: dict[str, Any], stem: str, images: str | None, recipe: dict[str, Any]) -> dict[str, str]:
    """In the child: the float32 file at `stem` in the precision of the settings; int8 by a recipe."""
    path, own = Path(f"{stem}.onnx"), Settings(**settings)
    if own.precision == "int8":
        quantize(path, np.load(images) if images else None, Recipe(**recipe | {"kept": tuple(recipe["kept"])}))
    else:
        lower_precision(path, own)
    return {"path": str(path)}


def _judge(
    settings: dict[str, Any],
    stem: str,
    images: str | None,
    data: str,
    weights: Sequence[str],
    name: str,
    max_drop: float,
) -> dict[str, str]:
    """In a child: turn the float32 file at `stem` into what is loaded for the precision of the settings, judge it, and
    write what was found (`_Told`) beside it."""
    path, told = Path(f"{stem}.onnx"), Path(f"{stem}.json")
    found = _opened(data, tuple(weights))
    try:
        held_out = HeldOut.of(found.val, found.classes, path, name)
    except UserError as error:
        answer = _Told(None, str(error))
    else:
        calibration = np.load(images) if images else None
        answer = _Told(lower_within(path, Settings(**settings), held_out, max_drop, calibration))
    told.write_bytes(TypeAdapter(_Told).dump_json(answer))
    return {"path": str(told)}


@cache
def _opened(data: str, weights: Sequence[str]) -> ImageData:
    from nas.data.dataset import open_data

    return open_data(data, 224, None, 0, *weights)


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

    serve({"export": export_here, "trained": _trained, "fix": _fix, "lower": _lower, "judge": _judge})
