"""What runtimes say of networks that they cannot run, in plain words."""

import pytest

from nas.measure.reasons import LONGEST, plain

PAIRS = [
    (
        "Fail: Unsupported model IR version: 99, max supported IR version: 14",
        "its IR version is 99 and onnxruntime reads up to 14: save it with an older one, or update onnxruntime",
    ),
    (
        "Fail: ONNX Runtime only *guarantees* support for models stamped with official released onnx opset versions. "
        "Opset 99 is under development and support for this is limited. The operator schemas may change before next "
        "ONNX release. Current official support for domain ai.onnx is till opset 28.",
        "its opset of ai.onnx is 99 and onnxruntime knows up to 28: export it with that, or update onnxruntime",
    ),
    (
        'InvalidGraph: This is an invalid model. In Node, ("", MyOwnOp, "my.ops", -1) : ("y": tensor(float),) -> '
        "(\"z\": tensor(float),) , Error No opset import for domain 'my.ops'",
        "onnxruntime has no operator my.ops.MyOwnOp",
    ),
    ("Fail: Fatal error: own:Unheard(-1) is not a registered function/op", "onnxruntime has no operator own.Unheard"),
    (
        "RuntimeError: Exception from src/core.cpp:84: Check 'false' failed at src/ops_report.cpp:151: FrontEnd API "
        "failed with OpConversionFailure: Summary: -- No conversion rule found for operations: my.ops.MyOwnOp",
        "openvino has no operator my.ops.MyOwnOp",
    ),
    (
        "Fail: Non-zero status code returned while running Reshape node. Name:'' Status Message: input_shape_size == "
        "requested_shape_size was false. The input tensor cannot be reshaped to the requested shape. Input "
        "shape:{1,3,32,32}, requested shape:{7,7}",
        "its Reshape node does not run: The input tensor cannot be reshaped to the requested shape. Input "
        "shape:{1,3,32,32}, requested shape:{7,7}",
    ),
    (
        "Fail: Non-zero status code returned while running Conv node. Name:'stem' Status Message: Input channels C is "
        "not equal to kernel channels * group. C: 4 kernel channels: 3 group: 1",
        "its Conv node stem does not run: Input channels C is not equal to kernel channels * group. C: 4 kernel "
        "channels: 3 group: 1",
    ),
    (
        "RuntimeError: Exception from src/core.cpp:84: -- Reshape-17 with a message: While validating ONNX node "
        "'<Node(Reshape): y>': Check 'backward_compatible_check' failed at src/reshape_shape_inference.hpp:360",
        "its Reshape node y does not fit what comes in: sizes inside the file may not be those of its input",
    ),
    (
        'InvalidGraph: This is an invalid model. In Node, ("", Upsample, "", -1) : ("x": tensor(float),) -> '
        '("y": tensor(float),) , Error Op registered for Upsample is deprecated in domain_version of 13',
        "opset 13 has no operator Upsample any more",
    ),
    (
        "InvalidArgument: Invalid model. Node input 'lost' is not a graph input, initializer, or output of a previous "
        "node.",
        "a node reads lost, which is nowhere in the file",
    ),
    (
        "RuntimeError: Exception from src/core.cpp:84: Check 'false' failed at src/frontend.cpp:47: Loading input "
        'model Input tensor isn\'t found for node "lost"',
        "a node reads lost, which is nowhere in the file",
    ),
    (
        "Fail: Node () Op (MatMul) [ShapeInferenceError] Incompatible dimensions for matrix multiplication",
        "its MatMul node does not fit what comes in: Incompatible dimensions for matrix multiplication",
    ),
    (
        "RuntimeError: Exception from src/core.cpp:117: Exception from src/plugin.cpp:54: Check 'result' failed at "
        "src/dnnl_extension_utils.cpp:114: CPU plugin does not support f64 for use with oneDNN.",
        "CPU plugin does not support f64 for use with oneDNN.",
    ),
    ("no answer in 90 s", "no answer in 90 s"),
]


@pytest.mark.parametrize(("said", "told"), PAIRS)
def test_the_cause_comes_first(said: str, told: str) -> None:
    assert plain(said) == told


def test_what_nobody_knows_is_short() -> None:
    assert len(plain("RuntimeError: " + "word " * 200)) <= LONGEST + 4
