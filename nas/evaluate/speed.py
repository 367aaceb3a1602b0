"""The latency of the networks that were judged, by the protocol of every latency that vitnas tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nas.evaluate.networks import Judged, TorchClassifier
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.result import Speed
from nas.export.onnx_input import OnnxInput, fix_shape
from nas.export.side_by_side import measure_side_by_side
from nas.measure.device import device_lock
from nas.measure.hardware import describe
from nas.measure.reasons import plain
from nas.measure.runtime import Settings
from nas.measure.samples import SURE_ROUNDS, Measurement, quanta, quanta_line


@dataclass(frozen=True)
class Timed:
    """The speeds of networks, by label."""

    speeds: Mapping[str, Speed] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What could not be timed, and what the figures are not."""
    cpu: str | None = None
    """Its name."""
    interrupted: bool = False
    """Whether Ctrl-C came first; there are no speeds then."""


def time_networks(networks: Mapping[str, Judged], threads: int, progress: Callable[[int, int], None]) -> Timed:
    """Time networks side by side, by label: at the batch size that a file is fixed at, or else 1. A file that is named
    with several ways to prepare images is timed once."""
    with device_lock("cpu"):  # what another vitnas does there is not this machine's load
        hardware = describe(Settings(threads=threads))
    first: dict[tuple[str, str, str], str] = {}
    for label, each in networks.items():
        first.setdefault(each.as_run, label)
    chosen = {label: networks[label] for label in first.values()}
    settings = {label: _settings(each, threads) for label, each in chosen.items()}
    try:
        found = measure_side_by_side(chosen, _written, settings, SURE_ROUNDS, progress=progress)
    except KeyboardInterrupt:
        return Timed(notes=("Interrupted: latency was not measured",), interrupted=True)
    speeds, notes = dict[str, Speed](), []
    for label, result in found.items():
        if isinstance(result, Measurement):
            batch = settings[label].batch_size
            speeds[label] = Speed(result.p50_ms, result.ci_ms, result.throughput(batch), batch, threads, quanta(result))
        else:
            notes.append(f"{label} could not be timed: {plain(str(result))}")
    if any(each.waiting for each in speeds.values()):
        notes.append(quanta_line(hardware, "the latencies marked waiting"))
    own = {label: first[each.as_run] for label, each in networks.items()}
    return Timed({label: speeds[of] for label, of in own.items() if of in speeds}, tuple(notes), hardware["cpu"])


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
