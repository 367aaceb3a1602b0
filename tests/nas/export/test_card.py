"""What model.onnx says of itself: enough to classify images without vitnas, as well as vitnas does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from nas.bench.files import pixels_of_target
from nas.data.dataset import open_data
from nas.data.images import plain_transform
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.export.artifact import lower_precision
from nas.export.card import CLASSIFY, Card, Preprocess, load_onnx, metadata_of, pixels_of
from nas.export.onnx import label_onnx, to_onnx
from nas.measure.runtime import Settings
from nas.networks.targets import find_target
from nas.networks.timm_network import TimmNetwork
from nas.quality.plan import TrainingPlan
from nas.search.request import SearchRequest
from nas.search.run import read_images
from search_spaces import get_arch

CLASSES = ["blue", "green ü", "red"]
GUIDE = (Path(__file__).parents[3] / "docs/guides/use.md").read_text()

CHECK = """
import pathlib, sys
shown = [(path.parent.name, classify(path)) for path in sorted(pathlib.Path("../images/val").glob("*/*"))]
assert len(shown) == 36
assert not {"torch", "torchvision", "timm", "nas", "search_spaces"} & set(sys.modules)
print(100 * sum(label == found for label, found in shown) / len(shown))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, helpers) -> Path:
    """A tiny network trained on noisy rectangles of three colours, some of them turned by EXIF."""
    from nas.training.request import TrainRequest, choose_recipe
    from nas.training.run import train

    root, rng = tmp_path_factory.mktemp("card"), np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 12)):
        for i, label in enumerate(CLASSES):
            (root / "images" / part / label).mkdir(parents=True)
            for j in range(count):
                draw(rng, 2 - i).save(root / "images" / part / label / f"{j}.jpg", exif=turned(j % 4))
    (root / "arch.json").write_text(helpers.random_arch("shvit", 0, num_classes=3, resolution=32).to_json())
    recipe = choose_recipe("quick", 4, 12, 0.01, None)
    options = TrainRequest(str(root / "arch.json"), recipe, "cpu", root / "out", str(root / "images"))
    train(options)
    return root / "out"


