"""OpenVINO on the CPU: one stream of the given threads, in exactly the precision asked for.

Left to itself OpenVINO computes in bf16 wherever the CPU has instructions for it, and calls that fp32. Its own pinning
of threads is off: the process is pinned already.
"""

import functools
from pathlib import Path
from typing import Any

from nas.measure.runtime import Infer, Settings, no_bf16, register
from nas.measure.runtimes.ort import check_static

KINDS = {"f32": "float32", "f16": "float16", "f64": "float64", "u8": "uint8", "i8": "int8", "i32": "int32"}
"""NumPy's names of OpenVINO's types."""


def check(settings: Settings) -> str | None:
    return no_bf16() if settings.precision == "bf16" else None


@register(
    "openvino",
    precisions={"cpu": ("fp32", "bf16", "int8")},
    artifact="onnx",
    package="openvino",
    extra="openvino",
    check=check,
)
def load(path: Path, settings: Settings) -> Infer:
    import openvino

    from nas.measure.runtimes.pytorch import fixed_images

    core = the_core()
    model = core.read_model(path)
    inputs = []
    for port in model.inputs:
        sizes = [size.get_length() if size.is_static else str(size) for size in port.partial_shape]
        kind = port.element_type.get_type_name()
        inputs.append((port.any_name, KINDS.get(kind, kind), sizes))
    _, kind, shape = check_static(inputs, settings)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if settings.precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": settings.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(fixed_images(shape, kind)))

    def infer() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return infer


@functools.cache
def the_core() -> Any:
    """Kept to the end of the process: once its plug-ins were unloaded, a signal to one of their threads crashes it."""
    import openvino

    return openvino.Core()
