"""A user's ONNX file: its input, and whether all of it is there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserError
from nas.export.options import FilePrecision
from nas.measure.runtimes.pytorch import DTYPES
from nas.units import counted, shown

if TYPE_CHECKING:
    from onnx import ModelProto

Shape = tuple[int, ...]
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class OnnxInput:
    """The only input of an ONNX file.

    kind: NumPy's name of its type. sizes: of its dimensions, the batch first; None where they are dynamic, and for all
    of them where the file does not even say how many there are. quantised: whether the file is int8 already. half:
    whether it has weights of float16. opset: of ONNX's own operators.
    """

    path: Path
    name: str
    kind: str
    sizes: tuple[int | None, ...] | None
    quantised: bool = False
    half: bool = False
    opset: int = 0

    @classmethod
    def read(cls, path: Path) -> OnnxInput:
        """Raises UserError where the file cannot be read or is damaged, or has other than one input of numbers."""
        import onnx

        model = read_model(path)
        graph = model.graph
        constants = {each.name for each in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
        found = [cls._of(path, value) for value in graph.input if value.name not in constants]
        if not graph.node or not found or not graph.output:
            held = ", ".join(
                counted(len(each), noun)
                for each, noun in ((graph.node, "node"), (found, "input"), (graph.output, "output"))
            )
            raise UserError(f"{path} holds no network: {held}")
        if len(found) > 1 or found[0].kind not in DTYPES or found[0].sizes == ():
            listed = ", ".join(f"{each.name} ({each.kind} {each})" for each in found)
            raise UserError(f"{path}: only networks of one input ({', '.join(DTYPES)}) are measured; its are {listed}")
        if not isinstance(found[0].name, str):  # protobuf gives bytes that are no text as they are
            raise UserError(f"{path} is damaged: the name of its input is no text; export it again")
        inside = [each.t for node in graph.node for each in node.attribute if each.HasField("t")]
        for tensor in (*graph.initializer, *inside):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _check_external(path, {each.key: each.value for each in tensor.external_data})
        quantised = any(node.op_type == "DequantizeLinear" for node in graph.node)
        half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
        opset = max((each.version for each in model.opset_import if not each.domain), default=0)
        return replace(found[0], quantised=quantised, half=half, opset=opset)

    @classmethod
    def _of(cls, path: Path, value: Any) -> OnnxInput:
        import onnx

        what = value.type.WhichOneof("value")
        if what != "tensor_type":
            return cls(path, value.name, (what or "unknown").removesuffix("_type").replace("_", " "), None)
        tensor = value.type.tensor_type
        kinds = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
        kind = kinds.get(tensor.elem_type, f"type {tensor.elem_type}")
        kind = {"float": "float32", "double": "float64"}.get(kind, kind)
        if not tensor.HasField("shape"):
            return cls(path, value.name, kind, None)
        return cls(
            path, value.name, kind, tuple(each.dim_value if each.dim_value > 0 else None for each in tensor.shape.dim)
        )

    @property
    def precision(self) -> FilePrecision:
        """Of the file."""
        return "int8" if self.quantised else "fp16" if self.half else "fp32"

    def __str__(self) -> str:
        return "of any shape" if self.sizes is None else written(self.sizes) or "without dimensions"

    @property
    def batch_size(self) -> int | None:
        """None where it is dynamic."""
        return self.sizes[0] if self.sizes else None

    @property
    def places(self) -> tuple[int, int] | None:
        """Which dimensions are the height and the width; None where it is no image."""
        if self.sizes is None:
            return 2, 3
        if len(self.sizes) != 4:
            return None
        return (1, 2) if self.sizes[3] in CHANNELS and self.sizes[1] not in CHANNELS else (2, 3)

    def sides(self, shape: Shape) -> tuple[int, int] | None:
        """Height and width of an image of this shape; None where it is none."""
        return (shape[self.places[0]], shape[self.places[1]]) if self.places and len(shape) == 4 else None


def read_model(path: Path) -> ModelProto:
    """An ONNX file without weights that lie beside it.

    Raises:
        UserError: it is none, or cannot be read.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception:  # protobuf's own kinds
        raise UserError(f"{path} is {_no_onnx(path)}") from None
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: fetch or export it again")
    return model


def fix_shape(source: Path, name: str, shape: Sequence[int], path: Path) -> None:
    """Write an ONNX file whose input `name` has this static shape as `path`."""
    import onnx
    from onnxruntime.tools.onnx_model_utils import make_input_shape_fixed

    model = onnx.load(source)
    tensor = next(each for each in model.graph.input if each.name == name).type.tensor_type
    if not tensor.HasField("shape"):
        tensor.shape.CopyFrom(onnx.TensorShapeProto(dim=[onnx.TensorShapeProto.Dimension() for _ in shape]))
    make_input_shape_fixed(model.graph, name, shape)
    onnx.save(model, path)


def _no_onnx(path: Path) -> str:
    """What a file is that cannot be read."""
    with path.open("rb") as file:
        begin = file.read(64).lstrip()
    if begin.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file: `git lfs pull` fetches it"
    if begin.lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not an ONNX file: fetch it again"
    return "no ONNX file, or a damaged one: fetch or export it again"


def _check_external(path: Path, entry: Mapping[str, str]) -> None:
    """Raises UserError where the weights that an ONNX file keeps in another one are not all there."""
    location = entry.get("location")
    try:
        offset, length = (int(entry.get(key, 0)) for key in ("offset", "length"))
    except ValueError:
        offset = length = -1
    if not location or not isinstance(location, str) or offset < 0 or length < 0:  # bytes where it is no text
        raise UserError(
            f"{path} is damaged: where its weights are in another file cannot be read; fetch or export it again"
        )
    if os.path.isabs(location) or ".." in Path(os.path.normpath(location)).parts:
        raise UserError(
            f"{path}: its weights are in {shown(location)}, outside of its folder, where no runtime reads them: put "
            "them beside the file, and save it with their new place"
        )
    data, needed = path.parent / location, offset + length
    try:
        there = data.is_file()
    except OSError as error:
        raise UserError(f"{path}: the file of its weights cannot be read: {error.strerror}") from None
    if not there:
        raise UserError(f"{path}: its weights are in {shown(str(data))}, which is not there: put it beside the file")
    held = data.stat().st_size
    if held < needed:
        raise UserError(f"{path}: {shown(str(data))} is cut off, {held:,} of {needed:,} bytes: fetch it again")


def written(sizes: Iterable[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in sizes)
