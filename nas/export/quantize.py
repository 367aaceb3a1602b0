"""Post-training int8: a float32 ONNX network with its weights and activations quantised.

Static QDQ quantisation of convolutions and matrix products, weights per channel, activations per tensor (Jacob et al.,
CVPR 2018), by ONNX Runtime's tool or by NNCF, as a `Recipe` says. The files are right on every CPU, whichever tool
made them: weights that are added up over channels have 7 bits, since CPUs without VNNI add products of 8 bits in 16 and
saturate; activations are unsigned with an offset, since OpenVINO's kernels for signed ones are wrong on CPUs without
AMX (cosine similarity of the logits to the file's own arithmetic 0.957 with VNNI, 0.980 with AVX2, of NNCF's own files
0.92 with either; so 0.999 or more). NNCF's signed ones become unsigned by moving their offset by 128, which changes no
value; its activations per channel, which ONNX Runtime refuses then, are not used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from nas.errors import UserError
from nas.files import drafted, scratch
from nas.units import counted, listed

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto

    from nas.data.dataset import ImageData

Tool = Literal["onnxruntime", "nncf"]
Ranges = Literal["min-max", "percentile", "entropy", "mse"]
Part = Literal["first", "last", "attention"]

MAX_DROP = 1.0
"""Points of top-1 that a lower precision may cost."""
IMAGES = 16  # calibrated on; enough for ranges
LEAST = 8  # of those, where images are given
NOISE = "int8 is calibrated on noise, without --data: latency is real, accuracy is not"
LISTED = 8
"""Of what is left in float, layers and kinds that are named in a line."""
OPERATORS = ("Conv", "MatMul", "Gemm")
INSTALL = "pip install 'vitnas[int8]'"
_NAMES = {"onnxruntime": "ONNX Runtime", "nncf": "NNCF"}
_PARTS = {"first": "the first layer", "last": "the last layer", "attention": "attention's products"}


@dataclass(frozen=True)
class Recipe:
    """How a network is quantised. The default is what vitnas writes where no held-out images choose."""

    tool: Tool = "onnxruntime"
    ranges: Ranges = "min-max"
    """Of activations: the smallest and largest values seen; all but the outermost 0.001%; those that keep most
    information (entropy) or that round with the least squared error (mse, of NNCF)."""
    kept: tuple[Part, ...] = ()
    """What is left in float32."""
    smooth: bool = False
    """Whether NNCF moves large activations into the weights first, and takes the network for a transformer
    (SmoothQuant, Xiao et al., ICML 2023)."""
    images: int = IMAGES
    """That it is calibrated on, 1 or more."""

    def __post_init__(self) -> None:
        if (self.tool == "onnxruntime" and (self.smooth or self.ranges == "mse")) or (
            self.tool == "nncf" and self.ranges in ("percentile", "entropy")
        ):
            raise ValueError(f"{self.tool} does not have this: {self}")

    def __str__(self) -> str:
        smooth = ", SmoothQuant" if self.smooth else ""
        kept = f", {listed([_PARTS[part] for part in self.kept])} in float" if self.kept else ""
        return f"{_NAMES[self.tool]}, {self.ranges} of {counted(self.images, 'image')}{smooth}{kept}"

    @property
    def installed(self) -> bool:
        return self.tool == "onnxruntime" or importlib.util.find_spec("nncf") is not None


def quantize(path: Path, calibration: np.ndarray | None = None, recipe: Recipe | None = None) -> None:
    """Turn a float32 ONNX file with one input (B, 3, R, R), B static or any, into int8, in place; its input stays
    float32.

    calibration: float32 images (N, 3, R', R'), resized to R; fixed noise where there are none. recipe: None: the
    default one.

    Raises:
        UserError: the recipe's tool is not installed.
        RuntimeError, ValueError: the tool fails on this network.
    """
    import onnx

    recipe = recipe or Recipe()
    if not recipe.installed:
        raise UserError(f"nncf is not installed: {INSTALL}")
    with scratch(path.parent) as folder, drafted(path) as done:
        original = onnx.load(path, load_external_data=False)
        image = _Input.of(original)
        images = batches((image.shape[0] or 1, *image.shape[1:]), calibration, image.kind, recipe.images)
        quantizer = _by_onnxruntime if recipe.tool == "onnxruntime" else _by_nncf
        made = quantizer(path, folder, image.name, images, recipe)
        made.producer_name, made.producer_version = original.producer_name, original.producer_version
        onnx.helper.set_model_props(made, {prop.key: prop.value for prop in original.metadata_props})
        onnx.save(made, done)


def calibration_images(data: ImageData, resolution: int, count: int = IMAGES) -> tuple[np.ndarray, str | None]:
    """Float32 images (count or fewer, 3, R, R) of the data, and a line about those that could not be decoded.

    Raises:
        UserError: there are fewer than LEAST.
    """
    import numpy as np

    from nas.data.batches import loader, skipped_line
    from nas.data.images import sample

    found = loader(sample(data.at(resolution).calibration, count, 0), IMAGES, False, 0)
    images = np.concatenate([batch.numpy() for batch, _ in found])
    check_calibration(len(images))
    return images, skipped_line([found])


def check_calibration(count: int) -> None:
    """Raises UserError where images are too few to find the ranges of activations by."""
    if count < LEAST:
        raise UserError(f"int8 is calibrated on {counted(count, 'training image')}: give {LEAST} or more")


def batches(
    shape: tuple[int, ...], calibration: np.ndarray | None, kind: str = "float32", count: int = IMAGES
) -> list[np.ndarray]:
    """`count` images or a few more, as whole batches of `shape` (B, 3, R, R): the first of `calibration`, or noise.

    Of too few images there are IMAGES at most, some of them repeated.
    """
    import numpy as np

    from nas.measure.runtimes.pytorch import fixed_images

    if calibration is None:
        count = math.ceil(count / shape[0])
        images = fixed_images((count * shape[0], *shape[1:]), kind)
    else:
        count = math.ceil(min(count, max(IMAGES, len(calibration))) / shape[0])
        images = _resized(calibration[: count * shape[0]], shape[2:]).astype(kind)
    return list(np.resize(images, (count, *shape)))


def left_in_float(model: ModelProto) -> tuple[str, ...]:
    """What an int8 file computes in float: each convolution and matrix product by the name of its layer, and the
    normalisations, softmaxes and activation functions by their kind and number."""
    producers = {name: node for node in model.graph.node for name in node.output}
    layers: list[str] = []
    kinds: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in OPERATORS:
            if not all(_dequantised(name, producers) for name in node.input[:2]):
                layers.append(node.name or node.output[0])
        elif node.op_type in _FLOAT:
            kinds[_FLOAT[node.op_type]] = kinds.get(_FLOAT[node.op_type], 0) + 1
    return (*layers, *(f"{number} x {kind}" for kind, number in kinds.items()))


_FLOAT = {
    "LayerNormalization": "LayerNorm",
    "BatchNormalization": "BatchNorm",
    "Softmax": "softmax",
    "Erf": "GELU",
    "Gelu": "GELU",
    "HardSwish": "hard-swish",
    "HardSigmoid": "hard-swish",
    "Sigmoid": "sigmoid",
}
_MOVES = ("Transpose", "Reshape", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Identity")
"""Operators that a runtime computes on bytes as on floats."""


def _dequantised(name: str, producers: dict[str, NodeProto]) -> bool:
    node = producers.get(name)
    while node is not None and node.op_type in _MOVES:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def check_max_drop(points: float, judges: bool = True) -> None:
    """Check --max-drop. judges: whether there is a lower precision, and images to judge it by.

    Raises:
        UserError: it is no number of points, or there is nothing to judge.
    """
    if not 0 <= points <= 100:
        raise UserError(f"--max-drop is {points:g}: give 0 to 100 points of top-1")
    if points != MAX_DROP and not judges:
        raise UserError(
            "--max-drop is for int8, fp16 or bf16 that images judge: add --precision and --data, or leave it out"
        )


class _Input(NamedTuple):
    """shape: with 0 for a dynamic size."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, model: ModelProto) -> _Input:
        import onnx

        constants = {each.name for each in model.graph.initializer}
        (image,) = [each for each in model.graph.input if each.name not in constants]
        shape = tuple(dim.dim_value for dim in image.type.tensor_type.shape.dim)
        return cls(image.name, shape, onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type).name)


