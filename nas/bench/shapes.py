"""--shape and @PX: the static shape that a user's ONNX file is measured with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.export.onnx_input import Shape, written

if TYPE_CHECKING:
    from nas.export.onnx_input import OnnxInput

IMAGE = (1, 3, 224, 224)


def static_shape(
    network: OnnxInput, shapes: Mapping[str, Shape], batch_size: int | None, resolution: int | None = None
) -> Shape:
    """The static shape: the file's own, its dynamic sizes as in `shapes`, a dynamic first one the batch size.

    batch_size: None for what `shapes` says, or else 1. resolution: of square images.

    Raises:
        UserError: other sizes are dynamic and nothing says them, or the file has others.
    """
    given = shapes.get(network.name)
    if resolution is not None:
        if given is not None and network.sides(given) != (resolution, resolution):
            raise UserError(f"--shape {network.name}={written(given)} is not of {resolution} px: leave one of them out")
        given = given or _image(network, resolution)
    sizes = (None,) * len(given or IMAGE) if network.sizes is None else network.sizes
    if given is None and None in sizes[1:]:
        usual = IMAGE if len(sizes) == 4 else (1, *[128] * len(sizes))
        would = written(own or new for own, new in zip(sizes, usual, strict=False))
        raise UserError(f"{network.path}: its input {network.name} is {network}: give --shape {network.name}={would}")
    shape = given or tuple(size or 1 for size in sizes)
    if len(shape) != len(sizes) or any(a not in (None, b) for a, b in zip(sizes, shape, strict=True)):
        raise UserError(f"--shape {network.name}={written(shape)}: this input of {network.path} is {network}")
    return shape if sizes[0] or batch_size is None else (batch_size, *shape[1:])


def _image(network: OnnxInput, resolution: int) -> Shape:
    """The shape of a square image of this size; 1 where the batch is dynamic.

    Raises:
        UserError: the input is no image, or is fixed at other sizes.
    """
    if network.places is None:
        raise UserError(
            f"{network.path} takes no images (its input {network.name} is {network}): leave out its resolution"
        )
    sizes = network.sizes or (None, IMAGE[1], None, None)
    shape = [resolution if i in network.places else size for i, size in enumerate(sizes)]
    if any(sizes[place] not in (None, resolution) for place in network.places):
        raise UserError(
            f"{network.path} is fixed at {network}: it cannot take {resolution} px; leave out its resolution, or "
            "export it with dynamic sizes"
        )
    return (shape[0] or 1, *(size or IMAGE[1] for size in shape[1:]))


def parse_shape(text: str) -> tuple[str, Shape]:
    """The name and the sizes of "images=1x3x224x224".

    Raises:
        UserError: anything else.
    """
    name, _, sizes = text.rpartition("=")
    if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--shape {text}: write it like images=1x3x224x224")
    return name, tuple(map(int, sizes.split("x")))


def parse_shapes(texts: Iterable[str]) -> dict[str, Shape]:
    """The shapes by the names of their inputs, of texts as `parse_shape` takes them.

    Raises:
        UserError: any other text, or two shapes of one input.
    """
    found: dict[str, Shape] = {}
    for name, shape in map(parse_shape, texts):
        if found.setdefault(name, shape) != shape:
            raise UserError(
                f"--shape {name}={written(shape)}: it is {written(found[name])} already, and has one shape in a run"
            )
    return found


def check_shapes(shapes: Mapping[str, Shape], inputs: Iterable[OnnxInput]) -> None:
    names = sorted({each.name for each in inputs})
    for name in shapes:
        if name not in names:
            have = f"the inputs are called {', '.join(names)}" if names else "no .onnx file is among the networks"
            raise UserError(f"--shape {name}: {have}")
