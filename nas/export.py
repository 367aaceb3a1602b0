"""A network as ONNX, and the process that exports candidates so that a search survives what goes wrong there."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from search_spaces import Arch

OPSET = 17


def to_onnx(folded: nn.Module, path: Path, resolution: int, batch_size: int) -> None:
    """Write a folded model as ONNX with the static input "images" (batch_size, 3, R, R) and output "logits".

    The TorchScript exporter is used: for these models it is 5 to 10 times faster than the dynamo one.

    Raises:
        RuntimeError: the graph cannot be exported.
    """
    import logging

    import torch

    images = torch.zeros(batch_size, 3, resolution, resolution)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            folded,
            (images,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=False,
        )


def label_onnx(path: Path, arch: Arch, trained: bool) -> None:
    """Store the Arch, and whether the weights are trained, in the file's metadata.

    Raises:
        ValueError: the labelled file would pass 2 GB, protobuf's limit.
    """
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"vitnas.arch": arch.to_json(), "vitnas.weights": "trained" if trained else "untrained"})
    model.producer_name = "vitnas"
    onnx.save(model, path)


def _export(arch: str, path: str, batch_size: int) -> dict[str, Any]:
    from search_spaces import Arch, create_model, fold

    document = Arch.from_json(arch)
    start = time.perf_counter()
    folded = fold(create_model(document))
    built = time.perf_counter()
    to_onnx(folded, Path(path), document.resolution, batch_size)
    return {"build_s": built - start, "export_s": time.perf_counter() - built}


def _warm() -> dict[str, Any]:
    """Import what exporting needs, so that the first candidate does not pay for it."""
    import onnx  # noqa: F401

    import search_spaces  # noqa: F401

    return {}


if __name__ == "__main__":
    from nas.process import serve

    serve({"export": _export, "warm": _warm})
