"""Every runtime against one contract, what the settings are checked for, and int8 quantisation."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
from onnx import TensorProto, helper

from nas.errors import UserError
from nas.export.artifact import lower_precision, write_artifact
from nas.export.onnx import write_onnx
from nas.export.options import FileOptions
from nas.export.quantize import IMAGES, batches
from nas.machine import usable_cpus
from nas.measure import runtime
from nas.measure.device import check_settings
from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.runtimes.ort import bound
from nas.measure.runtimes.pytorch import fixed_images
from nas.networks.build import build, from_document
from nas.networks.timm_network import TimmNetwork
from search_spaces import Arch, get_arch
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS

# Largest norm of the error over the norm of PyTorch's float32 logits.
TOLERANCES = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 3e-2, "fp16": 1e-2, "int8": 0.15}
SLOW = ("torch.compile",)  # most of a minute to compile
CASES = [
    pytest.param(Settings(name, device, 1, batch_size, precision), marks=[pytest.mark.slow] if name in SLOW else [])
    for name, entry in RUNTIMES.items()
    for device, precisions in entry.precisions.items()
    for precision in precisions
    for batch_size in ((1, 4) if precision == "fp32" else (4,))
]


def label(settings: Settings) -> str:
    return f"{settings.runtime}-{settings.device}-{settings.precision}-{settings.batch_size}"


def smallest(family: str) -> Arch:
    """With all tokens kept: a token more or less is no rounding error."""
    levels = {name: LEVELS - 1 if name.startswith("keep") else 0 for name in PARAMETERS}
    return FAMILIES[family].space.decode(levels, 10)


def check_or_skip(settings: Settings) -> None:
    try:
        check_settings(settings)
    except UserError as error:
        pytest.skip(str(error))


def expected(network: Arch | TimmNetwork, batch_size: int) -> np.ndarray:
    images = torch.from_numpy(fixed_images((batch_size, 3, network.resolution, network.resolution)))
    with torch.inference_mode():
        return build(network)(images).numpy()


def as_numpy(logits: object) -> np.ndarray:
    if isinstance(logits, torch.Tensor):
        return logits.float().cpu().numpy()
    return np.array(logits.numpy() if hasattr(logits, "numpy") else logits, np.float32)


def error_of(found: object, wanted: np.ndarray) -> float:
    found = as_numpy(found)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(autouse=True)
def restored_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the contract ---


@pytest.mark.parametrize("settings", CASES, ids=label)
def test_a_runtime_computes_the_network(settings: Settings, tmp_path: Path) -> None:
    check_or_skip(settings)
    network = smallest("sepvit")
    infer = RUNTIMES[settings.runtime].load(write_artifact(network, settings, tmp_path / "a.b"), settings)
    wanted, tolerance = expected(network, settings.batch_size), TOLERANCES[settings.precision]
    with torch.inference_mode():
        logits = infer()
        error = error_of(logits, wanted)
        assert error < tolerance
        assert settings.precision == "fp32" or error > 1e-4  # really in less precision
        if settings.device == "cpu":
            logits[:] = 0  # what follows is computed anew
            assert error_of(infer(), wanted) == error


def test_the_contract_sees_other_images() -> None:
    wanted = expected(smallest("sepvit"), 4)
    assert error_of(wanted[::-1], wanted) > 2 * max(TOLERANCES.values())


@pytest.mark.skipif(len(usable_cpus()) < 2, reason="one CPU: nothing to limit")
@pytest.mark.parametrize("name", [name for name, r in RUNTIMES.items() if "cpu" in r.devices and name not in SLOW])
def test_threads_are_limited(name: str, tmp_path: Path) -> None:
    """Threads that work; torch.compile shares `place` with eager."""
    process = psutil.Process()

    def seconds() -> dict[int, float]:
        return {thread.id: thread.user_time for thread in process.threads()}

    def worked() -> list[float]:
        """Since `before`, the busiest thread first."""
        return sorted((after - before.get(thread, 0) for thread, after in seconds().items()), reverse=True)

    path = write_artifact(get_arch("shvit_s1"), Settings(name, batch_size=4), tmp_path / "a")
    for threads in (1, 2):
        settings = Settings(name, "cpu", threads, 4)
        check_or_skip(settings)
        infer = RUNTIMES[name].load(path, settings)
        infer()
        before, started, busy = seconds(), time.perf_counter(), [0.0]
        while time.perf_counter() < started + 60 and (busy[0] < 0.3 or sum(s > 0.03 for s in busy) < threads):
            infer()
            busy = worked()
        assert sum(s > 0.03 for s in busy) == threads


# --- ONNX files that cannot be timed ---


def onnx_file(path: Path, *shapes: tuple[int | str, ...], kind: int = TensorProto.FLOAT) -> Path:
    inputs = [helper.make_tensor_value_info(f"in{i}", kind, shape) for i, shape in enumerate(shapes)]
    nodes = [helper.make_node("Max", [value.name for value in inputs], ["out"])]
    output = helper.make_tensor_value_info("out", kind, None)
    graph = helper.make_graph(nodes, "sum", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("shapes", "kind", "message"),
    [
        ([("n", 3, 8, 8)], TensorProto.FLOAT, "needs a static input shape, has "),
        (
            [(1, 3, 8, 8)] * 2,
            TensorProto.FLOAT,
            r"needs one input of float32, .*, has in0 \(float32\), in1 \(float32\)$",
        ),
        ([(1, 3, 8, 8)], TensorProto.INT32, r"needs one input of float32, .*, has in0 \(.*32.*\)$"),
        ([(2, 3, 8, 8)], TensorProto.FLOAT, r"input shape \[2, 3, 8, 8\] does not start with batch size 1$"),
    ],
)
def test_files_that_cannot_be_timed(name: str, shapes: list, kind: int, message: str, tmp_path: Path) -> None:
    settings = Settings(name)
    check_or_skip(settings)
    with pytest.raises(ValueError, match=message) as error:
        RUNTIMES[name].load(onnx_file(tmp_path / "a.onnx", *shapes, kind=kind), settings)
    assert "\n" not in str(error.value)


# --- CUDA, as far as it shows without a GPU ---


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_is_refused(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    path = onnx_file(tmp_path / "a.onnx", (1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="could not start CUDAExecutionProvider and fell back to CPU"):
        RUNTIMES["onnxruntime"].load(path, Settings("onnxruntime", "cuda"))


def test_bound_memory(tmp_path: Path) -> None:
    """What is used on CUDA, here with the CPU's memory."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file(tmp_path / "a.onnx", (1, 3, 8, 8)))
    images = fixed_images((1, 3, 8, 8))
    assert error_of(bound(session, "in0", images, "cpu")(), images) == 0


