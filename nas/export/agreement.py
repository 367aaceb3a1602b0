"""Whether a network's ONNX file answers as the network does in PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.export.graph import IMAGES, chooses_tokens
from nas.export.options import PLAIN, FileOptions, FilePrecision
from nas.units import counted

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


LIMITS: dict[FilePrecision, float] = {"fp32": 1e-4, "fp16": 3e-2, "int8": math.inf}
"""What rounding may change of a logit, as a share of the largest. fp32: measured 1e-6 and less. fp16: measured 7e-4 to
1.1e-2, with float16's sums too, 2 to 22 of its steps; a network beyond three times that does not bear it. int8 is
judged by its accuracy (`nas.evaluate.precision`)."""
ROUNDINGS, MOST = 4, 1e-3
"""In fp32 a network may differ by so many times what rounding changes in PyTorch itself, beside float64, and by this
share at most: of a network with random weights that was 5e-5, where the file differed by 1.3e-4 on a CPU of AMD."""
OTHER_TOKENS = 0.25
"""The share of images on which fp16 may pick other tokens."""
CHECKED = 8
"""Images of noise, at least."""
BATCH = 8
"""Of PyTorch, and the largest of a file that takes any."""
LEAST = 1e-30
"""Probabilities and largest logits below are compared as this."""
SMALLEST = 1e-2
"""The largest logit at least, of a file of probabilities: around 1 they cannot tell smaller logits apart to 1e-5."""
NUDGES = (-7, -5, -3, -1, 1, 3, 5, 7)
"""Millionths of the pixels."""


@dataclass(frozen=True)
class Agreement:
    """How nearly ONNX Runtime and PyTorch agree; `str` gives it as a sentence."""

    difference: float
    """The largest of all logits and compared images, as a share of the largest logit."""
    real: int
    """Photographs or images of the data among the compared ones, 0 or more."""
    made: int
    """Images of noise among them."""
    left_out: int
    """Images on which they differ by more, because rounding keeps other tokens, or in fp16 may."""
    others: float
    """The largest difference on those, as `difference`."""
    changed: int
    """Real images, left out or not, whose most probable class is another one."""
    total: int
    """Real images, left out or not."""
    source: str
    """What the real images are, in words."""

    def __str__(self) -> str:
        verb = "agree to" if self.difference <= LIMITS["fp16"] else "differ by up to"
        text = (
            f"ONNX Runtime and PyTorch {verb} {self.difference:.0e} of the largest logit on "
            f"{self.real} {self.source} and {counted(self.made, 'image')} of noise"
        )
        if self.left_out:
            text += f", to {self.others:.0e} on {self.left_out} more, where rounding may keep other tokens"
        return f"{text}; top-1 changed on {self.changed} of {self.total}"


def agreement(
    model: nn.Module,
    path: Path,
    resolution: int,
    options: FileOptions = PLAIN,
    images: np.ndarray | None = None,
    pixels: Pixels = IMAGENET,
) -> Agreement:
    """Compare a file with its network, on real images and on noise (see `check_images`).

    Near a tie between tokens rounding decides which is kept: an image on which PyTorch disagrees with itself after a
    change of a few millionths of the pixels is left out, and counted. In fp16 it is any image on which a network that
    chooses tokens differs by more than the limit, up to a share of `OTHER_TOKENS`.

    Args:
        model: in eval mode: (B, 3, R, R) with R = `resolution` -> (B, classes) logits.
        options: as the file was written.
        images: real ones, as the network takes them, float32 (N, 3, R', R'); None: photographs.
        pixels: how they were made from bytes, and how the file does it with `options.in_graph`.

    Raises:
        UserError: they disagree by more than `LIMITS`, values are not finite, or too many images are left out.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from nas.export.pictures import from_bytes, photographs, to_bytes

    real = torch.from_numpy(photographs(resolution, pixels) if images is None else images)
    real = F.interpolate(real, (resolution, resolution), mode="bilinear", antialias=True)
    given = fed = torch.cat((real, check_images(resolution, options.batch_size or 1)))
    if options.in_graph:
        fed = torch.from_numpy(to_bytes(given.numpy(), pixels))
        given = torch.from_numpy(from_bytes(fed.numpy(), pixels))
    limit, half = LIMITS[options.precision], options.precision == "fp16"
    wanted, found = logits_of(model, given), onnx_logits(path, fed, options.batch_size)
    for name, values in (("PyTorch", wanted), ("ONNX Runtime", found)):
        broken = int((~np.isfinite(values)).any(1).sum())
        if broken:
            raise UserError(
                f"the network's logits in {name} are NaN or infinite on {broken} of {len(values)} images: "
                "it needs other weights"
            )
    if half and (beyond := beyond_half(path, fed.numpy(), options.batch_size)):
        raise UserError(f"{beyond_half_line(beyond)}: leave out --precision fp16")
    largest = max(abs(wanted).max(), SMALLEST if options.probabilities else LEAST)
    told = np.full(len(given), True)
    errors = _errors(found, wanted, options.probabilities) / largest
    off = np.flatnonzero(errors > limit)
    if len(off) and options.precision == "fp32":
        exact = logits_of(copy.deepcopy(model).double(), given.double())
        limit = max(limit, min(ROUNDINGS * abs(exact - wanted).max() / largest, MOST))
        off = np.flatnonzero(errors > limit)
    if half:
        told[off] = not chooses_tokens(path)
    else:
        for i in off:
            nudged = torch.cat([given[i : i + 1] * (1 + step * 1e-6) for step in NUDGES])
            told[i] = abs(logits_of(model, nudged) - wanted[i]).max() / largest <= limit
    if errors[told].max(initial=0) > limit:
        remedy = f"; fp16 may change {limit:.0%} of it: leave out --precision fp16" * half
        raise UserError(
            f"the exported network disagrees with PyTorch by {errors[told].max():.1e} of its largest logit{remedy}"
        )
    if half and (~told).mean() > OTHER_TOKENS:
        raise UserError(
            f"in fp16 a logit differs by more than {limit:.0%} of the largest on {(~told).sum()} of {len(told)} "
            "images, where other tokens may be kept: leave out --precision fp16"
        )
    if not told.any():
        raise UserError("float32 is too coarse for this network: its logits change with the last digits of the pixels")
    changed = found.argmax(1) != wanted.argmax(1)
    return Agreement(
        difference=float(errors[told].max()),
        real=int(told[: len(real)].sum()),
        made=int(told[len(real) :].sum()),
        left_out=int((~told).sum()),
        others=float(errors[~told].max(initial=0)),
        changed=int(changed[: len(real)].sum()),
        total=len(real),
        source="photographs" if images is None else "images of the data",
    )


