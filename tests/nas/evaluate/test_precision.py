"""What int8 costs, and the gate that it has to pass."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from nas.data.dataset import ImageData
from nas.data.images import Images, plain_transform
from nas.data.pixels import Pixels
from nas.errors import UserError
from nas.evaluate import precision
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.precision import (
    HeldOut,
    Price,
    deployed_right,
    in_torch,
    lower_within,
    quantize_within,
    write_lower,
)
from nas.export.card import Card, load_onnx
from nas.export.folder import save_weights
from nas.export.onnx import label_onnx, to_file, to_onnx
from nas.export.options import OPSETS, FileOptions
from nas.export.quantize import Recipe, check_max_drop
from nas.measure.runtime import Settings
from search_spaces import create_model, get_arch

SIDE = 16


@pytest.fixture(scope="module")
def sources() -> list[np.ndarray]:
    """40 noisy images of one grey each, darker or lighter."""
    draw = np.random.default_rng(0)
    greys = np.where(np.arange(40) % 2, 150, 100) + draw.integers(-20, 20, 40)
    noise = draw.integers(-30, 30, (40, SIDE, SIDE, 3))
    return list((greys[:, None, None, None] + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def held(sources: list[np.ndarray]) -> HeldOut:
    return HeldOut(Images(sources, [i % 2 for i in range(40)], plain_transform(SIDE)))


def small() -> torch.nn.Module:
    """(B, 3, SIDE, SIDE) -> (B, 2)."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 2),
    ).eval()


@pytest.fixture
def full(tmp_path: Path, sources: list[np.ndarray]) -> Path:
    """A network that knows dark from light, and says how images become its input."""
    network = small()
    pixels, labels = calibration(sources), torch.arange(40) % 2
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(torch.from_numpy(pixels)), labels).backward()
        optimizer.step()
    path = tmp_path / "full.onnx"
    to_onnx(network, path, SIDE, 1)
    label_onnx(path, None, True, Card.untrained(SIDE))
    return path


def calibration(sources: list[np.ndarray]) -> np.ndarray:
    images = Images(sources, [0] * len(sources), plain_transform(SIDE))
    return np.stack([images[i][0] for i in range(len(images))])


def test_held_out_images_are_counted_as_the_file_answers(full: Path, held: HeldOut) -> None:
    right = held.right(full, threads=1)
    assert right.shape == (40,)
    assert right.mean() > 0.8
    other = HeldOut(held.images, outputs=(1, 0))
    assert (other.right(full, threads=1) == ~right).all()
    broken = Images(["missing.jpg", *held.images.sources], [0, *held.images.labels], held.images.transform)
    assert (HeldOut(broken).right(full, threads=1) == right).all()
    with pytest.raises(UserError, match=r"^none of 1 held-out image can be decoded$"):
        HeldOut(broken.pick([0])).right(full, threads=1)


def test_the_first_recipe_within_the_gate_is_taken(full: Path, held: HeldOut, sources: list[np.ndarray]) -> None:
    answers = held.right(full, threads=1)
    top1 = 100 * answers.mean()
    price = quantize_within(full, calibration(sources)[:9], held, max_drop=20, threads=1)
    assert (price.recipe, price.tried, price.within) == (Recipe(images=9), 1, True)
    assert price.float_top1 == top1
    assert price.top1 == 100 * held.right(full, threads=1).mean() == pytest.approx(top1 - price.drop)
    lower = held.right(full, threads=1)
    assert (price.lost, price.gained) == ((answers & ~lower).sum(), (lower & ~answers).sum())
    assert price.drop_ci[0] <= price.drop <= price.drop_ci[1]
    assert price.images == 40
    assert any(each.op_type == "QuantizeLinear" for each in onnx.load(full).graph.node)
    assert [each.name for each in full.parent.iterdir()] == ["full.onnx"]


