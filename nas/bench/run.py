"""`vitnas bench`: networks side by side on one device, in every combination of what is asked for, in one run."""

from __future__ import annotations

import csv
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserError
from nas.export.artifact import Exporter, export_here, lower_precision
from nas.files import scratch
from nas.measure.device import compare, device_lock
from nas.measure.protocol import BUSY_SPREAD, SURE_ROUNDS, Interrupted, MeasureError, Measurement, paired_ratio, quanta
from nas.measure.reasons import plain
from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.runtimes.pytorch import KINDS
from nas.process import TOLD_S, WorkerError
from nas.units import counted

if TYPE_CHECKING:
    from nas.networks.targets import Target

Row = dict[str, Any]
Shape = tuple[int, ...]
Cell = tuple[str, Settings]
"""A network, by its label, in one combination: what one process measures."""
Progress = Callable[[str, int, int], None]
"""Called with (what goes on, done, in all)."""

Waiting = Callable[[str, float, float], None]
"""Called with a network that does not answer, the seconds waited for it and the most there are."""

TIMEOUT_S = 600
"""For a network to load and warm up, and for a round: torch.compile takes minutes, a large batch seconds."""
UNFOLDED = "On PyTorch timm's networks keep the BatchNorms that timm cannot fold; ours are folded. ONNX folds both."
SETTINGS = ("runtime", "device", "precision", "batch_size", "threads")
COLUMNS = (
    *("model", "resolution", *SETTINGS, "latency_ms", "p95_ms", "ci_low_ms", "ci_high_ms", "samples"),
    *("throughput", "throughput_batch", "ratio", "ratio_low", "ratio_high", "waiting", "error"),
)
PLOTS = (".png", ".svg", ".pdf")
IMAGE = (1, 3, 224, 224)
CHANNELS = (1, 3, 4)
INT8_OPSET = 13
"""The first whose DequantizeLinear has a scale per channel."""


@dataclass(frozen=True)
class Options:
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


@dataclass
class Found:
    """rows: of what could be measured, as JSON and the table tell it. failed: what could not, with its error; errors: a
    line for each of them. interrupted: whether Ctrl-C ended it before its last round."""

    rows: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be measured, known before the device is free. sizes: the networks' resolutions, as rows tell them."""

    targets: Mapping[str, Target]
    inputs: Mapping[str, OnnxInput]
    cells: Sequence[Cell]
    sizes: Mapping[str, int | str | None]


def plan(options: Options) -> Plan:
    """Read the ONNX files, and check all networks against all settings.

    Raises:
        UserError: an ONNX file that is damaged or cannot be measured so, or --shape that nothing uses.
    """
    targets = {target.label: target for target in options.targets}
    inputs = {label: OnnxInput.read(target.onnx) for label, target in targets.items() if target.onnx}
    _check_shapes(options.shapes, inputs.values())
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


