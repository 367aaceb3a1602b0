"""A network as ONNX, and the process that exports candidates so that a search survives what goes wrong there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.export.graph import to_half
from nas.export.onnx import label_onnx, to_file, write_onnx
from nas.export.options import FileOptions
from nas.measure.runtime import RUNTIMES, Settings
from nas.process import Worker

if TYPE_CHECKING:
    import numpy as np

    from nas.export.card import Card
    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch

EXPORT_TIMEOUT_S = 180
CONVERTED = ("fp16", "int8")
"""Precisions that need an ONNX file of their own (see `lower_precision`)."""


def write_artifact(
    network: Arch | TimmNetwork, settings: Settings, stem: Path, calibration: np.ndarray | None = None
) -> Path:
    """The file `settings.runtime` loads for a network: ONNX in its precision, or the network's JSON document.

    calibration: images for int8, see `lower_precision`.

    Raises:
        RuntimeError, ValueError: the network cannot be exported.
    """
    if RUNTIMES[settings.runtime].artifact == "module":
        path = Path(f"{stem}.json")
        path.write_text(network.to_json())
    else:
        path = Path(f"{stem}.onnx")
        write_onnx(network, path, FileOptions(settings.batch_size))
        lower_precision(path, settings, calibration)
    return path


def lower_precision(
    path: Path, settings: Settings, calibration: np.ndarray | None = None, keep_io: bool = False
) -> None:
    """Turn a float32 ONNX file into what the runtime loads for a precision, in place.

    fp16 converts weights and, unless `keep_io`, input and output, but not the scores of tokens
    (`nas.export.graph.to_half`); int8 quantises (`nas.export.quantize`), with `calibration` images, float32
    (N, 3, R, R), or noise. For fp32, tf32 and bf16 the file stays: the runtime computes in them.
    """
    if settings.precision == "fp16":
        to_half(path, keep_io)
    elif settings.precision == "int8":
        from nas.export.quantize import quantize

        quantize(path, calibration)


def write_trained(network: Arch | TimmNetwork, weights: Path, path: Path, options: FileOptions, card: Card) -> None:
    """Write a network with its weights, folded, as ONNX with its card; see `nas.export.onnx.to_file`.

    Raises:
        UserError: weights that do not fit.
        RuntimeError, ValueError: the network cannot be exported.
    """
    from nas.networks.build import for_inference
    from nas.networks.weights import load

    to_file(for_inference(load(network, weights)), path, network.resolution, options, card.pixels)
    label_onnx(path, network, True, card.of_file(options))


class Exporter:
    """`write_artifact` in a child process: a network that crashes it, or fills its memory, is a WorkerError.

    images: what int8 is calibrated on, see `lower_precision`. module: what the child runs, with "export" among its
    methods (see `export_here`). waiting: see `Worker`.
    """

    def __init__(
        self,
        images: np.ndarray | None = None,
        module: str = "nas.export.artifact",
        timeout_s: float = EXPORT_TIMEOUT_S,
        waiting: Callable[[float, float], None] | None = None,
    ) -> None:
        self._images, self._module, self._timeout_s, self._waiting = images, module, timeout_s, waiting
        self._worker: Worker | None = None

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()

    @property
    def running(self) -> list[Worker]:
        """The child, where there is one: to be stopped while something is timed."""
        return [self._worker] if self._worker is not None and self._worker.alive else []

    def write(self, network: Arch | TimmNetwork, settings: Settings, stem: Path) -> Path:
        """The network's file; the calibration images are kept beside it. Raises WorkerError."""
        return self.call("export", settings, stem, self._calibration(stem.parent), document=network.to_json())

    def call(self, method: str, settings: Settings, stem: Path, images: str | None, **source: Any) -> Path:
        """The file that a method of the child makes; a child that has died is started again. Raises WorkerError."""
        if self._worker is None or not self._worker.alive:
            if self._worker is not None:
                self._worker.close()
            self._worker = Worker(self._module, waiting=self._waiting)
        answer = self._worker.call(
            method, self._timeout_s, settings=asdict(settings), stem=str(stem.absolute()), images=images, **source
        )
        return Path(answer["path"])

    def _calibration(self, folder: Path) -> str | None:
        import numpy as np

        if self._images is None:
            return None
        path = folder / "images.npy"
        if not path.exists():
            np.save(path, self._images)
        return str(path)


def export_here(document: str, settings: dict[str, Any], stem: str, images: str | None) -> dict[str, str]:
    """`write_artifact` as a child process offers it. images: a .npy file to calibrate on."""
    import numpy as np

    from nas.networks.build import from_document

    calibration = np.load(images) if images else None
    return {"path": str(write_artifact(from_document(document), Settings(**settings), Path(stem), calibration))}


if __name__ == "__main__":
    from nas.process import serve

    serve({"export": export_here})
