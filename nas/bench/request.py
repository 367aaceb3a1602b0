"""What a bench is asked for, and what will be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from nas.bench.shapes import check_shapes, static_shape
from nas.errors import UserError
from nas.export.onnx_input import OnnxInput, written
from nas.export.quantize import MAX_DROP, check_max_drop
from nas.measure.device import check_settings
from nas.measure.runtime import LOWER, RUNTIMES, Settings
from nas.measure.samples import MAX_ROUNDS, SURE_ROUNDS

if TYPE_CHECKING:
    from nas.export.onnx_input import Shape
    from nas.networks.targets import Target


class Cell(NamedTuple):
    """A network, by its label, in one combination: what one process measures."""

    label: str
    settings: Settings


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
    """What a bench is asked for."""

    targets: Sequence[Target]
    settings: Sequence[Settings]
    """The combinations, in the order of the table; all of one device."""
    rounds: int = MAX_ROUNDS
    """Every network is timed once in each."""
    own_batch: bool = False
    """Whether no batch size was asked for: an ONNX file keeps the one it is fixed at, or that of its shape."""
    throughput_at: int | None = None
    """Batch size to measure the throughput at; None: that of the latency."""
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    """Of the inputs of ONNX files, by their names."""
    data: str | None = None
    """Images that int8 is calibrated on, and lower precisions of trained networks are judged by, as
    `nas.data.dataset.open_data` takes them; None: noise, and none is judged."""
    max_drop: float = MAX_DROP
    """Points of top-1 that a lower precision may cost on the validation images of `data`."""
    timeout_s: float = TIMEOUT_S
    """Time for a network to be prepared, to load and warm up, and for each of its rounds."""

    def check(self) -> None:
        """Check what can be checked without reading files of networks or images.

        Raises:
            UserError: no networks, too few rounds, a drop that is no number of points, several devices, or settings
                that cannot be measured.
        """
        if not self.targets:
            raise UserError("name the networks to measure: published names, timm/NAME, arch.json or .onnx files")
        check_rounds(self.rounds)
        lower = any(settings.precision in LOWER for settings in self.settings)
        check_max_drop(self.max_drop, lower and self.data is not None)
        if len({each.device for each in self.settings}) != 1:
            raise UserError("networks are measured side by side on one device: give settings, all of the same device")
        for settings in self.settings:
            check_settings(settings)
            if self.throughput_at is not None:
                check_settings(replace(settings, batch_size=self.throughput_at))


def check_rounds(rounds: int) -> None:
    """Raises UserError where there are too few for an interval of 95%."""
    if rounds < SURE_ROUNDS:
        raise UserError(f"--rounds is {rounds}: give {SURE_ROUNDS} or more, for intervals of 95%")


@dataclass(frozen=True)
class Plan:
    """What will be measured, known before the device is free."""

    targets: Mapping[str, Target]
    """By their labels, each once."""
    inputs: Mapping[str, OnnxInput]
    """By the labels of ONNX files."""
    cells: Sequence[Cell]
    """One per row, in the order of the table."""
    sizes: Mapping[str, int | str | None]
    """Resolutions by label, as `Combination.resolution` has them."""
    throughput_at: int | None

    def throughput_cell(self, cell: Cell) -> Cell:
        """That whose throughput the row of `cell` tells."""
        return Cell(cell.label, replace(cell.settings, batch_size=self.throughput_at or cell.settings.batch_size))

    @property
    def every(self) -> list[Cell]:
        """What is measured, each once."""
        return list(dict.fromkeys([*self.cells, *map(self.throughput_cell, self.cells)]))


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
        list(
            dict.fromkeys(  # a file that is int8 already has no fp32
                Cell(label, _own(target, inputs.get(label), each, options))
                for each in options.settings
                for label, target in targets.items()
            )
        ),
        {label: _resolution(target, inputs.get(label), options.shapes) for label, target in targets.items()},
        options.throughput_at,
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
    own, *image = static_shape(given, options.shapes, asked, target.resolution)
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
    sides = given.sides(static_shape(given, shapes, None, target.resolution))
    return sides and (sides[0] if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}")