def run_bench(
    options: Options,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    planned: Plan | None = None,
) -> Found:
    """Measure all networks in all combinations in one interleaved run; ratios are to the first row.

    say: told what is waited for, in a line. planned: what `plan` made of the options, if it was called before. Ctrl-C
    ends the run with the rounds made until then.

    Raises:
        KeyboardInterrupt: there were none.
        UserError: as `plan`, or calibration images that cannot be had or that nothing uses; nothing has been measured
            then.
    """
    found, many, planned = Found(), options.throughput_at, planned or plan(options)
    targets, inputs, cells, sizes = planned.targets, planned.inputs, planned.cells, planned.sizes
    for label in targets:
        if sum(target.label == label for target in options.targets) > 1:
            found.notes.append(f"{label} is named more than once: measured once.")
    batches = {cell: (cell[0], replace(cell[1], batch_size=many or cell[1].batch_size)) for cell in cells}
    every = list(dict.fromkeys([*cells, *batches.values()]))

    results: dict[Cell, Measurement | MeasureError] = {}
    with scratch() as folder, device_lock(options.settings[0].device):
        calibration = _Calibration(options, folder, found.notes)
        paths: dict[str, Path] = {}
        waiting = _teller(say)
        with _Files(folder, targets, inputs, options, calibration, waiting) as files:
            for i, cell in enumerate(every):
                progress(f"exporting {cell[0]}", i, len(every))
                try:
                    paths[str(i)] = files.of(*cell)
                except WorkerError as error:
                    results[cell] = MeasureError(f"cannot be prepared: {plain(str(error))}")
        settings = {name: every[int(name)][1] for name in paths}
        try:
            told = compare(
                paths,
                settings,
                options.rounds,
                lambda *done: progress("measuring, rounds", *done),
                options.timeout_s,
                lambda name, *waited: waiting(every[int(name)][0], *waited),
            )
        except Interrupted as interrupt:
            if not interrupt.done:
                raise
            told, found.interrupted = interrupt.results, True
            few = ": intervals cover less than 95%" * (interrupt.done < SURE_ROUNDS)
            found.notes.append(f"Interrupted: {interrupt.done} of {options.rounds} rounds were made{few}.")
    for name, result in told.items():
        label, own = every[int(name)]
        if isinstance(result, MeasureError):
            given, why = inputs.get(label), plain(str(result))
            inside = own.batch_size > 1 and given is not None and given.batch_size is None and " node " in why
            hint = f"; it may be made for batch 1 inside: leave out batch {own.batch_size}" * inside
            result = MeasureError(why + hint)
        results[label, own] = result

    differing = varying([asdict(settings) for _, settings in every])
    first: Measurement | None = None
    for label, settings in every:
        result = results[label, settings]
        if isinstance(result, MeasureError):
            where = ", ".join(worded(name, getattr(settings, name)) for name in differing)
            found.errors.append(f"{label}{where and f' ({where})'}: {result}")
            failure = {"model": label, "resolution": sizes[label], **_of(settings), "error": str(result)}
            found.failed.append(failure)
    if found.interrupted:
        found.notes += found.errors
    for cell in cells:
        result, batch = results[cell], batches[cell]
        if isinstance(result, Measurement):
            first = first or result
            row = {"model": cell[0], "resolution": sizes[cell[0]], **_row(cell[1], result, first)}
            found.rows.append(row | _throughput(results[batch], batch[1].batch_size))
    found.notes += [
        f"{label} holds weights of float16: a CPU without arithmetic of float16 computes in fp32."
        for label, given in inputs.items()
        if given.half
    ]
    found.notes += [trained_elsewhere(target) for target in targets.values() if target.trained_at]
    if line := unequal({row["model"]: row["resolution"] for row in found.rows}, options.targets):
        found.notes.append(line)
    if any(targets[label].timm and RUNTIMES[settings.runtime].artifact == "module" for label, settings in cells):
        found.notes.append(UNFOLDED)
    waiting = any(row["waiting"] for row in found.rows)
    spreads = [(result.spread, cell[0]) for cell, result in results.items() if isinstance(result, Measurement)]
    spread, label = max(spreads, default=(0, ""))
    if spread > BUSY_SPREAD and not waiting:
        found.notes.append(
            f"This machine was busy: the rounds of {label} varied by {spread:.0%}; run again on a quiet machine."
        )
    return found


def _own(target: Target, given: OnnxInput | None, settings: Settings, options: Options) -> Settings:
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
        raise UserError(f"--data has square images in three colours, {label} takes {_written(image)}: leave --data out")
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


def trained_elsewhere(target: Target) -> str:
    """A line on a network that was trained at another resolution than it is measured at."""
    return f"{target.label}: trained at {target.trained_at} px, measured at {target.arch.resolution} px."


def unequal(sizes: Mapping[str, int | str | None], targets: Iterable[Target]) -> str | None:
    """A line where networks, by label, have other resolutions than the first, with what makes them equal; or None."""
    told = {label: size for label, size in sizes.items() if size is not None}
    first = next(iter(told), "")
    usual = told.get(first)
    others = {label: size for label, size in told.items() if size != usual}
    if not others:
        return None
    said = []
    for size in dict.fromkeys(others.values()):
        labels = [label for label in others if others[label] == size]
        said.append(f"{' and '.join(labels)} run{'s' * (len(labels) == 1)} at {size} px")
    rest = first if len(told) == len(others) + 1 else "the others"
    able = any(each.label in others and each.resolution is None and each.onnx is None for each in targets)
    hint = f": add @{usual}" if able and isinstance(usual, int) else ""
    return f"{', '.join(said)}, {rest} at {usual} px{hint}."


def _teller(say: Callable[[str], None]) -> Waiting:
    """Tells of every network once, and again where it is waited for longer."""
    told: set[str] = set()

    def waiting(label: str, waited_s: float, most_s: float) -> None:
        if label not in told or waited_s > TOLD_S:
            told.add(label)
            say(f"waiting for {label}: no answer for {waited_s:.0f} s, will give up after {most_s:.0f} s (--timeout)")

    return waiting


def _of(settings: Settings) -> Row:
    return {name: getattr(settings, name) for name in SETTINGS}


def _row(settings: Settings, result: Measurement, first: Measurement) -> Row:
    """waiting: whether its samples are waiting times (see `quanta`); there is no ratio to or of such ones."""
    ratio, interval = paired_ratio(result, first)
    told = not quanta(result) and not quanta(first)
    return {
        **_of(settings),
        "latency_ms": result.p50_ms,
        "p95_ms": result.p95_ms,
        "ci": list(result.ci_ms),
        "samples": result.n,
        "ratio": ratio if told else None,
        "ratio_ci": list(interval) if told else None,
        "waiting": quanta(result),
    }


