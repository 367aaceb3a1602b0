"""ONNX export: static shapes, BatchNorm folded away, equal to PyTorch."""

import copy
import json
import os
import random
import re
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from nas.errors import UserError
from nas.export.agreement import agreement, check_images, logits_of, onnx_logits
from nas.export.card import Card
from nas.export.folder import export_folder, replace_network
from nas.export.onnx import to_onnx
from nas.export.options import FileOptions
from search_spaces import Arch, create_model, fold, get_arch, list_models
from search_spaces import tokens as token_choice
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS

DEFAULT = ("levit_128s", "evit_tiny_keep70_drop", "shvit_s1")
"""Smaller networks of every family are exported in test_files."""
NAMES = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in list_models()]


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
    assert difference(folded, path, check_images(arch.resolution, 2)) < 1e-4


def difference(folded: nn.Module, path, pixels: Tensor) -> float:
    """Largest difference over the largest logit, no image left out; the file's batch is 2."""
    wanted, found = logits_of(folded, pixels, 2), onnx_logits(path, pixels, 2)
    return abs(found - wanted).max() / abs(wanted).max()


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
"""Of random networks: the other ones are built alike."""


# Token keep rates


def halved(part):
    """An Arch's document with half of the tokens kept wherever all were."""
    if isinstance(part, dict):
        return {key: 0.5 if key == "keep_rate" and value == 1 else halved(value) for key, value in part.items()}
    return [halved(value) for value in part] if isinstance(part, list) else part


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flat_areas_are_chosen_alike_in_onnx(family, seed, tmp_path, helpers):
    """Half of the tokens kept wherever they can be."""
    raw, path = halved(helpers.document(helpers.random_arch(family, seed))), tmp_path / "model.onnx"
    if family == "levit":
        for stage in raw["stages"][:-1]:
            stage["keep_rate"] = 1.0
    if family == "evit":
        for block in raw["blocks"]:
            block["keep_rate"] = 0.5 if block["attn"] else 1.0
    arch = helpers.read(raw)
    folded = fold(randomise(create_model(arch)))
    to_onnx(folded, path, arch.resolution, 2)
    on_white = torch.full((2, 3, 16, 16), 2.4)
    on_white[:, :, 8:, 8:] = check_images(16, 1)[:2, :, 8:, 8:]
    agreement(folded, path, arch.resolution, FileOptions(2), on_white.numpy())


def merging() -> Arch:
    """36 patches: 36, 22 and 15 leave the blocks; attention then sees tokens of several sizes."""
    attn, ffn = {"heads": 2, "key_dim": 4, "value_dim": 4, "scale": 0.5}, {"hidden": 16}
    rates = (0.6, 0.65, 1.0)
    blocks = [{"attn": attn, "keep_rate": rate, "fuse": False, "merge": True, "ffn": ffn} for rate in rates]
    document = {"version": 1, "family": "evit", "resolution": 48, "num_classes": 5, "patch_size": 8, "embed_dim": 12}
    return Arch.from_json(json.dumps(document | {"blocks": blocks}))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_merged_tokens_are_the_same_in_other_runtimes(runtime, tmp_path):
    """What merges is decided image by image, how much is not."""
    arch, path = merging(), tmp_path / "model.onnx"
    folded = fold(randomise(create_model(arch)))
    to_onnx(folded, path, arch.resolution, 8)
    graph = onnx.load(path).graph
    assert [dim.dim_value for value in (*graph.input, *graph.output) for dim in value.type.tensor_type.shape.dim] == [
        *(8, 3, 48, 48),
        *(8, 5),
    ]
    pixels = check_images(arch.resolution, 8)
    wanted = logits_of(folded, pixels, 8)
    if runtime == "onnxruntime":
        found = onnx_logits(path, pixels, 8)
    else:
        openvino = pytest.importorskip("openvino")
        found = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels.numpy())[0]
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_irregular_networks_are_the_same_in_float64(family, seed, tmp_path, helpers, monkeypatch):
    """Noise, one colour, between bars. In float32 some of these are too badly conditioned to compare: even the 1/6
    that a file has for Hardswish, float32 always, moves one by 0.6. Here PyTorch takes that too.
    """
    monkeypatch.setattr(nn.Hardswish, "forward", lambda _, x: x * (x * float(np.float32(1 / 6)) + 0.5).clamp(0, 1))
    arch, path = helpers.random_arch(family, seed), tmp_path / "model.onnx"
    x = torch.cat((helpers.image(arch, 2, seed), check_images(arch.resolution, 1)[1:3].double()))
    folded = fold(helpers.calibrate(helpers.build(arch, seed), x, seed))
    to_onnx(folded, path, arch.resolution, len(x))
    (found,) = ReferenceEvaluator(str(path)).run(None, {"images": x.numpy()})
    assert found.dtype == np.float64
    assert helpers.error(torch.from_numpy(found), folded(x)) < 1e-6


