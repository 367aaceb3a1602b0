"""A real, short search that trains its candidates on images: what it writes, keeps, reuses and validates."""

import csv
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import quick
from PIL import Image

from nas.export.card import Card

FOLDER = "trained"


def command(root: Path, *words: str, trials: int = 3) -> list[str]:
    return [
        *("search", "--latency-budget", "30ms", "--trials", str(trials)),
        *("--study", FOLDER, "--out", str(root / "runs"), "--data", str(root / "images"), "--from-scratch"),
        *("--family", "shvit"),
        *("--resolution", "32", "--train-images", "100", "--epochs", "2", "--final-epochs", "1", "--seeds", "2"),
        *("--sampler", "random", "--seed", "1", "--threads", "1", *words),
    ]


@pytest.fixture(scope="module", autouse=True)
def short(exports):
    with pytest.MonkeyPatch.context() as patch:
        quick.few_rounds(patch)
        quick.brief_slices(patch)
        quick.blank_plots(patch)
        quick.small_shvit(patch)
        quick.exports_here(patch, exports)
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory, short) -> tuple[Path, str]:
    """The folder of images and runs; what the search printed."""
    from nas.cli import app

    root = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("val", 20)):
        for label, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            folder = root / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["vitnas", *command(root, "--json", "--validate", "6")])
        with pytest.raises(SystemExit) as stop:
            app.main()
    assert stop.value.code == 0, err.getvalue()
    return root, out.getvalue()


def test_a_trained_network_comes_out_with_its_baseline(searched):
    root, text = searched
    folder = root / "runs" / FOLDER
    files = {"arch.json", "model.onnx", "model.safetensors", "model.seen.npy", "preprocess.json", "labels.txt"}
    assert {path.name for path in (folder / "best").iterdir()} == files
    found = json.loads(text)
    assert found["num_classes"] == 2
    assert not found["untrained"]
    ours, *theirs = found["accuracy"]["rows"]
    assert ours["label"] == found["winner"]["label"]
    assert ours["images"] == 40, "the validation images"
    assert found["winner"]["top1"] == ours["mean"]
    assert found["winner"]["top1_ci"] == ours["top1_ci"]
    assert (found["winner"]["images"], found["winner"]["seeds"]) == (40, 2)
    kept = [json.loads(path.read_text()) for path in (folder / "final").glob("*.json")]
    assert all(100 * row["hits"].count("1") / row["images"] == row["top1"] for row in kept)
    card = Card.read(folder / "best")
    assert (card.classes, card.preprocess.size) == (["blue", "red"], 32)
    assert (card.accuracy.top1, card.accuracy.images) == (ours["top1"][0], 40), "of its own weights, the first seed's"
    assert all(len(row["top1"]) == 2 for row in (ours, *theirs))
    if theirs:
        assert any(word in found["accuracy"]["verdict"] for word in ("a tie", "a gain", "a loss"))
    page = (folder / "report.html").read_text()
    assert "Trained fully" in page
    assert "Kendall" in page
    for row in csv.DictReader((folder / "trials.csv").open()):
        assert row["state"] == "complete"
        assert row["kind"] == "", "outside of a race"
    assert not list((folder / "training").glob("*")), "no checkpoint of a finished training is left"


def test_weights_are_those_of_the_network_as_measured(searched):
    import torch

    from nas.networks.targets import find_target
    from search_spaces import create_model, fold

    root, _ = searched
    target = find_target(str(root / "runs" / FOLDER))
    model = create_model(target.arch, weights=target.weights).eval()
    assert model.untrained == []
    import onnxruntime

    images = torch.randn(1, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(target.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        assert abs(fold(model)(images).numpy() - logits).max() < 1e-3


def test_nothing_is_trained_again(searched, vitnas):
    root, first = searched
    folder = root / "runs" / FOLDER
    before = {path: path.stat().st_mtime_ns for path in (folder / "final").iterdir()}
    assert len(before) >= 3
    code, out, err = vitnas(*command(root, "--json", "--validate", "6"))
    assert code == 0, err
    assert all(path.stat().st_mtime_ns == made for path, made in before.items())
    assert json.loads(out)["accuracy"] == json.loads(first)["accuracy"]


def test_another_training_is_refused(searched, vitnas):
    root, _ = searched
    refused = vitnas(*command(root, "--train-images", "120"))
    vitnas.refused(refused, "training.train_images 100, this command says 120")


def test_the_tier_validates_itself(searched):
    _, text = searched
    data = json.loads(text)
    found = data["validation"]
    assert found["networks"] == 6
    assert {"estimate, first rung", "params"} <= set(found["tau"])
    assert any("does not choose" in note for note in data["notes"]) != found["selects"]
