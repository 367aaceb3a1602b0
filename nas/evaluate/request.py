"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvaluateRequest:
    """What an evaluation is asked for."""

    models: Sequence[str]
    """ONNX files, runs' folders, files of weights, published names or timm/NAME."""
    data: str
    """Images with a folder for each class, as `nas.evaluate.images.open_images` takes them."""
    runtimes: Sequence[str] = ()
    """onnxruntime, openvino, torch; none: ONNX Runtime for ONNX files and folders that hold one, else PyTorch."""
    preprocess: str | None = None
    """How images become the input of ONNX files that do not say it, or "try": see `nas.evaluate.networks`."""
    labels: Path | str | None = None
    """A file with a name a line, in the order of the outputs, for networks that do not say their classes."""
    split: str | None = None
    """train, val, test or all; None: val, or else test, or what the networks were not trained on."""
    limit: int | None = None
    """Images at most, picked at random; None: all."""
    threads: int | None = None
    """CPU threads; None: the physical cores that this process may use."""
    throughput: bool = True
    """Whether latency is measured, too."""
    weights_from: Path | str | None = None
    """A folder of published weights."""
    folder: Path | str | None = None
    """Where report.html and evaluate.json are written; None: nowhere."""
