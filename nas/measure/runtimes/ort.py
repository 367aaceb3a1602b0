"""ONNX Runtime: all graph optimisations, sequential operators, spinning as by default.

On CUDA its CUDA or its TensorRT provider, images and logits in the GPU's memory; a session that fell back to another
provider is refused.
"""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from nas.measure.runtime import Infer, Settings, register
from nas.measure.runtimes.pytorch import DTYPES, fixed_images

KINDS = {f"tensor({kind})": kind for kind in DTYPES} | {"tensor(float)": "float32", "tensor(double)": "float64"}
"""NumPy's names of ONNX Runtime's types."""


def check_static(inputs: list[tuple[str, str, list[Any]]], settings: Settings) -> tuple[str, str, tuple[int, ...]]:
    """The name, type and shape of the only input, given as (name, type, sizes), an int where a size is static.

    Raises ValueError where there are several, or it is not a static tensor of settings.batch_size and one of DTYPES.
    """
    if len(inputs) != 1 or inputs[0][1] not in DTYPES:
        found = ", ".join(f"{name} ({kind})" for name, kind, _ in inputs)
        raise ValueError(f"needs one input of {', '.join(DTYPES)}, has {found or 'none'}")
    name, kind, shape = inputs[0]
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(f"needs a static input shape, has {shape}")
    if not shape or shape[0] != settings.batch_size:
        raise ValueError(f"input shape {shape} does not start with batch size {settings.batch_size}")
    return name, kind, tuple(shape)


def check(settings: Settings) -> str | None:
    return None if settings.device == "cpu" else _no_provider("CUDAExecutionProvider")


@register(
    "onnxruntime",
    precisions={"cpu": ("fp32", "int8"), "cuda": ("fp32", "tf32", "fp16")},
    artifact="onnx",
    package="onnxruntime",
    check=check,
)
def load(path: Path, settings: Settings) -> Infer:
    return _load(path, settings, [("CPUExecutionProvider", {}) if settings.device == "cpu" else _cuda(settings)])


def check_tensorrt(settings: Settings) -> str | None:
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed: pip install tensorrt, of the version that onnxruntime-gpu was built for"
    return _no_provider("TensorrtExecutionProvider")


@register(
    "tensorrt",
    precisions={"cuda": ("fp32", "tf32", "fp16")},
    artifact="onnx",
    package="onnxruntime",
    check=check_tensorrt,
    patience_s=600,  # it builds an engine
)
def load_tensorrt(path: Path, settings: Settings) -> Infer:
    importlib.import_module("tensorrt")  # loads its libraries, for the provider to find

    if settings.precision == "fp32":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # TensorRT takes TF32 for fp32 unless told not to, and only so
    tensorrt = ("TensorrtExecutionProvider", {"trt_fp16_enable": str(settings.precision == "fp16")})
    return _load(path, settings, [tensorrt, _cuda(settings)])  # CUDA for what TensorRT lacks


def _cuda(settings: Settings) -> tuple[str, dict[str, str]]:
    tf32 = settings.precision == "tf32"
    return "CUDAExecutionProvider", {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "EXHAUSTIVE"}


def _no_provider(provider: str) -> str | None:
    import onnxruntime

    if provider in onnxruntime.get_available_providers():
        return None
    return f"this onnxruntime has no {provider}: pip uninstall onnxruntime, then pip install onnxruntime-gpu"


def _load(path: Path, settings: Settings, providers: list[tuple[str, dict[str, str]]]) -> Infer:
    import onnxruntime as ort

    if settings.device == "cuda":
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(path, options, providers=providers)
    wanted, used = providers[0][0], session.get_providers()[0]
    if used != wanted:
        raise RuntimeError(f"ONNX Runtime could not start {wanted} and fell back to {used}")
    inputs = [(i.name, KINDS.get(i.type, i.type), i.shape) for i in session.get_inputs()]
    name, kind, shape = check_static(inputs, settings)
    images = fixed_images(shape, kind)
    if settings.device == "cuda":
        return bound(session, name, images, "cuda")
    return lambda: session.run(None, {name: images})[0]


def bound(session: Any, name: str, images: Any, device: str) -> Infer:
    """One inference whose input lies, and whose outputs stay, in the memory of `device`."""
    import onnxruntime as ort

    binding = session.io_binding()
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(images, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def infer() -> Any:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]

    return infer