def _throughput(result: Measurement | MeasureError, batch_size: int) -> Row:
    measured = isinstance(result, Measurement)
    return {"throughput": result.throughput(batch_size) if measured else None, "throughput_batch": batch_size}


def is_tie(row: Row, first: Row) -> bool:
    """Whether a row cannot be told from the first one."""
    return row is not first and row["ratio_ci"] is not None and row["ratio_ci"][0] <= 1 <= row["ratio_ci"][1]


def varying(rows: Sequence[Mapping[str, Any]], names: Iterable[str] = SETTINGS) -> list[str]:
    """Which of these are not the same in all rows."""
    return [name for name in names if len({row[name] for row in rows}) > 1]


def worded(name: str, value: Any) -> str:
    """One of SETTINGS as people read it."""
    if name == "threads":
        return counted(value, "thread")
    return {"batch_size": f"batch {value}", "resolution": f"{value} px"}.get(name, str(value))


# ------------------------------------------------------------------------------------------------ ONNX files


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
        if len(found) > 1 or found[0].kind not in KINDS or found[0].sizes == ():
            listed = ", ".join(f"{each.name} ({each.kind} {each})" for each in found)
            raise UserError(f"{path}: only networks of one input ({', '.join(KINDS)}) are measured; its are {listed}")
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
        return "of any shape" if self.sizes is None else _written(self.sizes) or "without dimensions"

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
                    f"--shape {self.name}={_written(given)} is not of {resolution} px: leave one of them out"
                )
            given = given or self._image(resolution)
        sizes = (None,) * len(given or IMAGE) if self.sizes is None else self.sizes
        if given is None and None in sizes[1:]:
            usual = IMAGE if len(sizes) == 4 else (1, *[128] * len(sizes))
            would = _written(own or new for own, new in zip(sizes, usual, strict=False))
            raise UserError(f"{self.path}: its input {self.name} is {self}: give --shape {self.name}={would}")
        shape = given or (sizes[0] or 1, *sizes[1:])
        if len(shape) != len(sizes) or any(a not in (None, b) for a, b in zip(sizes, shape, strict=True)):
            raise UserError(f"--shape {self.name}={_written(shape)}: this input of {self.path} is {self}")
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


def _written(sizes: Iterable[int | None]) -> str:
    return "x".join(str(size or "?") for size in sizes)


def _check_shapes(shapes: Mapping[str, Shape], inputs: Iterable[OnnxInput]) -> None:
    names = sorted({each.name for each in inputs})
    for name in shapes:
        if name not in names:
            have = f"the inputs are called {', '.join(names)}" if names else "no .onnx file is among the networks"
            raise UserError(f"--shape {name}: {have}")


# ------------------------------------------------------------------------------------------------ files to measure


class _Calibration:
    """Images that int8 is calibrated on. Raises UserError where they cannot be had, or nothing needs them."""

    def __init__(self, options: Options, folder: Path, notes: list[str]) -> None:
        self._folder, self._notes, self._data = folder, notes, None
        int8 = any(settings.precision == "int8" for settings in options.settings)
        if options.data is None:
            from nas.export.quantize import NOISE

            notes += [NOISE] * int8
        elif not int8:
            raise UserError("--data is for calibrating int8: add --precision int8")
        else:
            from nas.data.dataset import open_data

            self._data = open_data(options.data, 224, None, 0)

    def at(self, resolution: int) -> str | None:
        """The file (.npy) of float32 images (N, 3, R, R); None without --data."""
        import numpy as np

        from nas.export.quantize import calibration_images

        if self._data is None:
            return None
        path = self._folder / f"images-{resolution}.npy"
        if not path.exists():
            images, skipped = calibration_images(self._data, resolution)
            np.save(path, images)
            if skipped and skipped not in self._notes:
                self._notes.append(skipped)
        return str(path)


class _Files:
    """Makes the files that runtimes load, in a process of its own: a network may crash it, or fill its memory."""

    def __init__(
        self,
        folder: Path,
        targets: Mapping[str, Target],
        inputs: Mapping[str, OnnxInput],
        options: Options,
        calibration: _Calibration,
        waiting: Waiting,
    ) -> None:
        self._folder, self._targets, self._inputs, self._shapes = folder, targets, inputs, options.shapes
        self._calibration = calibration
        self._made: dict[Cell, Path] = {}
        self._label = ""  # what is being made
        self._child = Exporter(
            module="nas.bench.run",
            timeout_s=options.timeout_s,
            waiting=lambda *waited: waiting(self._label, *waited),
        )

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()

    def of(self, label: str, settings: Settings) -> Path:
        """The network's file for these settings, whatever the threads. Raises WorkerError where it cannot be made."""
        key, self._label = (label, replace(settings, threads=1)), label
        if key not in self._made:
            self._made[key] = self._make(label, settings, self._folder / str(len(self._made)))
        return self._made[key]

    def _make(self, label: str, settings: Settings, stem: Path) -> Path:
        from nas.networks.build import to_document

        network, given = self._targets[label].network, self._inputs.get(label)
        if given is None:
            resolution = network.resolution
            method, source = "export", {"document": to_document(network)}
        else:
            shape = given.shape(self._shapes, settings.batch_size, self._targets[label].resolution)
            resolution = shape[-1]
            method, source = "fix", {"source": str(given.path), "name": given.name, "shape": shape}
            if given.quantised:
                settings = replace(settings, precision="fp32")  # there is nothing left to convert
        images = self._calibration.at(resolution) if settings.precision == "int8" else None
        return self._child.call(method, settings, stem, images, **source)


