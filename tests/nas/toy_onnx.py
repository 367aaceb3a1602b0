"""Small ONNX files of every kind that a user may have, and images of every mode that Pillow reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from nas.data.pixels import IMAGENET, Pixels
from nas.export.card import Card, Preprocess

KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
}
CLASSES = ("cat", "dog", "élan")
CLASS_COUNT = len(CLASSES)


def write_toy(
    path: Path,
    shape: tuple[int | str, ...] = (1, 3, 16, 16),
    kind: str = "float32",
    *,
    card: Card | None = None,
    softmax: bool = False,
    inputs: int = 1,
    outputs: int = 1,
    scale: float = 1.0,
    squeeze: bool = True,
    external: bool = False,
    half: bool = False,
    classes: int = CLASS_COUNT,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A classifier: the mean of each of 4 x 4 parts of an image, and a matrix. Channels are last where
    `shape` says so. A string in `shape` is a dynamic size.

    squeeze: False: it answers (N, 3, 1, 1). half: weights of float16. external: weights in a file of their own.
    """
    rng = np.random.default_rng(0)
    last = len(shape) == 4 and shape[3] == 3
    weights = rng.standard_normal((48, classes)).astype(np.float16 if half else np.float32) * scale
    kept = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [helper.make_node("Cast", ["images"], ["cast"], to=kept)]
    if kind == "uint8":
        nodes.append(helper.make_node("Mul", ["cast", "step"], ["scaled"]))
        nodes.append(helper.make_node("Identity", ["scaled"], ["numbers"]))
    else:
        nodes.append(helper.make_node("Identity", ["cast"], ["numbers"]))
    if len(shape) == 3:
        nodes.append(helper.make_node("Unsqueeze", ["numbers", "axis"], ["batched"]))
    elif last:
        nodes.append(helper.make_node("Transpose", ["numbers"], ["batched"], perm=[0, 3, 1, 2]))
    else:
        nodes.append(helper.make_node("Identity", ["numbers"], ["batched"]))
    side = shape[1] if last else shape[-1]
    if isinstance(side, int) and side in (shape[-2], shape[2]):
        nodes.append(
            helper.make_node(
                "AveragePool", ["batched"], ["parts"], kernel_shape=[side // 4] * 2, strides=[side // 4] * 2
            )
        )
    else:
        nodes.append(helper.make_node("GlobalAveragePool", ["batched"], ["parts"]))
        weights = weights[:3]
    nodes.append(helper.make_node("Flatten", ["parts"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "weights"], ["product"]))
    nodes.append(helper.make_node("Softmax" if softmax else "Identity", ["product"], ["answer"]))
    nodes.append(helper.make_node("Cast", ["answer"], ["wide"], to=TensorProto.FLOAT))
    nodes.append(
        helper.make_node("Identity" if squeeze else "Reshape", ["wide"] if squeeze else ["wide", "four"], ["logits"])
    )
    batch = shape[0] if len(shape) == 4 else 1
    answers = [("logits", [batch, classes] if squeeze else [batch, classes, 1, 1])]
    for i in range(1, outputs):
        nodes.append(helper.make_node("Identity", ["product"], [f"more{i}"]))
        answers.append((f"more{i}", [batch, classes]))
    given = [helper.make_tensor_value_info("images", KINDS[kind], shape)]
    for i in range(1, inputs):
        given.append(helper.make_tensor_value_info(f"mask{i}", KINDS[kind], shape))
        nodes.append(helper.make_node("Identity", [f"mask{i}"], [f"unused{i}"]))
    graph = helper.make_graph(
        nodes,
        "toy",
        given,
        [
            helper.make_tensor_value_info(name, kept if name != "logits" else TensorProto.FLOAT, sizes)
            for name, sizes in answers
        ],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([0], np.int64), "axis"),
            numpy_helper.from_array(np.array([-1, classes, 1, 1], np.int64), "four"),
            numpy_helper.from_array(np.array(1 / 255, np.float16 if half else np.float32), "step"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {**(card.metadata() if card else {}), **(metadata or {})})
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def toy_card(size: int = 16, pixels: Pixels = IMAGENET, classes: tuple[str, ...] | None = CLASSES) -> Card:
    """As vitnas states it."""
    return Card(preprocess=Preprocess.own(size, pixels), classes=list(classes) if classes else None)


def flags(**values: bool) -> dict[str, str]:
    """Metadata of vitnas that are yes or no."""
    return {f"vitnas.{key}": json.dumps(value) for key, value in values.items()}


def odd_images(folder: Path) -> dict[str, Path]:
    """Real files by what is odd about them, of noise that is smooth enough for JPEG."""
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((53, 37), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(np.linspace(0, 255, 37 * 53, dtype=np.uint8).reshape(37, 53))
    clear = noise.copy()
    clear.putalpha(alpha)
    deep = np.asarray(noise.convert("L"), np.uint16) * 257
    palette = noise.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "plain": (noise, "jpg", {}),
        "turned": (noise, "jpg", {"exif": exif}),
        "turned png": (noise, "png", {"exif": exif}),
        "turned tiff": (noise, "tif", {"tiffinfo": exif}),
        "grey": (noise.convert("L"), "jpg", {}),
        "grey and alpha": (clear.convert("LA"), "png", {}),
        "bits": (noise.convert("1"), "png", {}),
        "palette": (palette, "png", {}),
        "palette, clear": (palette, "png", {"transparency": 3}),
        "alpha": (clear, "png", {}),
        "one colour clear": (clear.convert("RGB"), "png", {"transparency": noise.getpixel((20, 20))}),
        "16 bit": (Image.fromarray(deep), "png", {}),
        "cmyk": (noise.convert("CMYK"), "jpg", {}),
        "float": (Image.fromarray(np.asarray(noise.convert("L"), np.float32) / 255), "tif", {}),
        "tall": (noise.resize((11, 230)), "png", {}),
        "small": (noise.resize((5, 7)), "png", {}),
        "square": (noise.resize((18, 18)), "png", {}),
        "webp": (clear, "webp", {"lossless": True}),
        "gif": (noise, "gif", {}),
        "bmp": (noise, "bmp", {}),
    }
    paths = {}
    for i, (kind, (image, suffix, options)) in enumerate(made.items()):
        paths[kind] = folder / f"{i:02}-{kind.replace(' ', '-').replace(',', '')}.{suffix}"
        image.save(paths[kind], **options)
    return paths
