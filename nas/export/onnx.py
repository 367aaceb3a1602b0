"""Networks as ONNX: BatchNorm folded, static shapes, checked against PyTorch."""

from __future__ import annotations

import math
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.export.card import PREFIX, Card

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch


OPSET = 17


TOLERANCE = 1e-4


CHECKED = 8  # images, at least, on which the exported network must agree


NUDGES = (-7, -5, -3, -1, 1, 3, 5, 7)  # millionths of the pixels


def to_onnx(folded: nn.Module, path: Path, resolution: int, batch_size: int) -> None:
    """Write a folded model as ONNX with the static input "images" (batch_size, 3, R, R) and output "logits".

    The TorchScript exporter is used: for these models it is 5 to 10 times faster than the dynamo one.

    Raises:
        RuntimeError: the graph cannot be exported.
    """
    import logging

    import torch

    like = next(folded.parameters(), torch.zeros(()))
    images = like.new_zeros(batch_size, 3, resolution, resolution)
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


def write_onnx(network: Arch | TimmNetwork, path: Path, batch_size: int) -> None:
    """Write a network with random weights (see `nas.networks.build.build`), folded, as ONNX."""
    from nas.networks.build import build

    to_onnx(build(network), path, network.resolution, batch_size)


def label_onnx(path: Path, arch: Arch | TimmNetwork | None, trained: bool, card: Card) -> None:
    """Store a network's card, its document where it has one, and whether its weights are trained in the file's
    metadata.

    Raises:
        ValueError: the labelled file would pass 2 GB, protobuf's limit.
    """
    import onnx

    model = onnx.load(path)
    facts = {} if arch is None else {f"{PREFIX}arch": arch.to_json()}
    facts |= {f"{PREFIX}weights": "trained" if trained else "untrained"} | card.metadata()
    onnx.helper.set_model_props(model, facts)
    model.producer_name, model.producer_version = "vitnas", version("vitnas")
    onnx.save(model, path)


def agreement(model: nn.Module, path: Path, resolution: int, batch_size: int, images: np.ndarray | None = None) -> str:
    """How nearly ONNX Runtime and PyTorch agree, as a sentence: to 1e-4 of the largest logit, or a UserError.

    They see `check_images`. Near a tie between tokens rounding decides which is kept: an image on which PyTorch
    disagrees with itself after a change of a few millionths of the pixels is left out, and the sentence says so.

    model: in eval mode.

    Raises:
        UserError: they disagree, logits are not finite, or every image is left out.
    """
    import numpy as np
    import torch

    pixels = check_images(resolution, batch_size, images)
    wanted, found = logits_of(model, pixels, batch_size), onnx_logits(path, pixels, batch_size)
    for name, logits in (("PyTorch", wanted), ("ONNX Runtime", found)):
        broken = int((~np.isfinite(logits).all(1)).sum())
        if broken:
            raise UserError(
                f"the network's logits in {name} are NaN or infinite on {broken} of {len(logits)} images: "
                "it needs other weights"
            )
    largest = max(abs(wanted).max(), 1e-30)
    errors = abs(found - wanted).max(1) / largest
    told = np.full(len(errors), True)
    for i in np.flatnonzero(errors > TOLERANCE):
        nudged = torch.cat([pixels[i : i + 1] * (1 + step * 1e-6) for step in NUDGES])
        told[i] = abs(logits_of(model, nudged, batch_size) - wanted[i]).max() / largest <= TOLERANCE
    if errors[told].max(initial=0) > TOLERANCE:
        raise UserError(f"the exported network disagrees with PyTorch by {errors[told].max():.1e} of its largest logit")
    if not told.any():
        raise UserError("float32 is too coarse for this network: its logits change with the last digits of the pixels")
    text = f"ONNX Runtime and PyTorch agree to {errors[told].max():.0e} of the largest logit"
    return text if told.all() else f"{text} on {told.sum()} of {len(told)} images; on the others rounding picks tokens"


def check_images(resolution: int, batch_size: int, images: np.ndarray | None = None) -> Tensor:
    """Whole batches, at least 8 images (N, 3, R, R): in turn noise, one colour, one blurred between bars, one of
    `images`.
    """
    import torch
    import torch.nn.functional as F

    count, generator = math.ceil(CHECKED / batch_size) * batch_size, torch.Generator().manual_seed(0)
    each = math.ceil(count / 3)
    noise = torch.randn(each, 3, resolution, resolution, generator=generator)
    colour = torch.randn(each, 3, 1, 1, generator=generator).expand_as(noise)
    blurred = F.interpolate(torch.randn(each, 3, 5, 5, generator=generator), noise.shape[2:], mode="bilinear")
    boxed = colour.clone()
    rows = slice(resolution // 4, 3 * resolution // 4)
    boxed[:, :, rows] = blurred[:, :, rows]
    kinds = [noise, colour, boxed]
    if images is not None:
        given = F.interpolate(torch.from_numpy(images[:each]), noise.shape[2:], mode="bilinear", antialias=True)
        kinds.append(given.repeat(math.ceil(each / len(given)), 1, 1, 1)[:each])
    return torch.stack(kinds, 1).flatten(0, 1)[:count]


def logits_of(model: nn.Module, pixels: Tensor, batch_size: int) -> np.ndarray:
    """PyTorch's logits (N, classes), batch by batch."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(batch) for batch in pixels.split(batch_size)]).numpy()


def onnx_logits(path: Path, pixels: Tensor, batch_size: int) -> np.ndarray:
    """ONNX Runtime's logits (N, classes), in the file's batches."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": batch.numpy()})[0] for batch in pixels.split(batch_size)])
