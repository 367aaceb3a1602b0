"""A user's ONNX file: its input, and the static shape it is measured with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.errors import UserError
from nas.measure.runtimes.pytorch import DTYPES
from nas.units import counted

Shape = tuple[int, ...]


IMAGE = (1, 3, 224, 224)


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

        try:
            model = onnx.load(path, load_external_data=False)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except Exception:  # protobuf's own kinds
            raise UserError(f"{path} is {_no_onnx(path)}") from None
        graph = model.graph
        constants = {each.name for each in graph.initializer}
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
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _check_external(path, {each.key: each.value for each in tensor.external_data})
        quantised = any(node.op_type == "DequantizeLinear" for node in graph.node)
        half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
        opset = max((each.version for each in model.opset_import if not each.domain), default=0)
        return replace(found[0], quantised=quantised, half=half, opset=opset)

    @classmethod
    def _of(cls, path: Path, value: Any) -> OnnxInput:
        import onnx

        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        kind = {"float": "float32", "double": "float64"}.get(kind, kind)
        if not tensor.HasField("shape"):
            return cls(path, value.name, kind, None)
        return cls(
            path, value.name, kind, tuple(each.dim_value if each.dim_value > 0 else None for each in tensor.shape.dim)
        )

    def __str__(self) -> str:
        return "of any shape" if self.sizes is None else written(self.sizes) or "without dimensions"

    @property
    def batch_size(self) -> int | None:
        """None where it is dynamic."""
        return self.sizes[0] if self.sizes else None

    @property
    def _places(self) -> tuple[int, int] | None:
        """Which dimensions are the height and the width; None where it is no image."""
        if self.sizes is None:
            return 2, 3
        if len(self.sizes) != 4:
            return None
        return (1, 2) if self.sizes[3] in CHANNELS and self.sizes[1] not in CHANNELS else (2, 3)

    def sides(self, shape: Shape) -> tuple[int, int] | None:
        """Height and width of an image of this shape; None where it is none."""
        return (shape[self._places[0]], shape[self._places[1]]) if self._places and len(shape) == 4 else None

    def _image(self, resolution: int) -> Shape:
        """The shape of a square image of this size; 1 where the batch is dynamic.

        Raises:
            UserError: the input is no image, or is fixed at other sizes.
        """
        if self._places is None:
            raise UserError(f"{self.path} takes no images (its input {self.name} is {self}): leave out its resolution")
        sizes = self.sizes or (None, IMAGE[1], None, None)
        shape = [resolution if i in self._places else size for i, size in enumerate(sizes)]
        if any(sizes[place] not in (None, resolution) for place in self._places):
            raise UserError(
                f"{self.path} is fixed at {self}: it cannot take {resolution} px; leave out its resolution, or export "
                "it with dynamic sizes"
            )
        return (shape[0] or 1, *(size or IMAGE[1] for size in shape[1:]))

    def shape(self, shapes: Mapping[str, Shape], batch_size: int | None, resolution: int | None = None) -> Shape:
        """The static shape: the file's own, its dynamic sizes as in `shapes`, a dynamic first one the batch size.

        batch_size: None for what `shapes` says, or else 1. resolution: of square images.

        Raises:
            UserError: other sizes are dynamic and nothing says them, or the file has others.
        """
        given = shapes.get(self.name)
        if resolution is not None:
            if given is not None and self.sides(given) != (resolution, resolution):
                raise UserError(
                    f"--shape {self.name}={written(given)} is not of {resolution} px: leave one of them out"
                )
            given = given or self._image(resolution)
        sizes = (None,) * len(given or IMAGE) if self.sizes is None else self.sizes
        if given is None and None in sizes[1:]:
            usual = IMAGE if len(sizes) == 4 else (1, *[128] * len(sizes))
            would = written(own or new for own, new in zip(sizes, usual, strict=False))
            raise UserError(f"{self.path}: its input {self.name} is {self}: give --shape {self.name}={would}")
        shape = given or tuple(size or 1 for size in sizes)
        if len(shape) != len(sizes) or any(a not in (None, b) for a, b in zip(sizes, shape, strict=True)):
            raise UserError(f"--shape {self.name}={written(shape)}: this input of {self.path} is {self}")
        return shape if sizes[0] or batch_size is None else (batch_size, *shape[1:])


def _no_onnx(path: Path) -> str:
    """What a file is that cannot be read."""
    with path.open("rb") as file:
        begin = file.read(64).lstrip()
    if begin.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file: `git lfs pull` fetches it"
    if begin.startswith(b"<"):
        return "a web page, not an ONNX file: fetch it again"
    return "no ONNX file, or a damaged one: fetch or export it again"


def _check_external(path: Path, entry: Mapping[str, str]) -> None:
    """Raises UserError where the weights that an ONNX file keeps in another one are not all there."""
    data = path.parent / entry["location"]
    if not data.is_file():
        raise UserError(f"{path}: its weights are in {data}, which is not there: put it beside the file")
    needed, held = int(entry.get("offset", 0)) + int(entry.get("length", 0)), data.stat().st_size
    if held < needed:
        raise UserError(f"{path}: {data} is cut off, {held:,} of {needed:,} bytes: fetch it again")


def parse_shape(text: str) -> tuple[str, Shape]:
    """The name and the sizes of "images=1x3x224x224".

    Raises:
        UserError: anything else.
    """
    name, _, sizes = text.rpartition("=")
    if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--shape {text}: write it like images=1x3x224x224")
    return name, tuple(map(int, sizes.split("x")))


def written(sizes: Iterable[int | None]) -> str:
    return "x".join(str(size or "?") for size in sizes)


def check_shapes(shapes: Mapping[str, Shape], inputs: Iterable[OnnxInput]) -> None:
    names = sorted({each.name for each in inputs})
    for name in shapes:
        if name not in names:
            have = f"the inputs are called {', '.join(names)}" if names else "no .onnx file is among the networks"
            raise UserError(f"--shape {name}: {have}")
