"""What a bench is asked for, and what will be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nas.bench.onnx_input import OnnxInput, check_shapes, written
from nas.errors import UserError
from nas.measure.runtime import RUNTIMES, Settings

if TYPE_CHECKING:
    from nas.bench.onnx_input import Shape
    from nas.networks.targets import Target


Cell = tuple[str, Settings]
"""A network, by its label, in one combination: what one process measures."""


Progress = Callable[[str, int, int], None]
"""Called with (what goes on, done, in all)."""


Waiting = Callable[[str, float, float], None]
"""Called with a network that does not answer, the seconds waited for it and the most there are."""


TIMEOUT_S = 600
"""For a network to load and warm up, and for a round: torch.compile takes minutes, a large batch seconds."""


INT8_OPSET = 13
"""The first whose DequantizeLinear has a scale per channel."""


@dataclass(frozen=True)
class BenchRequest:
    """What a bench is asked for.

    settings: the combinations, checked, in the order of the table. own_batch: no batch size was asked for, so that an
    ONNX file keeps a fixed one, or that of its shape. throughput_at: the batch size whose throughput is told, None for
    that of the latency. shapes: of ONNX files' inputs, by their names. data: images that int8 is calibrated on, as
    `open_data` takes them. timeout_s: for a network to be prepared, to load and warm up, and for each of its rounds.
    """

    targets: Sequence[Target]
    settings: Sequence[Settings]
    rounds: int = 30
    own_batch: bool = False
    throughput_at: int | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    data: str | None = None
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True)
class Plan:
    """What will be measured, known before the device is free. sizes: the networks' resolutions, as rows tell them."""

    targets: Mapping[str, Target]
    inputs: Mapping[str, OnnxInput]
    cells: Sequence[Cell]
    sizes: Mapping[str, int | str | None]


def plan(options: BenchRequest) -> Plan:
    """Read the ONNX files, and check all networks against all settings.

    Raises:
        UserError: an ONNX file that is damaged or cannot be measured so, or --shape that nothing uses.
    """
    targets = {target.label: target for target in options.targets}
    inputs = {label: OnnxInput.read(target.onnx) for label, target in targets.items() if target.onnx}
    check_shapes(options.shapes, inputs.values())
    return Plan(
        targets,
        inputs,
        [
            (label, _own(target, inputs.get(label), each, options))
            for each in options.settings
            for label, target in targets.items()
        ],
        {label: _resolution(target, inputs.get(label), options.shapes) for label, target in targets.items()},
    )


def _own(target: Target, given: OnnxInput | None, settings: Settings, options: BenchRequest) -> Settings:
    """The settings, with the batch size of an ONNX file that has a fixed one."""
    if given is None:
        return settings
    label = target.label
    if RUNTIMES[settings.runtime].artifact != "onnx":
        able = " or ".join(name for name, each in RUNTIMES.items() if each.artifact == "onnx")
        raise UserError(f"{label}: runtime {settings.runtime} does not load ONNX files; use {able}")
    asked, many = None if options.own_batch else settings.batch_size, options.throughput_at
    own, *image = given.shape(options.shapes, asked, target.resolution)
    for option, wanted in (("batch-size", asked), ("throughput-at", many)):
        if wanted is not None and given.batch_size not in (None, wanted):
            raise UserError(f"{label} is fixed at batch size {own}: --{option} {wanted} does not fit")
    if options.data is not None and (len(image) != 3 or image[0] != 3 or image[1] != image[2]):
        raise UserError(f"--data has square images in three colours, {label} takes {written(image)}: leave --data out")
    if options.data is not None and not given.kind.startswith("float"):
        raise UserError(f"--data has normalised images, {label} takes {given.kind}: leave --data out")
    if given.quantised and settings.precision not in ("fp32", "int8"):
        raise UserError(f"{label} is quantised: it cannot be measured in {settings.precision}")
    if settings.precision == "int8" and not given.quantised and given.opset < INT8_OPSET:
        raise UserError(f"{label} is of opset {given.opset}: int8 needs {INT8_OPSET} or newer, export it so")
    return replace(settings, batch_size=own, precision="int8" if given.quantised else settings.precision)


def _resolution(target: Target, given: OnnxInput | None, shapes: Mapping[str, Shape]) -> int | str | None:
    """In px, "HxW" of images that are not square; None of what is no image."""
    if given is None:
        return target.network.resolution if target.network else None
    sides = given.sides(given.shape(shapes, None, target.resolution))
    return sides and (sides[0] if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}")
