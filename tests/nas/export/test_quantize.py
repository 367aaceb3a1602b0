"""int8 by each tool, as a recipe says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from nas.data.pixels import IMAGENET
from nas.errors import UserError
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.preprocess import GivenPreprocess
from nas.export.onnx import write_onnx
from nas.export.options import FileOptions
from nas.export.quantize import Recipe, left_in_float, quantize
from search_spaces.registry import FAMILIES
from search_spaces.space import PARAMETERS

nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="nncf is not installed")
PIXELS = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest SHViT, with attention, at 32 px, of any batch size but for its file's."""
    path = tmp_path_factory.mktemp("full") / "full.onnx"
    arch = FAMILIES["shvit"].space.decode(dict.fromkeys(PARAMETERS, 0), 10)
    write_onnx(arch.replace(resolution=32), path, FileOptions(2))
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"vitnas.weights": "untrained"})
    model.producer_name = "vitnas"
    onnx.save(model, path)
    return path


def made(full: Path, folder: Path, recipe: Recipe) -> Path:
    path = folder / "int8.onnx"
    path.write_bytes(full.read_bytes())
    quantize(path, PIXELS, recipe)
    assert [found.name for found in folder.iterdir()] == ["int8.onnx"]
    return path


def logits(path: Path, runtime: str = "onnxruntime") -> np.ndarray:
    return OnnxFile.open(path, runtime, GivenPreprocess(IMAGENET), threads=1).logits(PIXELS)


def own_arithmetic(path: Path) -> np.ndarray:
    """What a file says: its numbers rounded as it tells, its sums in float32, whatever the CPU has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": PIXELS[i : i + 2]})[0] for i in (0, 2)])


def error_of(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


RECIPES = [
    Recipe(images=4),
    Recipe(ranges="entropy", images=4),
    Recipe(kept=("first", "last", "attention"), images=4),
    pytest.param(Recipe("nncf", images=4), marks=[nncf, pytest.mark.slow]),
    pytest.param(Recipe("nncf", "mse", ("first", "last"), True, 4), marks=nncf),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_file_is_the_same_network_and_right_on_every_cpu(recipe: Recipe, full: Path, tmp_path: Path) -> None:
    path = made(full, tmp_path, recipe)
    said = own_arithmetic(path)
    assert 0 < error_of(said, logits(full)) < 0.2
    for runtime in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(runtime):
            assert error_of(logits(path, runtime), said) < 0.1
    model = onnx.load(path)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    offsets = [constants[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert offsets
    assert all(offset.dtype == np.uint8 and offset.size == 1 for offset in offsets)
    producers = {name: node for node in model.graph.node for name in node.output}
    groups = {
        node.input[1]: next((each.i for each in node.attribute if each.name == "group"), 1)
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in producers
    }
    weights = [
        constants[producers[name].input[0]]
        for name, count in groups.items()
        if count == 1 and producers[name].input[0] in constants
    ]
    assert weights
    assert all(each.dtype == np.int8 and abs(each.astype(int)).max() <= 64 for each in weights)
    assert model.producer_name == "vitnas"
    assert {each.key: each.value for each in model.metadata_props} == {"vitnas.weights": "untrained"}


def test_what_is_left_in_float_is_listed(full: Path, tmp_path: Path) -> None:
    whole = left_in_float(onnx.load(made(full, tmp_path, Recipe())))
    less = left_in_float(onnx.load(made(full, tmp_path, Recipe(kept=("first", "last")))))
    original = onnx.load(full)
    layers = [node.name for node in original.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert set(less) - set(whole) == {layers[0], layers[-1]}
    assert any(line.endswith(" x softmax") for line in whole) == any(
        node.op_type == "Softmax" for node in original.graph.node
    )
    assert left_in_float(original)[: len(layers)] == tuple(layers)


def test_one_image_is_enough(full: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(full.read_bytes())
    quantize(path, PIXELS[:1], Recipe(images=100))
    assert any(each.data_type == TensorProto.INT8 for each in onnx.load(path).graph.initializer)


def test_a_tool_that_is_not_installed(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "int8.onnx"
    path.write_bytes(full.read_bytes())
    with pytest.raises(UserError, match=r"^nncf is not installed: pip install 'vitnas\[int8\]'$"):
        quantize(path, PIXELS, Recipe("nncf"))
    assert path.read_bytes() == full.read_bytes()


def test_recipes_say_what_they_do() -> None:
    assert str(Recipe()) == "ONNX Runtime, min-max of 16 images"
    assert str(Recipe("nncf", "mse", ("first", "last"), True, 1)) == (
        "NNCF, mse of 1 image, SmoothQuant, the first layer, the last layer in float"
    )
    for wrong in ({"ranges": "mse"}, {"smooth": True}, {"tool": "nncf", "ranges": "entropy"}):
        with pytest.raises(ValueError, match="does not have this"):
            Recipe(**wrong)
