"""`vitnas export --precision int8`: judged on held-out images, or not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from nas.evaluate import precision
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.precision import HeldOut
from nas.export.card import Card, Latency, Preprocess
from nas.export.folder import save_model, save_onnx
from nas.export.options import PLAIN
from nas.export.quantize import Recipe
from nas.units import listed
from search_spaces import create_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """A trained network of two classes, in `run`, and their images, in `images`."""
    root = tmp_path_factory.mktemp("made")
    draw = np.random.default_rng(0)
    for kind, grey in (("dark", 60), ("light", 190)):
        for part, count in (("train", 4), ("val", 5)):
            folder = root / "images" / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (grey + draw.integers(-40, 40, (20, 20, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    model = create_model(helpers.random_arch("shvit", 0, num_classes=2, resolution=32))
    for weights in model.parameters():
        if weights.shape[0] == 2:  # the classifier's: else all probabilities are about a half
            weights.data *= 30
    save_model(model.eval(), root / "run")
    timed = Latency(ms=1, ci=(1, 1), device="cpu", runtime="onnxruntime", precision="fp32", threads=1, batch_size=1)
    card = Card(preprocess=Preprocess.own(32), classes=["dark", "light"], latency=timed)
    save_onnx(model, root / "run", PLAIN, True, card)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, of which 4 of 10 validation images are wrong in int8."""
    monkeypatch.setattr(precision, "RECIPES", (Recipe(),))

    def right(self: HeldOut, path: Path, runtime: str, threads: int | None) -> np.ndarray:
        assert [*self.images.labels] == [0] * 5 + [1] * 5
        quantised = any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
        return np.arange(10) >= 4 * quantised

    monkeypatch.setattr(HeldOut, "right", right)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def words(run: Path, out: Path, *more: str) -> tuple[str, ...]:
    data = str(run.parent / "images")
    return ("export", str(run), "--out", str(out), "--precision", "int8", "--data", data, *more)


@pytest.mark.parametrize("more", [(), ("--dynamic-batch", "--preprocess-in-graph", "--probabilities")])
def test_int8_says_what_it_costs(run: Path, tmp_path: Path, vitnas: Any, more: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    code, said, err = vitnas(*words(run, out, "--max-drop", "40", *more))
    assert code == 0, err
    first, left, changed, full, seen = said.splitlines()
    assert seen.startswith("which images ")
    assert first.startswith(f"{out}/model.onnx: int8 costs 40.0 points of top-1 ")
    assert left.startswith("left in float: ")
    assert changed == "only fp32 is right on 4 of the images, only int8 on 0"
    assert full.startswith("in fp32: shvit with the given weights; ONNX Runtime and PyTorch agree to ")
    file = OnnxFile.open(out, threads=1)
    assert (file.precision, file.classes) == ("int8", ("dark", "light"))
    assert (file.batch_size, file.in_graph, file.probabilities) == ((None, True, True) if more else (1, False, False))
    card = Card.read(out)
    assert card.accuracy.top1 == 60
    assert card.latency is None, "it is that of fp32"
    facts = json.loads(vitnas("show", str(out), "--json")[1])
    assert facts == json.loads(vitnas("show", str(out / "model.onnx"), "--json")[1]) | {
        each: facts[each] for each in ("model", "kind")
    }
    assert (facts["top1"], facts["top1_precision"]) == (60, "int8")
    assert f"left in float: {listed(facts['left_in_float'], 8)}" == left
    assert " in int8\nint8 leaves in float: " in vitnas("show", str(out))[1]
    assert {path.name for path in out.iterdir()} >= {"arch.json", "model.safetensors", "preprocess.json", "labels.txt"}


def test_an_int8_file_answers_alike_on_both_runtimes(
    made: Path, tmp_path: Path, vitnas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing replaced but the number of recipes; its card tells what it is right on."""
    monkeypatch.setattr(precision, "RECIPES", (Recipe(),))
    out = tmp_path / "out"
    code, _, err = vitnas(*words(made / "run", out, "--max-drop", "100"))
    assert code == 0, err
    paths = sorted((made / "images/val").rglob("*.png"))
    first, second = (OnnxFile.open(out, runtime, threads=1) for runtime in ("onnxruntime", "openvino"))
    fed = np.stack([first.pixels(Image.open(path)) for path in paths])
    logits, others = first.logits(fed), second.logits(fed)
    assert np.linalg.norm(others - logits) < 0.1 * np.linalg.norm(logits)
    named = [first.classes[i] for i in logits.argmax(1)]
    right = [name == path.parent.name for name, path in zip(named, paths, strict=True)]
    assert Card.read(out).accuracy.top1 == 100 * np.mean(right)


def test_int8_that_costs_too_much_is_not_written(run: Path, tmp_path: Path, vitnas: Any) -> None:
    out = tmp_path / "out"
    message = "infeasible, nothing is written: int8 costs 40.0 points of top-1 "
    vitnas.refused(vitnas(*words(run, out)), message)
    assert not out.exists()
    assert vitnas(*words(run, out, "--max-drop", "40"))[0] == 0
    before = (out / "model.onnx").read_bytes()
    vitnas.refused(vitnas(*words(run, out)), message)
    assert (out / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--max-drop", "-1"), "--max-drop is -1: give 0 to 100 points"), (("--data", "none"), "none")],
)
def test_what_is_refused(run: Path, tmp_path: Path, vitnas: Any, more: tuple[str, ...], message: str) -> None:
    vitnas.refused(vitnas(*words(run, tmp_path / "out", *more)), message)
    assert not (tmp_path / "out").exists()


def test_random_weights_are_not_judged(run: Path, tmp_path: Path, vitnas: Any) -> None:
    (run / "model.safetensors").unlink()
    vitnas.refused(vitnas(*words(run, tmp_path / "out")), "has no trained weights here to judge: give --weights")
    assert not (tmp_path / "out").exists()