def _fix(
    source: str, name: str, shape: list[int], settings: dict[str, Any], stem: str, images: str | None
) -> dict[str, str]:
    """In the child: a user's ONNX file with this shape of its input, in this precision."""
    import numpy as np
    import onnx
    from onnxruntime.tools.onnx_model_utils import make_input_shape_fixed

    model, path = onnx.load(source), Path(f"{stem}.onnx")
    tensor = next(each for each in model.graph.input if each.name == name).type.tensor_type
    if not tensor.HasField("shape"):
        tensor.shape.CopyFrom(onnx.TensorShapeProto(dim=[onnx.TensorShapeProto.Dimension() for _ in shape]))
    make_input_shape_fixed(model.graph, name, shape)
    onnx.save(model, path)
    lower_precision(path, Settings(**settings), np.load(images) if images else None)
    return {"path": str(path)}


# ------------------------------------------------------------------------------------------------ CSV and plot


def check_output(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raises UserError where the file could not be written at the end."""
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{option} {path}: give a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from None


def to_csv(rows: Sequence[Row], failed: Sequence[Row] = ()) -> bytes:
    """A line per row (COLUMNS); latencies in ms, throughput in images/s. What failed has its error alone."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        (ci_low, ci_high), (ratio_low, ratio_high) = row["ci"], row["ratio_ci"] or (None, None)
        flat = {"ci_low_ms": ci_low, "ci_high_ms": ci_high, "ratio_low": ratio_low, "ratio_high": ratio_high}
        writer.writerow(row | flat)
    writer.writerows(failed)
    return text.getvalue().encode()


def to_plot(rows: Sequence[Row], suffix: str) -> bytes:
    """Latencies as bars with their intervals, a panel per combination, as a .png, .svg or .pdf.

    Panels of one batch size share their scale.
    """
    from nas.report.figures import INK, SOFT, new_figure, plain_axes

    equal = len({row["resolution"] for row in rows}) == 1
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    heights = [len(panel) + 1.6 for panel in panels.values()]
    figure = new_figure(9.5, 0.34 * sum(heights) + 0.5)
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (combination, panel) in zip(grid, panels.items(), strict=True):
        batch = combination[SETTINGS.index("batch_size")]
        right = max(row["ci"][1] for row in rows if row["batch_size"] == batch)
        plain_axes(axes)
        axes.grid(axis="y", visible=False)
        places = range(len(panel))
        values = [row["latency_ms"] for row in panel]
        reach = [
            [row["latency_ms"] - row["ci"][0] for row in panel],
            [row["ci"][1] - row["latency_ms"] for row in panel],
        ]
        colours = ["#0072B2" if row is rows[0] else "#8FB8D8" for row in panel]
        axes.barh(places, values, 0.68, color=colours, xerr=reach, error_kw={"ecolor": INK, "lw": 1.1, "capsize": 2.5})
        for place, row in zip(places, panel, strict=True):
            axes.annotate(
                f"{_figure(row['latency_ms'])} ms{_beside(row, rows[0])}",
                (row["ci"][1], place),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=9,
            )
        names = [_short(row["model"]) + ("" if equal else f", {row['resolution']} px") for row in panel]
        axes.set_yticks(places, names)
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_xlim(0, 1.35 * right)
        title = ", ".join(worded(name, value) for name, value in zip(SETTINGS, combination, strict=True))
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    grid[-1].set_xlabel("latency, ms: median and its 95% interval; ratios are to the dark bar", color=SOFT)
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."))
    return content.getvalue()


def _beside(row: Row, first: Row) -> str:
    if row["waiting"]:
        return "  waiting"
    if row is first or row["ratio"] is None:
        return ""
    return "  tie" if is_tie(row, first) else f"  {_figure(row['ratio'])}x"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _short(label: str, length: int = 40) -> str:
    return label if len(label) <= length else "..." + label[3 - length :]


if __name__ == "__main__":
    from nas.process import serve

    serve({"export": export_here, "fix": _fix})