def test_of_recipes_over_the_gate_the_best_is_taken(
    full: Path, held: HeldOut, sources: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its drop; a tool that fails, and one that is not installed, are told, also where the next recipe is within."""
    wrong = iter([10, 4, 6])

    def quantized(path: Path, images: np.ndarray, recipe: Recipe) -> None:
        if recipe.smooth:
            raise RuntimeError("no such layer\nat all")
        made[path] = next(wrong, 0)

    made: dict[Path, int] = {}
    right = HeldOut.right

    def judged(self: HeldOut, path: Path, *rest: object) -> np.ndarray:
        return np.arange(40) >= made[path] if path in made else np.ones(40, bool)

    monkeypatch.setattr(precision, "quantize", quantized)
    monkeypatch.setattr(HeldOut, "right", judged)
    monkeypatch.setattr(Recipe, "installed", property(lambda self: self.ranges != "mse"))
    recipes = [Recipe(), Recipe("nncf", smooth=True), Recipe("nncf", "mse"), Recipe("nncf"), Recipe(ranges="entropy")]
    price = quantize_within(full, calibration(sources), held, threads=1, recipes=recipes)
    assert (price.recipe, price.tried, price.drop, price.within) == (Recipe("nncf"), 3, 10, False)
    assert price.refusal == (
        "int8 costs 10.0 points of top-1 (95% of the drop: -0.6 to 23.1): 90.0% beside 100.0%, 40 images, "
        "onnxruntime; NNCF, min-max of 16 images, the best of 3 recipes: more than --max-drop 1 allows"
    )
    assert price.notes == (
        "NNCF, min-max of 16 images, SmoothQuant fails on this network: no such layer",
        "not tried, since nncf is not installed (pip install 'vitnas[int8]'): NNCF, mse of 16 images",
    )
    assert price.lines[2:4] == [
        "only fp32 is right on 4 of the images, only int8 on 0",
        "the recipe was chosen on these images: on others it may cost a little more",
    ]
    assert quantize_within(full, calibration(sources), held, threads=1, recipes=recipes[1:4]).notes == price.notes
    monkeypatch.setattr(HeldOut, "right", right)
    content = full.read_bytes()
    with pytest.raises(UserError, match=r"^this network cannot be quantised: NNCF, .* no such layer$"):
        quantize_within(full, calibration(sources), held, threads=1, recipes=recipes[1:2])
    assert full.read_bytes() == content


def test_too_few_images_are_told(full: Path, held: HeldOut, sources: list[np.ndarray]) -> None:
    content = full.read_bytes()
    with pytest.raises(UserError, match=r"^int8 is calibrated on 3 training images: give 8 or more$"):
        quantize_within(full, calibration(sources)[:3], held, threads=1)
    assert full.read_bytes() == content
    price = quantize_within(full, calibration(sources), HeldOut(held.images.pick(range(6))), max_drop=100, threads=1)
    assert "6 held-out images are too few to tell a drop of 100" not in price.lines
    assert "6 held-out images are too few to tell a drop of 1" in replace(price, max_drop=1.0).lines


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_a_file_is_judged_on_its_own_runtime(full: Path, held: HeldOut, sources: list[np.ndarray]) -> None:
    price = quantize_within(full, calibration(sources), held, "openvino", 20, 1)
    assert price.runtime == "openvino"
    assert price.top1 == 100 * held.right(full, "openvino", 1).mean()


def test_a_file_is_calibrated_and_judged_by_the_classes_that_it_names(
    full: Path, held: HeldOut, sources: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the other order here; what calibrates is not what judges."""
    label_onnx(full, None, True, Card.untrained(SIDE).model_copy(update={"classes": ["dark", "light"]}))
    top1 = 100 * held.right(full, threads=1).mean()
    given = []
    monkeypatch.setattr(precision, "quantize", lambda path, images, recipe: given.append(images))
    others = Images([*sources[:9], "missing.jpg"], [0, 1] * 5, held.images.transform)
    swapped = Images(sources, [1 - label for label in held.images.labels], held.images.transform)
    data = ImageData("greys", ["light", "dark"], others, others, swapped, demo=False)
    price = precision.quantize_file(full, data, "mine")
    assert (price.float_top1, price.drop, price.recipe.images) == (top1, 0, 9)
    assert np.allclose(given[0], calibration(sources)[:9])
    label_onnx(full, None, True, Card.untrained(SIDE).model_copy(update={"classes": ["dark", "grey"]}))
    with pytest.raises(UserError, match=r"^mine does not know light "):
        precision.quantize_file(full, data, "mine")


def test_words() -> None:
    price = Price(Recipe(), "onnxruntime", 200, 80.0, 80.5, -0.5, (-1.5, 0.5), 1.0, 1, ("2 x softmax",))
    assert price.within
    assert str(price) == (
        "int8 gains 0.5 points of top-1 (95% of the drop: -1.5 to 0.5): 80.5% beside 80.0%, 200 images, onnxruntime; "
        "ONNX Runtime, min-max of 16 images"
    )
    check_max_drop(1.0, judges=False)
    with pytest.raises(UserError, match=r"^--max-drop is for int8, fp16 or bf16 that images judge: add --pre"):
        check_max_drop(2.0, judges=False)
    for wrong in (-1, 101, float("nan")):
        with pytest.raises(UserError, match=r"^--max-drop is "):
            check_max_drop(wrong)


def test_fp16_is_judged_by_its_own_file(full: Path, held: HeldOut) -> None:
    """On this machine, with its own threads, whatever another one has."""
    top1 = 100 * held.right(full, threads=1).mean()
    price = lower_within(full, Settings("onnxruntime", "ssh://board", 1_000, precision="fp16"), held, 100.0)
    half = {tensor.data_type for tensor in onnx.load(full).graph.initializer}
    assert half == {onnx.TensorProto.FLOAT16}
    assert (price.precision, price.recipe, price.as_timed) == ("fp16", None, True)
    assert (price.float_top1, price.top1) == (top1, 100 * held.right(full, threads=1).mean())
    assert price.lines[0].startswith("fp16 costs ")
    assert price.lines[0].endswith("40 images, onnxruntime, computed in float32 here")
    assert not any("left in float" in line for line in price.lines)


def test_fp16_with_values_beyond_its_largest_is_infeasible(full: Path, held: HeldOut) -> None:
    """Whatever it costs on a CPU, which computes in float32."""
    model = onnx.load(full)
    nodes, scaled = list(model.graph.node), list[onnx.NodeProto]()
    place = next(i for i, node in enumerate(nodes) if node.op_type == "GlobalAveragePool")
    for i, factor in enumerate((1e2, 8e3, 1 / 8e3, 1e-2)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), f"factor{i}"))
        scaled.append(onnx.helper.make_node("Mul", [nodes[place].input[0], f"factor{i}"], [f"scaled{i}"], f"scaled{i}"))
        nodes[place].input[0] = f"scaled{i}"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *scaled, *nodes[place:]])
    onnx.save(model, full)
    price = lower_within(full, Settings(precision="fp16"), held, 100.0)
    assert (price.within, price.drop < 50) == (False, True)
    assert re.search(
        r"^infeasible: fp16 .*: float16 ends at 65,504, and \d values? of this network pass it, the first scaled1$",
        price.lines[0],
    )


