"""The latency of the networks that were judged, by the protocol of every latency that vitnas tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nas.evaluate.networks import Judged, TorchClassifier
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.result import Speed
from nas.export.onnx_input import OnnxInput, fix_shape
from nas.export.side_by_side import measure_side_by_side
from nas.measure.reasons import plain
from nas.measure.runtime import Settings
from nas.measure.samples import SURE_ROUNDS, Measurement, quanta


def speeds_of(
    networks: Mapping[str, Judged], threads: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, Speed], list[str]]:
    """Time networks side by side, by label: at the batch size that a file is fixed at, or else 1.

    Returns:
        The speeds, and a line for each network that could not be measured.

    Raises:
        Interrupted: Ctrl-C (`nas.measure.protocol`).
    """
    settings = {label: _settings(each, threads) for label, each in networks.items()}
    found = measure_side_by_side(networks, _written, settings, SURE_ROUNDS, progress=progress)
    speeds, failed = {}, []
    for label, result in found.items():
        if isinstance(result, Measurement):
            batch = settings[label].batch_size
            speeds[label] = Speed(result.p50_ms, result.ci_ms, result.throughput(batch), batch, threads, quanta(result))
        else:
            failed.append(f"{label} could not be timed: {plain(str(result))}")
    return speeds, failed


def _settings(network: Judged, threads: int) -> Settings:
    found = network.classifier
    batch = found.batch_size if isinstance(found, OnnxFile) else None
    return Settings(found.runtime, "cpu", threads, batch or 1, found.precision)


def _written(network: Judged, stem: Path) -> Path:
    """The file that its runtime times: an ONNX file of static shape, or the network's document."""
    found = network.classifier
    if isinstance(found, TorchClassifier):
        path = stem.with_suffix(".json")
        path.write_text(found.network.to_json())
        return path
    assert isinstance(found, OnnxFile)
    about = OnnxInput.read(found.path)
    if about.sizes is not None and None not in about.sizes:
        return found.path
    path, side = stem.with_suffix(".onnx"), found.preprocess.size
    fix_shape(found.path, about.name, (1, side, side, 3) if found.channels_last else (1, 3, side, side), path)
    return path
