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
from nas.export.onnx_input import OnnxInput, read_model, written
from nas.measure.reasons import plain
from nas.measure.runtime import Settings, check_settings
from nas.measure.runtimes import openvino, ort
from nas.measure.runtimes.pytorch import DTYPES
from nas.process import NATIVE

Pixels = NDArray[Any]
TOO_NEW = re.compile("only .?guarantees.? support|max supported IR version")
"""What ONNX Runtime says of an opset, or an IR, that it does not know."""
FATAL = 4
"""ONNX Runtime's level of messages: what fails is raised."""


class Output(NamedTuple):
    """sizes: None where they are dynamic, and for all where their number is unknown. kind: NumPy's name of its type."""

    name: str
    sizes: tuple[int | None, ...] | None
    kind: str

    def __str__(self) -> str:
        shape = "of any shape" if self.sizes is None else written(self.sizes) or "without dimensions"
        return shape if self.kind in DTYPES else f"{self.kind} {shape}"


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
    except (MemoryError, UserError):
        raise
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is damaged: a name in it, or what it says of the network, is no text; export it again"
        ) from None
    except Exception as error:  # each runtime has its own kinds
        about = OnnxInput.read(path)  # which tells what is wrong, where it is the file
        if TOO_NEW.search(str(error)):
            version = importlib.import_module(runtime).__version__
            raise UserError(
                f"{path} (opset {about.opset}) is newer than {runtime} {version} reads: "
                f"pip install -U {runtime}, or export it of a lower opset and IR version"
            ) from error
        raise UserError(f"{runtime} cannot open {path}: {in_words(error)}") from error


def in_words(error: Exception) -> str:
    """Why a runtime fails, in one line."""
    return plain(NATIVE.sub("", " ".join(str(error).split())) or type(error).__name__)


def _onnxruntime(path: Path, threads: int, _bf16: bool) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, FATAL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    inputs = [
        OnnxInput(path, each.name, kind, _sizes(each.shape) if each.shape else _unknown(path, each.type))
        for each, kind in ((each, _kind(each.type)) for each in session.get_inputs())
    ]
    outputs = [Output(each.name, _sizes(each.shape) or None, _kind(each.type)) for each in session.get_outputs()]
    metadata = session.get_modelmeta().custom_metadata_map
    return Session(
        inputs, outputs, metadata, lambda batch, i: session.run([outputs[i].name], {inputs[0].name: batch})[0]
    )


def _openvino(path: Path, threads: int, bf16: bool) -> Session:
    if path.suffix != ".xml":  # OpenVINO's own format
        read_model(path)  # what is no ONNX file is given to readers of other formats, which write on the terminal
    core = openvino.the_core()
    model = core.read_model(path)
    inputs = [OnnxInput(path, port.any_name, _element(port), _dimensions(port)) for port in model.inputs]
    outputs = [Output(port.any_name, _dimensions(port), _element(port)) for port in model.outputs]
    told = model.get_rt_info("framework").value if model.has_rt_info("framework") else {}
    metadata = {key: str(getattr(value, "value", value)) for key, value in told.items()}
    options = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return Session(inputs, outputs, metadata, lambda batch, i: np.array(request.infer([batch])[i]))


def _element(port: Any) -> str:
    """NumPy's name of the type of one of OpenVINO's ports; OpenVINO's own where it has none here."""
    name: str = port.element_type.get_type_name()
    return openvino.KINDS.get(name, name)


def _kind(type_of: str) -> str:
    """NumPy's name of one of ONNX Runtime's types; as it says where it is no tensor."""
    inner = re.fullmatch(r"tensor\((\w+)\)", type_of)
    return ort.KINDS.get(type_of) or (inner[1] if inner else type_of)


def _unknown(path: Path, type_of: str) -> tuple[int | None, ...] | None:
    """The sizes of an input for which ONNX Runtime has none: a single number, no tensor, or of any shape."""
    return OnnxInput.read(path).sizes if type_of.startswith("tensor(") else None


def _sizes(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in shape)


def _dimensions(port: Any) -> tuple[int | None, ...] | None:
    shape = port.partial_shape
    return None if shape.rank.is_dynamic else tuple(size.get_length() if size.is_static else None for size in shape)
