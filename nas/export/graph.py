"""Changes to the graph of an exported network: fp16, pixels that it normalises itself, and probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nas.export.options import FileOptions

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

    from nas.data.pixels import Pixels

IMAGES, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
CHOOSERS = ("TopK", "ArgMax")
SCORING = ("Add", "ArgMax", "Div", "Mul", "Pow", "ReduceL2", "ReduceMean", "ReduceSum", "Sub", "TopK")
"""What tokens are scored with: products and sums that lie between a layer and the choice."""


def to_half(path: Path, keep_io: bool = True) -> None:
    """Turn a float32 ONNX file into fp16, in place: weights and arithmetic; with `keep_io` not input and output.

    The scores by which tokens are chosen stay float32: float16 cannot hold what orders equal ones
    (`search_spaces.tokens.TIE`), and sums of squares leave its range.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(path)
    kept = _scoring_nodes(model.graph)
    half = convert_float_to_float16(model, keep_io_types=keep_io, node_block_list=kept)
    OnnxModel(half).topological_sort()
    onnx.save(half, path)


def chooses_tokens(path: Path) -> bool:
    """Whether a file's network works on some tokens only, which their scores choose."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return any(node.op_type in CHOOSERS for node in graph.node)


def _scoring_nodes(graph: GraphProto) -> list[str]:
    """Names of the nodes that score tokens, up to the choice; of those that have names."""
    makers = {name: node for node in graph.node for name in node.output}
    found: dict[str, NodeProto] = {}
    queue = [node for node in graph.node if node.op_type in CHOOSERS]
    while queue:
        node = queue.pop()
        if node.output[0] not in found and node.op_type in SCORING:
            found[node.output[0]] = node
            queue += [makers[name] for name in node.input if name in makers]
    return [node.name for node in found.values() if node.name]


def finish(path: Path, options: FileOptions, pixels: Pixels) -> None:
    """Give an ONNX file with the input `images`, float32 (B, 3, R, R), and the output `logits` (B, classes) the input
    and the output that `options` ask for, in place.

    pixels: what the file makes of bytes with `options.in_graph`.
    """
    import onnx

    if not (options.in_graph or options.probabilities):
        return
    model = onnx.load(path)
    if options.in_graph:
        _normalise(model.graph, pixels)
    if options.probabilities:
        _softmax(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _normalise(graph: GraphProto, pixels: Pixels) -> None:
    """Make the input uint8 (B, R, R, 3)."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    (given,) = graph.input
    batch, channels, height, width = given.type.tensor_type.shape.dim
    sizes = [each.dim_param or each.dim_value for each in (batch, height, width, channels)]
    mean, std = (np.array(each, np.float64).reshape(1, 3, 1, 1) for each in (pixels.mean, pixels.std))
    scale, shift = (f"{IMAGES}.scale", f"{IMAGES}.shift")
    for name, values in ((scale, 1 / (255 * std)), (shift, -mean / std)):
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    planes, floats, scaled, normalised = (f"{IMAGES}.{name}" for name in ("planes", "floats", "scaled", "normalised"))
    for node in graph.node:
        node.input[:] = [normalised if name == IMAGES else name for name in node.input]
    first = [
        helper.make_node("Transpose", [IMAGES], [planes], planes, perm=[0, 3, 1, 2]),
        helper.make_node("Cast", [planes], [floats], floats, to=TensorProto.FLOAT),
        helper.make_node("Mul", [floats, scale], [scaled], scaled),
        helper.make_node("Add", [scaled, shift], [normalised], normalised),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*first, *rest])
    given.CopyFrom(helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, sizes))


def _softmax(graph: GraphProto) -> None:
    """Make the output probabilities."""
    from onnx import helper

    (given,) = graph.output
    graph.node.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], PROBABILITIES, axis=1))
    given.name = PROBABILITIES