def draw(rng: np.random.Generator, channel: int) -> Image.Image:
    """Noise of any shape, with a faint square of one colour in the middle and a bright frame of another."""
    height, width = rng.integers(40, 90, 2)
    pixels = rng.integers(0, 200, (height, width, 3))
    pixels[height // 3 : -height // 3, width // 3 : -width // 3, channel] += 55
    pixels[:4, :, rng.integers(3)] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = (1, 3, 6, 8)[orientation]
    return exif


def test_the_guide_s_lines_give_the_accuracy_that_was_told(folder):
    """In a process that imports neither torch nor vitnas."""
    (block,) = [part for part in GUIDE.split("```") if "onnxruntime.InferenceSession" in part]
    code = block.removeprefix("python\n")
    assert code == CLASSIFY, "the report holds the same lines"
    (folder / "photo.jpg").write_bytes((folder.parent / "images" / "val" / "red" / "0.jpg").read_bytes())
    words = [sys.executable, "-c", code + CHECK]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    one, accuracy = done.stdout.splitlines()
    assert one in CLASSES
    told = json.loads((folder / "metrics.json").read_text())
    assert float(accuracy) == pytest.approx(told["final"]["top1"])
    assert 34 < float(accuracy) < 100, "a network that is right by chance, or always, shows nothing"
    assert told["data"]["class_names"] == CLASSES


def test_what_a_trained_file_says(folder):
    facts = metadata_of(load_onnx(folder / "model.onnx"))
    told = json.loads((folder / "metrics.json").read_text())["final"]
    assert json.loads(facts["vitnas.classes"]) == CLASSES
    assert json.loads(facts["vitnas.preprocess"]) == {
        "resize": 36,
        "size": 32,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "layout": "NCHW",
        "crop_pct": 0.875,
    }
    assert facts["vitnas.weights"] == "trained"
    accuracy = json.loads(facts["vitnas.accuracy"])
    assert (accuracy["top1"], accuracy["images"]) == (told["top1"], 36)
    assert accuracy["data"].endswith("images")
    assert accuracy["ci"][0] < told["top1"] < accuracy["ci"][1]
    assert json.loads((folder / "preprocess.json").read_text()) == json.loads(facts["vitnas.preprocess"])
    assert (folder / "labels.txt").read_text().splitlines() == CLASSES


def test_export_keeps_what_is_known(vitnas, folder, tmp_path):
    code, text, _ = vitnas("export", str(folder), "--out", str(tmp_path))
    assert code == 0
    assert "do not say" not in text
    assert Card.read(tmp_path) == Card.read(folder)
    for name in ("metrics.json", "preprocess.json", "labels.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    code, text, _ = vitnas("export", str(folder / "arch.json"), "--out", str(tmp_path / "more"), "--batch-size", "2")
    assert Card.read(tmp_path / "more") == Card.read(folder), "the weights lie beside the Arch"


def test_a_folder_of_an_earlier_version_says_what_its_metrics_hold(vitnas, folder, tmp_path):
    """Its model.onnx says nothing of itself, and no card lies beside it."""
    old, told = tmp_path / "old", Card.read(folder)
    old.mkdir()
    for name in ("arch.json", "model.safetensors"):
        shutil.copyfile(folder / name, old / name)
    found = json.loads((folder / "metrics.json").read_text())
    for key in ("top1", "top1_ci", "images", "classes"):
        del found[key]
    (old / "metrics.json").write_text(json.dumps(found))
    wanted = Card(classes=CLASSES, accuracy=told.accuracy)
    assert Card.read(old) == wanted, "of weights that could not be exported"
    to_onnx(torch.nn.Flatten(), old / "model.onnx", 8, 1)
    assert Card.read(old) == wanted
    assert f"accuracy: {told.accuracy.top1:.1f}% top-1" in vitnas("show", str(old))[1]
    assert vitnas("export", str(old), "--out", str(tmp_path / "new"))[0] == 0
    assert Card.read(tmp_path / "new") == told
    assert (tmp_path / "new" / "metrics.json").is_file()


def test_the_images_that_weights_have_seen_go_with_them(vitnas, folder, tmp_path):
    """Into a folder where what was said of another network goes, and what vitnas does not write stays."""
    users = {"model.py", "model.pth", "config.json"}
    for name in ("arch.json", "model.seen.npy", "model.int8.onnx", "prune.json", "labels.txt", *users):
        (tmp_path / name).write_text("of another network")
    assert vitnas("export", str(folder), "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "model.seen.npy").read_bytes() == (folder / "model.seen.npy").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == users | {
        *("arch.json", "model.onnx", "model.safetensors", "model.seen.npy"),
        *("metrics.json", "preprocess.json", "labels.txt"),
    }
    assert vitnas("export", "shvit_s1", "--out", str(tmp_path))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == users | {"arch.json", "model.onnx", "preprocess.json"}
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("metrics.json", "labels.txt"):
        (mine / name).write_text("the user's")
    assert vitnas("export", "shvit_s1", "--out", str(mine))[0] == 0
    assert {(mine / name).read_text() for name in ("metrics.json", "labels.txt")} == {"the user's"}


def test_the_classes_of_weights_in_another_network_stay_and_its_accuracy_goes(vitnas, folder, tmp_path):
    arch = json.loads((folder / "arch.json").read_text()) | {"resolution": 64}
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    words = ("export", str(tmp_path / "arch.json"), "--weights", str(folder / "model.safetensors"))
    assert vitnas(*words, "--out", str(tmp_path / "out"))[0] == 0
    assert Card.read(tmp_path / "out") == Card(preprocess=Preprocess.own(64), classes=CLASSES)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_weights_of_unknown_origin_are_told(vitnas, folder, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((folder / "model.safetensors").read_bytes())
    words = ("export", str(folder / "arch.json"), "--weights", str(weights), "--out", str(tmp_path / "out"))
    code, text, _ = vitnas(*words)
    assert (code, "the weights do not say what their classes are called" in text) == (0, True)
    assert Card.read(tmp_path / "out") == Card.untrained(32)


def test_files_of_an_earlier_export_do_not_stay(vitnas, folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "arch.json").write_bytes((folder / "arch.json").read_bytes())
    for model in (folder, tmp_path):
        assert vitnas("export", str(model), "--out", str(out))[0] == 0
    assert {path.name for path in out.iterdir()} == {"arch.json", "model.onnx", "preprocess.json"}
    assert Card.read(out) == Card.untrained(32)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_say_the_same(precision, folder, tmp_path):
    path, card = tmp_path / "model.onnx", Card.read(folder)
    to_onnx(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), path, 8, 1)
    label_onnx(path, None, trained=True, card=card)
    lower_precision(path, Settings("onnxruntime", precision=precision))
    assert Card.read(path) == card
    model = load_onnx(path)
    assert model.producer_name == "vitnas"
    assert model.producer_version == version("vitnas")


def test_the_digits_are_seen_whole():
    card = Card.of(open_data(None, 32, None, 0))
    assert (card.preprocess.resize, card.preprocess.size) == (32, 32)
    assert card.classes == list("0123456789")


def test_timm_s_weights_have_timm_s_crop_and_imagenet_s_classes():
    card = Card.timm(get_arch("levit_128s"))
    assert (card.preprocess.resize, card.preprocess.size) == (248, 224), "LeViT's crop is 0.9 of the image"
    assert len(card.classes) == 1000
    assert card.classes[1] == "goldfish, Carassius auratus"
    assert Card.timm(get_arch("shvit_s1")).preprocess.resize == 256


def test_only_what_is_understood_is_told():
    transform = plain_transform(32)
    transform.transforms.reverse()
    with pytest.raises(TypeError, match="no resize"):
        Preprocess.of(transform)


def test_a_folder_without_its_onnx_file_says_it_too(folder, tmp_path):
    card = Card.read(folder)
    card.write(tmp_path)
    assert Card.read(tmp_path) == card.model_copy(update={"accuracy": None})
    Card().write(tmp_path)
    assert not list(tmp_path.iterdir())
    assert Card.read(tmp_path) == Card()


def test_names_that_are_no_text_are_no_trouble(tmp_path):
    data = dataclasses.replace(open_data(None, 32, None, 0), classes=["a\nb", "c\udcff"])
    card = Card.of(data)
    card.write(tmp_path)
    assert (tmp_path / "labels.txt").read_text() == "a b\nc\ufffd\n"
    assert json.loads(card.metadata()["vitnas.classes"]) == ["a\nb", "c\ufffd"]


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match="No such file"):
        Card.read(path)
    path.write_bytes(b"\x00junk")
    with pytest.raises(UserError, match="is no ONNX file, or a damaged one: fetch or export it again"):
        Card.read(path)
    to_onnx(torch.nn.Flatten(), path, 8, 1)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"vitnas.classes": "cat, dog"})
    onnx.save(model, path)
    with pytest.raises(UserError, match="damaged"):
        Card.read(path)


