"""Post-training int8: a float32 ONNX network with its weights and activations quantised.

Static QDQ quantisation by ONNX Runtime's tool of convolutions and matrix products, weights per channel, activation
ranges the smallest and largest values seen on the calibration images (Jacob et al., CVPR 2018). The files are right on
every CPU: weights have 7 bits, since CPUs without VNNI add products of 8 bits in 16 and saturate; activations are
unsigned with an offset, since OpenVINO's kernels for signed ones are wrong on CPUs without AMX (cosine similarity of
the logits to the file's own arithmetic 0.957 with VNNI, 0.980 with AVX2; so 0.999 or more).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nas.files import drafted, scratch

if TYPE_CHECKING:
    import numpy as np

    from nas.data.dataset import ImageData

IMAGES = 16  # calibrated on; enough for ranges
NOISE = "int8 is calibrated on noise, without --data: latency is real, accuracy is not"
OPERATORS = ("Conv", "MatMul", "Gemm")


def quantize(path: Path, calibration: np.ndarray | None = None) -> None:
    """Turn a float32 ONNX file with one static input (B, 3, R, R) into int8, in place; its input stays float32.

    calibration: float32 images (N, 3, R', R'), resized to R; fixed noise where there are none.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with scratch(path.parent) as folder, drafted(path) as done:
        prepared = folder / "prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        original = onnx.load(path, load_external_data=False)
        constants = {each.name for each in original.graph.initializer}
        (image,) = [each for each in original.graph.input if each.name not in constants]
        shape = tuple(dim.dim_value for dim in image.type.tensor_type.shape.dim)
        kind = onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type).name
        quantize_static(
            prepared,
            done,
            _Batches(image.name, batches(shape, calibration, kind)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        made = onnx.load(done)
        made.producer_name, made.producer_version = original.producer_name, original.producer_version
        onnx.helper.set_model_props(made, {prop.key: prop.value for prop in original.metadata_props})
        onnx.save(made, done)


def calibration_images(data: ImageData, resolution: int) -> tuple[np.ndarray, str | None]:
    """Float32 images (IMAGES, 3, R, R) of the data, and a line about those that could not be decoded."""
    import numpy as np

    from nas.data.batches import loader, skipped_line
    from nas.data.images import sample

    found = loader(sample(data.at(resolution).calibration, IMAGES, 0), IMAGES, False, 0)
    return np.concatenate([images.numpy() for images, _ in found]), skipped_line([found])


def batches(shape: tuple[int, ...], calibration: np.ndarray | None, kind: str = "float32") -> list[np.ndarray]:
    """At least IMAGES images as whole batches of `shape` (B, 3, R, R): the first of `calibration`, or noise.

    Too few images are repeated.
    """
    import numpy as np

    from nas.measure.runtimes.pytorch import fixed_images

    count = math.ceil(IMAGES / shape[0])
    if calibration is None:
        images = fixed_images((count * shape[0], *shape[1:]), kind)
    else:
        images = _resized(calibration[: count * shape[0]], shape[2:]).astype(kind)
    return list(np.resize(images, (count, *shape)))


def _resized(images: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if images.shape[2:] == size:
        return images
    import torch
    import torch.nn.functional as F

    return F.interpolate(torch.from_numpy(images), size, mode="bilinear", antialias=True).numpy()


class _Batches:
    """What ONNX Runtime's calibration reads from."""

    def __init__(self, name: str, images: Iterable[np.ndarray]) -> None:
        self._feeds = iter([{name: batch} for batch in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)