# The check


class Toy(nn.Module):
    """Logits that half of the tokens decide, by their place: (B, 3, 8, 8) -> (B, 64)."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return token_choice.on_strongest(tokens, 32, lambda rows: rows * 0 + 1).sum(2)


def test_the_check_sees_a_changed_network(tmp_path, helpers):
    arch, path = helpers.random_arch("shvit", 0), tmp_path / "model.onnx"
    folded = fold(create_model(arch))
    to_onnx(folded, path, arch.resolution, batch_size=1)
    line = str(agreement(folded, path, arch.resolution, FileOptions()))
    wanted = r"ONNX Runtime and PyTorch agree to \d\S* of the largest logit on 32 photographs and 8 images of noise; "
    assert re.fullmatch(wanted + "top-1 changed on 0 of 32", line)
    folded.head.bias.data += 1
    with pytest.raises(UserError, match=r"^the exported network disagrees with PyTorch by \d\S* of its largest logit$"):
        agreement(folded, path, arch.resolution, FileOptions())


def test_the_check_sees_another_choice_among_tied_tokens(tmp_path, monkeypatch):
    """Of noise the file chooses as PyTorch does."""
    path = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(token_choice, "TIE", -token_choice.TIE)
        to_onnx(Toy(), path, 8, 2)
    assert difference(Toy(), path, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))) == 0
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        agreement(Toy(), path, 8, FileOptions(2))


@pytest.mark.parametrize("shown", ["none", "all"])
def test_the_check_looks_at_given_images(shown, tmp_path):
    """A file that differs only where the given images have their colour."""

    class Aware(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) + (x.amin((1, 2, 3)) > 50).float().unsqueeze(1)

    path = tmp_path / "model.onnx"
    to_onnx(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), path, 8, 2)
    if shown == "none":
        assert agreement(Aware(), path, 8, FileOptions(2)).difference < 1e-4
    else:
        with pytest.raises(UserError, match="disagrees with PyTorch"):
            agreement(Aware(), path, 8, FileOptions(2), np.full((1, 3, 16, 16), 60, np.float32))


def jumpy(share: float) -> nn.Module:
    """A network whose logits hang on the last digits of a pixel, in some of the images."""

    class Jumpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x[:, :1].double().abs().sum((2, 3))
            digits = sum((total * 2.0**k).round() % 2 for k in range(18, 24))
            return x.mean((2, 3)) + (digits * (x[:, :1, 0, 0] < share)).float()

    return Jumpy()


def test_images_that_rounding_decides_are_left_out_and_told(tmp_path):
    path = tmp_path / "model.onnx"
    to_onnx(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), path, 8, 2)
    assert str(agreement(jumpy(-9), path, 8, FileOptions(2))).endswith(
        "and 8 images of noise; top-1 changed on 0 of 32"
    )
    found = agreement(jumpy(0), path, 8, FileOptions(2))
    assert found.real + found.made + found.left_out == 40
    assert found.left_out > 0
    assert found.others > 1e-3
    assert f" on {found.left_out} more, where rounding may keep other tokens; top-1 changed on " in str(found)
    to_onnx(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Plus()), path, 8, 2)
    with pytest.raises(UserError, match=r"^float32 is too coarse for this network: "):
        agreement(jumpy(9), path, 8, FileOptions(2))


class Plus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value, tmp_path):
    path, sound = tmp_path / "model.onnx", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    broken = copy.deepcopy(sound)
    broken[2].bias.data[3] = value
    to_onnx(broken, path, 8, 1)
    for network, name in ((broken, "PyTorch"), (sound, "ONNX Runtime")):
        with pytest.raises(
            UserError, match=f"^the network's logits in {name} are NaN or infinite on 40 of 40 images: "
        ):
            agreement(network, path, 8, FileOptions())


def test_a_network_that_gives_nan_leaves_an_earlier_export(tmp_path, helpers):
    model = create_model(helpers.random_arch("shvit", 0))
    card = Card.untrained(model.arch.resolution)
    replace_network(model, tmp_path / "out", FileOptions(), trained=True, card=card)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"arch.json", "model.onnx", "model.safetensors", "preprocess.json"}
    model.head.cls.linear.bias.data[0] = float("nan")
    for folder in ("out", "new"):
        with pytest.raises(UserError, match="NaN or infinite"):
            replace_network(model, tmp_path / folder, FileOptions(), trained=True, card=card)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("batch_size", "count"), [(1, 8), (3, 9), (8, 8), (20, 20)])
def test_the_images_of_the_check(batch_size, count):
    noise, colour, boxed, *_ = pixels = check_images(16, batch_size)
    assert pixels.shape == (count, 3, 16, 16)
    assert noise.std() > 0.5
    assert (colour == colour[:, :1, :1]).all()
    assert (boxed[:, :4] == colour[:, :4]).all()
    assert (boxed[:, 4:12] != colour[:, 4:12]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("points", "resolution"), [(1, 96), (12, None)])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_random_points_of_every_space_export(family, points, resolution, tmp_path):
    """Odd grids, dropped tokens, every form: what the search may ask for can be measured."""
    space, draw = FAMILIES[family].space, random.Random(1)
    for _ in range(points):
        arch = space.decode({name: draw.randrange(LEVELS) for name in PARAMETERS}, 10, resolution)
        folded = fold(create_model(arch))
        to_onnx(folded, tmp_path / "model.onnx", arch.resolution, batch_size=1)
        onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("form", "resolution"),
    [
        ("linear", 176),
        ("conv", 208),
        *(
            pytest.param(form, resolution, marks=pytest.mark.slow)
            for form, resolution in (("linear", 128), ("linear", 208), ("conv", 128), ("conv", 176))
        ),
    ],
)
def test_levit_exports_on_odd_grids(form, resolution, tmp_path):
    arch = get_arch("levit_128s", num_classes=10).replace(form=form, resolution=resolution)
    folded = fold(randomise(create_model(arch)))
    to_onnx(folded, tmp_path / "model.onnx", resolution, batch_size=1)
    agreement(folded, tmp_path / "model.onnx", resolution, FileOptions())


def tiny_evit() -> Arch:
    block = {"attn": {"heads": 2, "key_dim": 4, "value_dim": 4, "scale": 0.5}, "keep_rate": 1.0, "fuse": False}
    document = {"version": 1, "family": "evit", "resolution": 32, "num_classes": 2, "patch_size": 8, "embed_dim": 8}
    return Arch.from_json(json.dumps(document | {"blocks": [block | {"ffn": {"hidden": 16}}]}))


def test_what_became_of_the_weights_is_told(tmp_path):
    state = create_model(tiny_evit()).state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "model_ema": state}, path)
    line = export_folder(tiny_evit(), tmp_path / "out", str(path), None, FileOptions())
    assert "with the given weights (taken from model, not model_ema; prefix module. stripped)" in line


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (1, "of 1 class and .* add --num-classes 1,"),
        (7, "add --num-classes 7,"),
        (None, "has no classifier: `vitnas train --weights`"),
    ],
)
def test_a_network_without_a_trained_classifier_is_not_exported(classes, words, tmp_path):
    state = {name: value for name, value in create_model(tiny_evit()).state_dict().items() if "head" not in name}
    if classes:
        state |= {"head.weight": torch.ones(classes, 8), "head.bias": torch.ones(classes)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=words):
        export_folder(tiny_evit(), tmp_path / "out", str(tmp_path / "weights.pth"), None, FileOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_another_size_are_refused_in_words(family, helpers):
    arch = helpers.random_arch(family, 0)
    size = arch.resolution
    for network in (model := create_model(arch).eval(), fold(model)):
        for shape, got in (((64, 64), "64 px"), ((size, size + 32), f"{size}x{size + 32} px")):
            if shape == (size, size):
                continue
            with pytest.raises(ValueError, match=f"^{family} built for {size} px got {got}: build it from "):
                network(torch.zeros(1, 3, *shape))
    assert model(torch.zeros(1, 3, size, size)).shape == (1, arch.num_classes)


def test_the_check_of_sizes_is_in_no_graph(tmp_path):
    """Nor does it break one that torch.compile records."""
    model = fold(create_model(tiny_evit()))
    to_onnx(model, tmp_path / "checked.onnx", 32, 1)
    recorded = torch.export.export(model, (torch.zeros(1, 3, 32, 32),))
    model._forward_pre_hooks.clear()
    to_onnx(model, tmp_path / "bare.onnx", 32, 1)
    assert (tmp_path / "checked.onnx").read_bytes() == (tmp_path / "bare.onnx").read_bytes()
    again = torch.export.export(model, (torch.zeros(1, 3, 32, 32),))
    assert [node.target for node in recorded.graph.nodes] == [node.target for node in again.graph.nodes]


def test_another_family_s_weights_are_named_without_their_prefix(tmp_path, helpers):
    state = create_model(helpers.random_arch("shvit", 0)).state_dict()
    torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"they have stem\.0") as refused:
        export_folder(tiny_evit(), tmp_path / "out", str(tmp_path / "weights.pth"), None, FileOptions())
    assert "module" not in str(refused.value)


def test_files_have_the_mode_that_the_umask_allows(tmp_path, helpers):
    before = os.umask(0o022)
    try:
        model = create_model(helpers.random_arch("shvit", 0))
        replace_network(model, tmp_path / "out", FileOptions(), trained=True, card=Card(classes=["a"]))
    finally:
        os.umask(before)
    files = list((tmp_path / "out").iterdir())
    assert {"model.safetensors", "model.onnx", "labels.txt"} <= {path.name for path in files}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert (made.producer_name, made.producer_version) == ("vitnas", version("vitnas"))