OTHER = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.95)


@pytest.fixture(scope="module")
def other(folder) -> Path:
    """The network of `folder`, whose folder says that it wants other pixels than vitnas's own, trained a little."""
    from nas.training.request import TrainRequest, choose_recipe
    from nas.training.run import train

    root = folder.parent
    (root / "given").mkdir()
    for name in ("arch.json", "model.safetensors"):
        shutil.copyfile(folder / name, root / "given" / name)
    Card(preprocess=Preprocess.own(32, OTHER)).write(root / "given")
    recipe = choose_recipe("quick", 1, 24, 0.01, None)
    weights = str(root / "given" / "model.safetensors")
    options = TrainRequest(str(root / "given"), recipe, "cpu", root / "other", str(root / "images"), weights=weights)
    train(options)
    return root / "other"


def test_a_run_s_own_pixels_survive(vitnas, other, tmp_path):
    """Training, export, another resolution, and what reads a network's folder or file."""
    told = Card.read(other)
    assert told.preprocess == Preprocess.own(32, OTHER)
    assert json.loads((other / "preprocess.json").read_text())["crop_pct"] == 0.95
    assert vitnas("export", str(other), "--out", str(tmp_path / "out"))[0] == 0
    assert Card.read(tmp_path / "out") == told
    (tmp_path / "arch.json").write_text(find_target(str(other)).arch.at(64).to_json())
    words = ("export", str(tmp_path / "arch.json"), "--weights", str(other / "model.safetensors"))
    assert vitnas(*words, "--out", str(tmp_path / "more"))[0] == 0
    assert Card.read(tmp_path / "more").preprocess == Preprocess.own(64, OTHER)
    for name in (other, other / "model.onnx", tmp_path / "out"):
        assert pixels_of_target(find_target(str(name))) == OTHER, name
        assert f"images: {OTHER}" in vitnas("show", str(name))[1], name
    plan = TrainingPlan(str(other.parent / "images"), parent=str(other))
    assert read_images(SearchRequest(1.0, resolution=32, plan=plan)).pixels == OTHER, "a search for its children"


