"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.errors import UserError, unknown
from nas.evaluate.preprocess import parse_preprocess

ONNX_RUNTIMES = ("onnxruntime", "openvino")
TORCH = "torch"
PRECISIONS = ("fp32", "bf16")
PARTS = ("train", "val", "test", "all")
TRY = "try"
"""What --preprocess says to compare the usual ways."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What an evaluation is asked for."""

    models: Sequence[str]
    """ONNX files, runs' folders, files of weights, published names, timm/NAME or hf-hub:REPO."""
    data: str
    """Images with a folder for each class, as `nas.evaluate.images.open_images` takes them."""
    runtimes: Sequence[str] = ()
    """onnxruntime, openvino, torch; none: ONNX Runtime for ONNX files and folders that hold one, else PyTorch."""
    preprocess: str | None = None
    """How images become the input of ONNX files that do not say it, or "try": see `nas.evaluate.networks`."""
    labels: Sequence[str] | None = None
    """Names of the classes, in the order of the outputs, for networks that do not say them."""
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
    precisions: Sequence[str] = ()
    """What is computed in, beside what a file itself says: fp32, bf16 (OpenVINO and PyTorch); none: fp32."""

    @property
    def tries(self) -> bool:
        """Whether the usual ways to prepare images are compared."""
        return self.preprocess is not None and self.preprocess.partition(",")[0] == TRY

    def check(self) -> None:
        """Check what can be checked without opening networks or images.

        Raises:
            UserError: no networks, a runtime, precision, part or number of images that there is not, or a --preprocess
                that says nothing.
        """
        if not self.models:
            raise UserError("name the networks to judge: .onnx files, runs' folders, .safetensors, names or timm/NAME")
        for runtime in self.runtimes:
            if runtime not in (*ONNX_RUNTIMES, TORCH):
                raise unknown("runtime", runtime, (*ONNX_RUNTIMES, TORCH))
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise unknown("precision", precision, PRECISIONS)
        if self.split not in (None, *PARTS):
            raise unknown("--split", str(self.split), PARTS)
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}: give 1 or more images")
        if self.preprocess is not None and not self.tries:
            parse_preprocess(self.preprocess)