class Small:
    """Stands for an Arch whose network takes images of this size."""

    resolution = SIDE

    def to_json(self) -> str:
        return "{}"


@pytest.mark.parametrize("lower", ["int8", "fp16"])
def test_what_is_chosen_of_a_file_holds_in_lower_precisions(
    lower: str, tmp_path: Path, sources: list[np.ndarray], held: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both runtimes: what it takes and gives, and that it answers as the file of which nothing is chosen."""
    network = small()

    def write(_: Small, weights: Path, path: Path, options: FileOptions, card: Card) -> None:
        to_file(network, path, SIDE, options, card.pixels)
        label_onnx(path, None, True, card.of_file(options))

    monkeypatch.setattr(precision, "write_trained", write)
    monkeypatch.setattr(precision, "RECIPES", (Recipe(),))
    pixels = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear", 1.0)
    images = held.images
    data = ImageData("greys", ["dark", "light"], images, images, images, demo=False).at(SIDE, pixels=pixels)
    path, pictures = tmp_path / "model.onnx", [Image.fromarray(each) for each in sources[:5]]
    plain = None
    for chosen in (FileOptions(), FileOptions(in_graph=True), FileOptions(None, True, OPSETS[-1], True)):
        settings = Settings(precision=lower, batch_size=2)
        price = write_lower(Small(), tmp_path, path, data, data.val, settings, 100.0, file=chosen)
        assert Card.read(path).accuracy.top1 == price.top1 == 100 * HeldOut(data.val).right(path).mean()
        for runtime in ("onnxruntime", "openvino"):
            file = OnnxFile.open(path, runtime, threads=1)
            assert (file.batch_size, file.in_graph, file.probabilities, file.precision, file.classes) == (
                chosen.of_batch(2).batch_size,
                chosen.in_graph,
                chosen.probabilities,
                lower,
                ("dark", "light"),
            )
            kind = "uint8" if chosen.in_graph else "float16" if lower == "fp16" else "float32"
            assert (file.kind, file.channels_last) == (kind, chosen.in_graph)
            answers = file.softmax(np.stack([file.pixels(each) for each in pictures]))
            plain = answers if plain is None else plain
            assert abs(answers - plain).max() < 1e-2, (runtime, chosen)
        assert load_onnx(path).opset_import[0].version == chosen.opset


def test_bf16_is_judged_of_the_same_file(full: Path, held: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(self: HeldOut, path: Path, runtime: str, threads: int, bf16: bool = False) -> np.ndarray:
        assert (path, runtime) == (full, "openvino")
        return np.arange(40) >= 10 * bf16

    monkeypatch.setattr(HeldOut, "right", right)
    content = full.read_bytes()
    price = lower_within(full, Settings("openvino", precision="bf16"), held, 1.0)
    assert (price.top1, price.drop, price.within, full.read_bytes()) == (75, 25, False, content)
    assert price.refusal.startswith("bf16 costs 25.0 points")


def test_what_pytorch_runs_is_judged_there(tmp_path: Path, sources: list[np.ndarray]) -> None:
    """Without a file; of a network whose weights round in bf16 to others."""
    network = get_arch("efficientvit_m0").replace(num_classes=2).at(64)
    torch.manual_seed(0)
    save_weights(create_model(network), tmp_path / "model.safetensors")
    images = Images(sources[:6], [0, 1] * 3, plain_transform(64))
    data = ImageData("greys", ["a", "b"], images, images, images, demo=False)
    draft, settings = tmp_path / "model.onnx", Settings("torch", precision="bf16")
    price = write_lower(network, tmp_path / "model.safetensors", draft, data, images, settings, 100.0)
    assert (price.runtime, price.precision, price.images, draft.exists()) == ("torch", "bf16", 6, False)
    full = in_torch(network, tmp_path / "model.safetensors", data, images, settings, "fp32")
    right = deployed_right(network, tmp_path / "model.safetensors", draft, data, images, settings, None)
    assert (price.float_top1, price.top1) == (100 * full.mean(), 100 * right.mean())
