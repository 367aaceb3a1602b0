"""An ONNX file on the runtime that runs it: its ports, its metadata, and one inference."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nas.errors import UserError, unknown
from nas.export.onnx_input import OnnxInput, written
from nas.measure.runtime import Settings, check_settings
from nas.measure.runtimes import openvino, ort
from nas.text import first_line

Pixels = NDArray[Any]
TOO_NEW = re.compile("only .?guarantees.? support|max supported IR version")
"""What ONNX Runtime says of an opset, or an IR, that it does not know."""
FATAL = 4
"""ONNX Runtime's level of messages: what fails is raised."""


class Output(NamedTuple):
    """sizes: None where they are dynamic, and for all where their number is unknown."""

    name: str
    sizes: tuple[int | None, ...] | None

    def __str__(self) -> str:
        return "of any shape" if self.sizes is None else written(self.sizes)


class Session(NamedTuple):
    """A file on a runtime."""

    inputs: list[OnnxInput]
    outputs: list[Output]
    metadata: Mapping[str, str]
    run: Callable[[Pixels, int], Pixels]
    """(a batch, which output) -> the output's values."""


def open_session(path: Path, runtime: str, threads: int, bf16: bool) -> Session:
    """Open a file. bf16: see `OnnxFile.open`.

    Raises:
        UserError: no such runtime, or none that is installed or has bf16 here; the file is damaged, or newer than it.
    """
    openers = {"onnxruntime": _onnxruntime, "openvino": _openvino}
    if runtime not in openers:
        raise unknown("runtime", runtime, openers)
    check_settings(Settings(runtime, threads=threads, precision="bf16" if bf16 else "fp32"))
    try:
        return openers[runtime](path, threads, bf16)
    except MemoryError:
        raise
    except Exception as error:  # each runtime has its own kinds
        about = OnnxInput.read(path)  # which tells what is wrong, where it is the file
        if TOO_NEW.search(str(error)):
            version = importlib.import_module(runtime).__version__
            raise UserError(
                f"{path} (opset {about.opset}) is newer than {runtime} {version} reads: "
                f"pip install -U {runtime}, or export it of a lower opset and IR version"
            ) from error
        raise UserError(f"{runtime} cannot open {path}: {first_line(error)}") from error


def _onnxruntime(path: Path, threads: int, _bf16: bool) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, FATAL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [
        OnnxInput(path, each.name, ort.KINDS.get(each.type) or each.type.removeprefix("tensor(").rstrip(")"), sizes)
        for each, sizes in ((each, _sizes(each.shape)) for each in session.get_inputs())
    ]
    outputs = [Output(each.name, _sizes(each.shape)) for each in session.get_outputs()]
    metadata = session.get_modelmeta().custom_metadata_map
    return Session(
        inputs, outputs, metadata, lambda batch, i: session.run([outputs[i].name], {inputs[0].name: batch})[0]
    )


def _openvino(path: Path, threads: int, bf16: bool) -> Session:
    core = openvino.the_core()
    model = core.read_model(path)
    inputs = [
        OnnxInput(path, port.any_name, openvino.KINDS.get(kind := port.element_type.get_type_name(), kind), sizes)
        for port, sizes in ((port, _dimensions(port)) for port in model.inputs)
    ]
    outputs = [Output(port.any_name, _dimensions(port)) for port in model.outputs]
    told = model.get_rt_info("framework").value if model.has_rt_info("framework") else {}
    metadata = {key: str(getattr(value, "value", value)) for key, value in told.items()}
    options = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return Session(inputs, outputs, metadata, lambda batch, i: np.array(request.infer([batch])[i]))


def _sizes(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) and size > 0 else None for size in shape)


def _dimensions(port: Any) -> tuple[int | None, ...] | None:
    shape = port.partial_shape
    return None if shape.rank.is_dynamic else tuple(size.get_length() if size.is_static else None for size in shape)
