"""The files that runtimes load, made in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.bench.shapes import static_shape
from nas.data.lineage import TIMM
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.export.artifact import Exporter, export_here, lower_precision
from nas.export.onnx_input import fix_shape
from nas.measure.runtime import Settings

if TYPE_CHECKING:
    from nas.bench.request import BenchRequest, Waiting
    from nas.export.onnx_input import OnnxInput
    from nas.networks.targets import Target


class Calibration:
    """Images that int8 is calibrated on. Raises UserError where they cannot be had, or nothing needs them."""

    def __init__(self, options: BenchRequest, folder: Path, notes: list[str]) -> None:
        self._folder, self._notes, self._data = folder, notes, None
        int8 = any(settings.precision == "int8" for settings in options.settings)
        if options.data is None:
            from nas.export.quantize import NOISE

            notes += [NOISE] * int8
        elif not int8:
            raise UserError("--data is for calibrating int8: add --precision int8")
        else:
            from nas.data.dataset import open_data

            self._data = open_data(options.data, 224, None, 0)

    def at(self, resolution: int, target: Target) -> str | None:
        """The file (.npy) of float32 images (N, 3, R, R), prepared as the network's own; None without --data."""
        import numpy as np

        from nas.export.quantize import calibration_images

        if self._data is None:
            return None
        pixels = pixels_of_target(target)
        path = self._folder / f"images-{resolution}-{pixels}.npy"
        if not path.exists():
            images, skipped = calibration_images(self._data.at(resolution, pixels=pixels), resolution)
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
    ) -> None:
        self._folder, self._targets, self._inputs, self._shapes = folder, targets, inputs, options.shapes
        self._calibration = calibration
        self._made: dict[tuple[str, Settings], Path] = {}
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
        if target.network is not None:
            resolution = target.network.resolution
            method, source = "export", {"document": target.network.to_json()}
        else:
            given = self._inputs[label]
            shape = static_shape(given, self._shapes, settings.batch_size, target.resolution)
            resolution = shape[-1]
            method, source = "fix", {"source": str(given.path), "name": given.name, "shape": shape}
            if given.quantised:
                settings = replace(settings, precision="fp32")  # there is nothing left to convert
        images = self._calibration.at(resolution, target) if settings.precision == "int8" else None
        return self._child.call(method, settings, stem, images, **source)


def pixels_of_target(target: Target) -> Pixels:
    """As the file says, or as the weights want that the network's folder holds, or that timm has of it."""
    from nas.export.card import Card, pixels_of

    if target.network is not None:
        weights = target.as_trained().weights or (TIMM if target.folder is None else None)
        return pixels_of(target.network, weights)
    preprocess = Card.read(target.onnx).preprocess if target.onnx else None
    return preprocess.pixels if preprocess else IMAGENET


def _fix(
    source: str, name: str, shape: list[int], settings: dict[str, Any], stem: str, images: str | None
) -> dict[str, str]:
    """In the child: a user's ONNX file with this shape of its input, in this precision."""
    import numpy as np

    path = Path(f"{stem}.onnx")
    fix_shape(Path(source), name, shape, path)
    lower_precision(path, Settings(**settings), np.load(images) if images else None)
    return {"path": str(path)}


if __name__ == "__main__":
    from nas.process import serve

    serve({"export": export_here, "fix": _fix})