def test_half_precision_file(tmp_path: Path) -> None:
    """The file for fp16 on CUDA, run on the CPU, which computes it in fp32."""
    import onnxruntime

    network = smallest("sepvit")
    path = write_artifact(network, Settings("onnxruntime", "cuda", precision="fp16"), tmp_path / "a")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(float16)"
    images = fixed_images((1, 3, network.resolution, network.resolution)).astype(np.float16)
    found = session.run(None, {"images": images})[0]
    assert found.dtype == np.float16
    assert error_of(found, expected(network, 1)) < TOLERANCES["fp16"]


# --- settings ---


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (major, minor))

    return pretend


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(precision="int9"), "unknown precision 'int9': did you mean int8"),
        (Settings(precision="half"), "unknown precision 'half': choose from fp32, tf32, bf16, fp16, int8"),
        (
            Settings(precision="bf16"),
            "runtime onnxruntime has fp32, int8 on cpu, not bf16: bf16 is in torch, torch.compile, openvino",
        ),
        (
            Settings("torch", precision="tf32"),
            "runtime torch has fp32, bf16 on cpu, not tf32: no runtime has tf32 on cpu",
        ),
        (Settings("torch", "cuda", precision="int8"), "no runtime has int8 on cuda"),
        (
            Settings("cudagraphs"),
            "runtime cudagraphs does not run on cpu: use torch or torch.compile or onnxruntime or openvino",
        ),
        (Settings("openvino", "cuda"), "runtime openvino does not run on cuda: use "),
        (Settings(device="tpu"), "unknown device 'tpu': "),
        (Settings(device="mars"), "unknown device 'mars': choose from cpu, cuda, ssh://user@host"),
        (Settings(batch_size=-1), "batch size is -1: give 1 or more"),
        (
            Settings(batch_size=10**9),
            r"batch size is 1000000000: its images alone take 602,112.0 GB, this machine has ",
        ),
    ],
)
def test_settings_that_cannot_be_measured(settings: Settings, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_settings(settings)
    assert "\n" not in str(error.value)


def test_absent_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^openvino is not installed: pip install 'vitnas\[openvino\]'$"):
        check_settings(Settings("openvino"))


def test_what_a_gpu_lacks(gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(7, 5)
    check_settings(Settings("cudagraphs", "cuda", precision="fp16"))
    with pytest.raises(UserError, match=r"bf16 needs a GPU of compute capability 8.0 or more, this one has 7.5"):
        check_settings(Settings("cudagraphs", "cuda", precision="bf16"))
    gpu(9, 0)
    check_settings(Settings("torch", "cuda", precision="tf32"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="has no CUDAExecutionProvider: pip uninstall onnxruntime, then pip install"):
        check_settings(Settings("onnxruntime", "cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorrt" else name)
    with pytest.raises(UserError, match="TensorRT is not installed: pip install tensorrt"):
        check_settings(Settings("tensorrt", "cuda"))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"torch.compile on cpu needs a C\+\+ compiler"):
        check_settings(Settings("torch.compile"))


@pytest.mark.parametrize(
    ("cpuinfo", "able"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16_not\nbugs\t: bf16\n", False),
        (None, False),
    ],
)
def test_cpus_with_bf16(cpuinfo: str | None, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo:
        path.write_text(cpuinfo)
    assert (runtime.no_bf16(path) is None) == able


@pytest.mark.parametrize("name", ["torch", "torch.compile", "openvino"])
def test_bf16_is_not_emulated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("eager", "openvino"):
        monkeypatch.setattr(f"nas.measure.runtimes.{module}.no_bf16", lambda: "this CPU shows no bf16")
    with pytest.raises(UserError, match="this CPU shows no bf16"):
        check_settings(Settings(name, precision="bf16"))


def test_versions() -> None:
    assert RUNTIMES["torch.compile"].version() == RUNTIMES["torch"].version()


# --- what runtimes are given ---


@pytest.mark.parametrize("network", [get_arch("levit_128s", 7), TimmNetwork("lcnet_050", 96)], ids=["arch", "timm"])
def test_documents(network: Arch | TimmNetwork) -> None:
    assert from_document(network.to_json()) == network


def test_a_timm_network(tmp_path: Path) -> None:
    """Folded, and at another resolution than its own."""
    network = TimmNetwork("levit_128s", 160)
    assert not any("BatchNorm" in type(module).__name__ for module in build(network).modules())
    settings = Settings(batch_size=2)
    infer = RUNTIMES["onnxruntime"].load(write_artifact(network, settings, tmp_path / "a"), settings)
    assert error_of(infer(), expected(network, 2)) < TOLERANCES["fp32"]


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0", "evit_tiny_keep50", "shvit_s1", "sepvit_lite"])
def test_random_weights_carry_the_image_to_the_logits(name: str) -> None:
    logits = expected(get_arch(name), 2)
    assert 0.02 < logits.std() < 100
    assert logits.std(axis=0).mean() > 0.01 * logits.std()


def test_weights_and_the_callers_randomness_are_apart() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    one = expected(smallest("shvit"), 1)
    assert torch.rand(1) == wanted
    assert (expected(smallest("shvit"), 1) == one).all()


# --- int8 ---


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "full.onnx"
    write_onnx(smallest("shvit"), path, FileOptions(2))
    return path


def int8(full: Path, path: Path, calibration: np.ndarray | None = None, name: str = "onnxruntime") -> onnx.ModelProto:
    path.write_bytes(full.read_bytes())
    lower_precision(path, Settings(name, batch_size=2, precision="int8"), calibration)
    return onnx.load(path)


@pytest.fixture(scope="module")
def quantised(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full` in int8, calibrated on noise; alone in its folder."""
    path = tmp_path_factory.mktemp("quantised") / "int8.onnx"
    int8(full, path)
    return path


def image_scale(model: onnx.ModelProto) -> tuple[float, int]:
    """Scale and zero point that the images are quantised with."""
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images")
    scale, zero = (
        onnx.numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))
        for name in node.input[1:]
    )
    return float(scale), int(zero)


def own_arithmetic(path: Path, batch_size: int, resolution: int) -> np.ndarray:
    """What an int8 file says: its numbers rounded as it tells, its sums in float32, whatever the CPU has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": fixed_images((batch_size, 3, resolution, resolution))})[0]


def test_int8_is_int8_and_the_same_network(full: Path, quantised: Path) -> None:
    """A runtime rounds as the file says, give or take a step: off by 0.04 at most; kernels that saturate, by 0.2."""
    network, model = smallest("shvit"), onnx.load(quantised)
    in_int8 = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convs
    assert all(node.input[0] in in_int8 and node.input[1] in in_int8 for node in convs)
    assert quantised.stat().st_size < 0.5 * full.stat().st_size
    assert [found.name for found in quantised.parent.iterdir()] == ["int8.onnx"]
    said = own_arithmetic(quantised, 2, network.resolution)
    assert error_of(said, expected(network, 2)) < 0.06
    for name in ("onnxruntime", "openvino"):
        settings = Settings(name, batch_size=2, precision="int8")
        check_or_skip(settings)
        assert error_of(RUNTIMES[name].load(quantised, settings)(), said) < 0.1


def test_int8_weights_do_not_saturate(full: Path, quantised: Path, tmp_path: Path) -> None:
    """Two products of an unsigned byte and a weight fit into 16 bits; one file for all runtimes."""
    model = onnx.load(quantised)
    weights = [
        onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8
    ]
    weights = [weight for weight in weights if weight.ndim > 1]
    assert weights
    assert all(2 * 255 * int(abs(weight.astype(int)).max()) < 2**15 for weight in weights)
    assert image_scale(model)[1] > 0  # unsigned, with an offset
    assert int8(full, tmp_path / "b.onnx", name="openvino") == model


def test_int8_is_calibrated_on_the_given_images(full: Path, quantised: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(1).uniform(0, 51, (5, 3, 40, 40)).astype(np.float32)
    scale, zero = image_scale(int8(full, tmp_path / "a.onnx", images))
    assert 0.15 < scale <= 0.2  # 51 in 255 steps; resizing to the network's resolution smooths
    assert zero == 0
    scale, zero = image_scale(onnx.load(quantised))
    assert 0.02 < scale < 0.05  # noise, about -4.5 to 4.5
    assert 100 < zero < 155


def test_calibration_batches() -> None:
    images = np.arange(3 * 3 * 4 * 4, dtype=np.float32).reshape(3, 3, 4, 4)
    found = batches((2, 3, 4, 4), images)
    assert [batch.shape for batch in found] == [(2, 3, 4, 4)] * (IMAGES // 2)
    assert (found[0] == images[:2]).all()
    assert (found[1] == images[[2, 0]]).all()
    assert [batch.shape for batch in batches((100, 3, 8, 8), None)] == [(100, 3, 8, 8)]
    assert batches((1, 3, 8, 8), images)[2].shape == (1, 3, 8, 8)
