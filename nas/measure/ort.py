"""ONNX Runtime on the CPU: all graph optimisations, sequential operators, spinning as by default."""

from collections.abc import Callable
from pathlib import Path

from nas.measure.runtime import Settings, register


@register("onnxruntime", devices=("cpu",), artifact="onnx")
def load(path: Path, settings: Settings) -> Callable[[], None]:
    """Raises ValueError where the file's input is not one static tensor of settings.batch_size."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    inputs = [(i.name, i.type, i.shape) for i in session.get_inputs()]
    if len(inputs) != 1 or inputs[0][1] != "tensor(float)":
        raise ValueError(f"needs one float32 input, has {inputs}")
    name, _, shape = inputs[0]
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(f"needs a static input shape, has {shape}")
    if not shape or shape[0] != settings.batch_size:
        raise ValueError(f"input shape {shape} does not start with batch size {settings.batch_size}")
    feed = {name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}

    def infer() -> None:
        session.run(None, feed)

    return infer
