"""A network as a PyTorch module: what PyTorch's runtimes load, and what ONNX files are exported from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nas.measure.runtime import Infer, Settings
    from nas.targets import TimmNetwork
    from search_spaces import Arch


KINDS = ("float32", "float16", "float64", "uint8", "int8")
"""The types of inputs that are measured; whole numbers of more bytes are indices as a rule, and not drawn here."""


def to_document(network: Arch | TimmNetwork) -> str:
    """The JSON of a network: an arch.json, or {"timm": NAME, "resolution": pixels}."""
    from search_spaces import Arch

    if isinstance(network, Arch):
        return network.to_json()
    return json.dumps({"timm": network.name, "resolution": network.resolution})


def from_document(text: str) -> Arch | TimmNetwork:
    """The inverse of `to_document`; raises ArchError where it is neither."""
    from nas.targets import TimmNetwork
    from search_spaces import Arch

    document = json.loads(text)
    if "timm" in document:
        return TimmNetwork(document["timm"], document["resolution"])
    return Arch.from_json(text)


def build(network: Arch | TimmNetwork) -> nn.Module:
    """The network for inference, BatchNorm folded (timm's as far as timm can), with the same random weights always."""
    import torch

    from search_spaces import Arch, fold
    from search_spaces.registry import FAMILIES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = isinstance(network, Arch)
        model = fold(FAMILIES[network.family].build(network)) if ours else create_timm(network)
        randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    """Weights of variance 1 / fan-in and small biases, for a folded network.

    The usual initial values are no use here: folded, they let the signal die out, so that the logits hardly depend on
    the image, there is nothing to calibrate int8 with, and zeros (last gammas of residual branches) can be quicker to
    multiply than what a trained network has. These keep it at the size of the image, within float16.
    """
    for name, value in model.named_parameters():
        if value.ndim > 1:
            bound = (3 / value[0].numel()) ** 0.5
            value.data.uniform_(-bound, bound)
        elif name.endswith("bias"):
            value.data.uniform_(-0.05, 0.05)


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


def inference(module: nn.Module, inputs: Sequence[torch.Tensor], device: str) -> Infer:
    """One forward pass, done when it returns."""
    import torch

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        found = module(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return infer


def fixed_images(shape: tuple[int, ...], kind: str = "float32"):
    """Noise, the same each time: what every runtime is fed. kind: one of KINDS; of whole numbers, all values."""
    import numpy as np

    generator = np.random.default_rng(0)
    if kind in ("uint8", "int8"):
        limits = np.iinfo(kind)
        return generator.integers(limits.min, limits.max, shape, kind, endpoint=True)
    return generator.standard_normal(shape, dtype=np.float32).astype(kind, copy=False)


def create_timm(network: TimmNetwork) -> nn.Module:
    """timm's network for inference, at its resolution, with timm's random weights.

    Raises:
        Exception: any kind, where it cannot be built at that resolution; some raise only when they run.
    """
    import timm
    from timm.utils.model import reparameterize_model

    config = timm.get_pretrained_cfg(network.name)
    resized = config.fixed_input_size and config.input_size[-1] != network.resolution
    model = timm.create_model(network.name, **({"img_size": network.resolution} if resized else {}))
    return reparameterize_model(model.eval().requires_grad_(False), inplace=True)