def check_images(resolution: int, batch_size: int) -> Tensor:
    """Whole batches, at least 8 images (N, 3, R, R): in turn noise, one colour, one blurred between bars."""
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
    return torch.stack((noise, colour, boxed), 1).flatten(0, 1)[:count]


def logits_of(model: nn.Module, pixels: Tensor, batch_size: int = BATCH) -> np.ndarray:
    """PyTorch's logits (N, classes), batch by batch."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(batch) for batch in pixels.split(batch_size)]).numpy()


def onnx_logits(path: Path, pixels: Tensor, batch_size: int | None) -> np.ndarray:
    """ONNX Runtime's logits or probabilities (N, classes), in the file's batches; of a file that takes any (None) in
    batches of several sizes."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = _batches(pixels.numpy(), batch_size)
    return np.concatenate([session.run(None, {IMAGES: fed})[0][:count] for fed, count in batches])


def beyond_half(path: Path, pixels: np.ndarray, batch_size: int | None) -> list[str]:
    """Names of what becomes infinite in an fp16 file. Its logits do not show it: on a CPU ONNX Runtime computes in
    float32, and leaves out the way by float16 where it can.

    Args:
        pixels: images (N, ...) as its only input takes them.
        batch_size: of the file; None: any.
    """
    import numpy as np
    import onnx
    import onnxruntime

    model = onnx.load(path)
    within = [
        value
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    ]
    model.graph.output.extend(within)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names, (image,) = [value.name for value in within], session.get_inputs()
    found = dict[str, None]()
    for fed, _ in _batches(pixels, batch_size):
        values = session.run(names, {image.name: fed})
        found |= {name: None for name, value in zip(names, values, strict=True) if not np.isfinite(value).all()}
    return [name for name in names if name in found]


def beyond_half_line(beyond: list[str]) -> str:
    """What is wrong where `beyond_half` found some; "" where it did not."""
    if not beyond:
        return ""
    return f"float16 ends at 65,504, and {counted(len(beyond), 'value')} of this network pass it, the first {beyond[0]}"


def _batches(pixels: np.ndarray, batch_size: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """What a file is fed, and how many of the images of each batch are not repeated ones."""
    import numpy as np

    start = 0
    for size in _sizes(len(pixels), batch_size):
        batch = pixels[start : start + size]
        start += size
        lacking = 0 if batch_size is None else batch_size - size
        yield np.concatenate((batch, np.repeat(batch[-1:], lacking, 0))), size


def _sizes(count: int, batch_size: int | None) -> Iterator[int]:
    """What `count` images are split into."""
    sizes = [batch_size] if batch_size else [1, 3, BATCH]
    while count:
        size = min(count, sizes.pop(0) if len(sizes) > 1 else sizes[0])
        count -= size
        yield size


def _errors(found: np.ndarray, wanted: np.ndarray, probabilities: bool) -> np.ndarray:
    """The largest difference of each image's logits (N,); of probabilities, that of their logarithms, which are logits
    but for a number that all share."""
    import numpy as np

    if probabilities:
        shifted = wanted - wanted.max(1, keepdims=True)
        wanted = np.maximum(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), math.log(LEAST))
        found = np.log(np.maximum(found, LEAST))
    errors: np.ndarray = abs(found - wanted).max(1)
    return errors