def _by_onnxruntime(path: Path, folder: Path, name: str, images: Iterable[np.ndarray], recipe: Recipe) -> ModelProto:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, made = folder / "prepared.onnx", folder / "made.onnx"
    methods = {
        "min-max": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    with _quiet():
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            made,
            _Batches(name, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            nodes_to_exclude=kept_layers(onnx.load(prepared), recipe.kept),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            calibrate_method=methods[recipe.ranges],
        )
    return onnx.load(made)


def _by_nncf(path: Path, folder: Path, name: str, images: Iterable[np.ndarray], recipe: Recipe) -> ModelProto:
    import onnx

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # about a CUDA that is not there
    import nncf
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization.advanced_parameters import OverflowFix, QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    feeds = [{name: batch} for batch in images]
    model = onnx.load(path)
    ranges = RangeEstimatorParametersSet.HISTOGRAM if recipe.ranges == "mse" else RangeEstimatorParametersSet.MINMAX
    with _quiet():
        found: ModelProto = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            subset_size=len(feeds),
            model_type=nncf.ModelType.TRANSFORMER if recipe.smooth else None,
            ignored_scope=nncf.IgnoredScope(names=kept_layers(model, recipe.kept)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE,
                activations_quantization_params=QuantizationParameters(
                    mode=QuantizationScheme.ASYMMETRIC, per_channel=False
                ),
                activations_range_estimator_params=ranges,
            ),
        )
    _unsign(found)
    return found


def _unsign(model: ModelProto) -> None:
    """Make signed activations unsigned, in place, with the same values."""
    import numpy as np
    import onnx

    constants = {each.name: each for each in model.graph.initializer}
    offsets = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for name in offsets:
        offset = onnx.numpy_helper.to_array(constants[name])
        if offset.dtype == np.int8:
            moved = (offset.astype(np.int16) + 128).astype(np.uint8)
            constants[name].CopyFrom(onnx.numpy_helper.from_array(moved, name))
    del model.graph.value_info[:]  # they say int8


def kept_layers(model: ModelProto, parts: Iterable[Part]) -> list[str]:
    """Names of the convolutions and matrix products of a float network that are these parts of it."""
    constants = {each.name for each in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in OPERATORS]
    found = {
        "first": layers[:1],
        "last": layers[-1:],
        "attention": [node for node in layers if not constants.intersection(node.input)],
    }
    return list(dict.fromkeys(node.name for part in parts for node in found[part]))


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both tools print how far they are."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
