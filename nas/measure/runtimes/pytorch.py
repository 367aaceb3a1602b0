"""A network as a PyTorch module: what PyTorch's runtimes load, and what ONNX files are exported from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.networks.build import build, from_document

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from nas.measure.runtime import Infer, Settings


DTYPES = ("float32", "float16", "float64", "uint8", "int8")
"""The types of inputs that are measured; whole numbers of more bytes are indices as a rule, and not drawn here."""


def configure(settings: Settings) -> None:
    """PyTorch's threads and precision in this process."""
    import torch

    torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    torch.backends.cudnn.benchmark = True  # static shapes: let cuDNN time its algorithms once


def place(path: Path, settings: Settings) -> tuple[nn.Module, torch.Tensor]:
    """The module of a document, and images for it, on the device and in the precision of the settings."""
    import torch

    configure(settings)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(settings.precision, torch.float32)
    network = from_document(path.read_text())
    images = torch.from_numpy(fixed_images((settings.batch_size, 3, network.resolution, network.resolution)))
    return build(network).to(settings.device, dtype), images.to(settings.device, dtype)


def inference(module: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], device: str) -> Infer:
    """One forward pass, done when it returns."""
    import torch

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        found: torch.Tensor = module(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return infer


def fixed_images(shape: tuple[int, ...], kind: str = "float32") -> np.ndarray[Any, Any]:
    """Noise, the same each time: what every runtime is fed. kind: one of DTYPES; of whole numbers, all values."""
    import numpy as np

    generator = np.random.default_rng(0)
    if kind in ("uint8", "int8"):
        limits = np.iinfo(kind)
        return generator.integers(limits.min, limits.max, shape, kind, endpoint=True)
    return generator.standard_normal(shape, dtype=np.float32).astype(kind, copy=False)