def test_a_training_goes_on_with_the_pixels_it_was_begun_with(other, monkeypatch):
    from nas.training.request import TrainRequest, choose_recipe
    from nas.training.run import train

    given, state = other.parent / "given", other / "state" / "state.json"
    weights = str(given / "model.safetensors")
    recipe = choose_recipe("quick", 1, 24, 0.01, None)
    request = TrainRequest(str(given), recipe, "cpu", other, str(other.parent / "images"), weights=weights)
    found = train(request)
    assert found.final.top1 == Card.read(other).accuracy.top1, "finished"
    before = (given / "preprocess.json").read_bytes()
    Card(preprocess=Preprocess.own(32)).write(given)
    with pytest.raises(UserError, match=rf"prepared otherwise \({OTHER}; now ImageNet's\): give another --out"):
        train(request)
    (given / "preprocess.json").write_bytes(before)
    known = json.loads(state.read_text())
    del known["inputs"]["the pixels"]
    state.write_text(json.dumps(known))
    with pytest.raises(UserError, match=rf"prepared otherwise \(ImageNet's; now {OTHER}\)"):
        train(request)


@pytest.mark.parametrize(
    "pixels", [IMAGENET, OTHER, Pixels(interpolation="lanczos", crop_pct=1.0), Pixels(interpolation="hamming")]
)
def test_what_a_file_tells_is_what_validation_sees(pixels, folder, tmp_path, monkeypatch):
    """The guide's lines make the same numbers of an image; with another network's they would not."""
    data = open_data(str(folder.parent / "images"), 32, None, 0).at(32, pixels=pixels)
    to_onnx(torch.nn.Flatten(), tmp_path / "model.onnx", 32, 1)
    monkeypatch.chdir(tmp_path)

    def differences(card: Card) -> list[float]:
        label_onnx(tmp_path / "model.onnx", None, trained=True, card=card)
        recipe = CLASSIFY.replace("return classes[scores.argmax()]", "return scores").partition("\n\n\nprint(")[0]
        names: dict[str, Any] = {}
        exec(recipe, names)
        shown = [(names["classify"](data.val.sources[i]), data.val[i][0]) for i in range(0, 36, 5)]
        return [float(np.abs(found.ravel() - wanted.numpy().ravel()).max()) for found, wanted in shown]

    assert max(differences(Card.of(data))) < 1e-5
    off = pixels.mean[0] + 0.02, *pixels.mean[1:]
    wrong = (
        dataclasses.replace(pixels, mean=off),
        dataclasses.replace(pixels, std=(pixels.std[0] * 1.1, *pixels.std[1:])),
        dataclasses.replace(pixels, crop_pct=0.8),
        dataclasses.replace(pixels, interpolation="box"),
    )
    for each in wrong:
        card = Card(preprocess=Preprocess.own(32, each), classes=CLASSES)
        assert min(differences(card)) > 0.01, f"{each} for {pixels}"


def test_an_earlier_version_s_preprocess_has_its_crop():
    told = Preprocess.own(224, OTHER).model_dump()
    del told["crop_pct"]
    for size, resize, crop in ((32, 36, 0.875), (224, 256, 0.875), (32, 32, 1.0), (224, 248, 224 / 248)):
        found = Preprocess(**told | {"size": size, "resize": resize})
        assert found.crop_pct == pytest.approx(crop)
        assert Preprocess.own(size, found.pixels) == found
    with pytest.raises(ValueError, match="another resize"):
        Preprocess(**told | {"size": 32, "resize": 36, "crop_pct": 0.95})


def test_pixels_follow_the_weights(folder, other, tmp_path):
    lite, levit = TimmNetwork("tf_efficientnet_lite0"), get_arch("levit_128s")
    half = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert pixels_of(lite, None) == pixels_of(levit, None) == IMAGENET, "from scratch"
    assert pixels_of(lite, "timm") == half
    assert Card.timm(dataclasses.replace(lite, resolution=64)).preprocess == Preprocess.own(64, half)
    assert pixels_of(levit.at(64).replace(num_classes=7), "timm") == Pixels(crop_pct=0.9)
    assert pixels_of(find_target(str(folder)).arch, "timm") == IMAGENET, "no checkpoint of it"
    weights = tmp_path / "zoo.safetensors"
    weights.write_bytes((other / "model.safetensors").read_bytes())
    assert pixels_of(levit, weights) == Pixels(crop_pct=0.9), "the published one, likely"
    assert pixels_of(levit.replace(num_classes=7), weights) == IMAGENET, "as vitnas trains it"
    assert pixels_of(lite, weights) == half, "as timm trains it"
    Card.read(other).write(tmp_path)
    assert pixels_of(levit, weights) == pixels_of(lite, weights) == OTHER, "the file beside it says so"
    seven = levit.replace(num_classes=7)
    assert pixels_of(seven, tmp_path / "none" / "model.safetensors") == IMAGENET
