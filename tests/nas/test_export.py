"""ONNX export: static shapes, BatchNorm folded away, equal to PyTorch."""

import random

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from nas.export import disagreement, to_onnx
from search_spaces import create_model, fold, get_arch, list_models
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS

SMALLEST = (
    "levit_128s",
    "efficientvit_m0",
    "deit_tiny",
    "evit_tiny_keep50",
    "evit_tiny_keep70_drop",
    "shvit_s1",
    "sepvit_lite",
)
NAMES = [name if name in SMALLEST else pytest.param(name, marks=pytest.mark.slow) for name in list_models()]


def randomise(model: nn.Module) -> nn.Module:
    """Statistics, gammas, biases and bias tables away from their initial zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.dtype.is_floating_point:
            continue
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.data.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim == 1 or name.endswith(("table", "window_token")):
            value.data.normal_(0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_export(name, tmp_path):
    arch, path = get_arch(name), tmp_path / "model.onnx"
    folded = fold(randomise(create_model(arch)))
    to_onnx(folded, path, arch.resolution, batch_size=2)
    graph = onnx.load(path).graph
    kinds = {node.op_type for node in graph.node}
    assert "BatchNormalization" not in kinds
    for value in (*graph.input, *graph.output):
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim)
    assert disagreement(folded, path, arch.resolution, batch_size=2) < 1e-4


def test_disagreement_sees_a_changed_network(tmp_path):
    arch, path = get_arch("shvit_s1"), tmp_path / "model.onnx"
    folded = fold(randomise(create_model(arch)))
    to_onnx(folded, path, arch.resolution, batch_size=1)
    folded.head.bias.data += 1
    assert disagreement(folded, path, arch.resolution, batch_size=1) > 1e-2


@pytest.mark.parametrize(("points", "resolution"), [(2, 96), pytest.param(12, None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_random_points_of_every_space_export(family, points, resolution, tmp_path):
    """Odd grids, dropped tokens, every form: what the search may ask for can be measured."""
    space, draw = FAMILIES[family].space, random.Random(1)
    for _ in range(points):
        arch = space.decode({name: draw.randrange(LEVELS) for name in PARAMETERS}, 10, resolution)
        folded = fold(create_model(arch))
        to_onnx(folded, tmp_path / "model.onnx", arch.resolution, batch_size=1)
        onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("resolution", [128, 176, 208])
@pytest.mark.parametrize("form", ["linear", "conv"])
def test_levit_exports_on_odd_grids(form, resolution, tmp_path):
    arch = get_arch("levit_128s", num_classes=10).replace(form=form, resolution=resolution)
    folded = fold(randomise(create_model(arch)))
    to_onnx(folded, tmp_path / "model.onnx", resolution, batch_size=1)
    assert disagreement(folded, tmp_path / "model.onnx", resolution, batch_size=1) < 1e-4
