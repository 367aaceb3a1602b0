"""`vitnas evaluate`: toy files judged for real, and one line for whatever cannot be judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_onnx import toy_card, write_toy

from nas.evaluate import judge, speed
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.run import short_names
from nas.export.card import Card, Preprocess
from nas.export.folder import replace_network
from nas.export.options import FileOptions
from nas.measure.protocol import Interrupted
from nas.networks.build import create
from nas.networks.timm_network import TimmNetwork

if TYPE_CHECKING:
    from conftest import Cli

CLASSES = ("élan", "dog", "cat")
"""In the order of the outputs, which is not that of folders."""
TINY = "test_efficientnet.r160_in1k"
PER_CLASS = 6
BARE = ("--no-throughput", "--threads", "1", "-q")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Noise under the names of the toy's classes, 18 images."""
    random, root = np.random.default_rng(3), tmp_path / "images"
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def toy(tmp_path: Path) -> str:
    return str(write_toy(tmp_path / "toy.onnx", ("N", 3, 16, 16), card=toy_card(classes=CLASSES)))


def judged(vitnas: Cli, *words: str) -> dict[str, Any]:
    code, out, err = vitnas("evaluate", *words, *BARE, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def answers_of(toy: str, images: Path) -> tuple[list[str], list[str]]:
    """(classes, what the file takes them for), image by image."""
    file = OnnxFile.open(toy)
    paths = sorted(images.rglob("*.png"))
    logits = np.concatenate([file.logits(file.pixels(Image.open(path))[None]) for path in paths])
    return [path.parent.name for path in paths], [CLASSES[i] for i in logits.argmax(1)]


def test_figures_are_those_of_the_answers(vitnas: Cli, toy: str, images: Path) -> None:
    found = judged(vitnas, toy, "--data", str(images))
    (result,) = found["results"]
    wanted, taken = answers_of(toy, images)
    right = [one == other for one, other in zip(wanted, taken, strict=True)]
    assert result.keys() >= {"model", "runtime", "precision", "top1", "top1_ci", "top5", "images", "ece", "per_class"}
    assert (result["model"], result["runtime"], result["precision"]) == (toy, "onnxruntime", "fp32")
    assert result["images"] == found["images"] == len(right)
    assert result["top1"] == pytest.approx(100 * np.mean(right))
    assert result["top1_ci"][0] < result["top1"] < result["top1_ci"][1]
    assert result["top5"] is None
    cells = {(cell["truth"], cell["predicted"]): cell["images"] for cell in result["confusion"]}
    assert cells == {
        pair: list(zip(wanted, taken, strict=True)).count(pair) for pair in zip(wanted, taken, strict=True)
    }
    assert {each["name"]: each["images"] for each in result["per_class"]} == dict.fromkeys(CLASSES, PER_CLASS)
    assert len(result["mistakes"]) == right.count(False)
    confidences = [each["confidence"] for each in result["mistakes"]]
    assert confidences == sorted(confidences, reverse=True)
    worst = result["mistakes"][0]
    assert Path(worst["image"]).parent.name == worst["truth"] != worst["predicted"]
    assert found["pairs"] == []


def test_folders_are_classes_by_name(vitnas: Cli, toy: str, images: Path) -> None:
    """Fewer of them, and in the other order."""
    (images / "cat").rename(images / "zebra")
    code, _, err = vitnas("evaluate", toy, "--data", str(images), *BARE)
    assert code == 2
    assert "does not know zebra of the 3 classes" in err
    assert "its 3 are élan, dog, cat" in err
    (images / "zebra").rename(images.parent / "zebra")
    found = judged(vitnas, toy, "--data", str(images))
    wanted, taken = answers_of(toy, images)
    assert found["results"][0]["top1"] == pytest.approx(
        100 * np.mean([one == other for one, other in zip(wanted, taken, strict=True)])
    )
    assert any("first of all 3 classes; the images are of 2 of them" in line for line in found["notes"])


def test_networks_are_compared_on_the_same_images(
    vitnas: Cli, toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(write_toy(tmp_path / "other.onnx", card=toy_card(classes=CLASSES), scale=-1))
    decoded = []
    decode = judge.decode_or_name
    monkeypatch.setattr(judge, "decode_or_name", lambda source: decoded.append(source) or decode(source))
    runtimes = ("--runtime", "onnxruntime", "--runtime", "openvino")
    found = judged(vitnas, toy, other, "--data", str(images), *runtimes)
    assert len(decoded) == len(set(decoded)) == 3 * PER_CLASS
    labels = [each["label"] for each in found["results"]]
    assert labels == [f"{name}, {each}" for name in ("toy.onnx", "other.onnx") for each in runtimes[1::2]]
    pairs = {(each["first"], each["second"]): each for each in found["pairs"]}
    assert len(pairs) == 6
    same = pairs[labels[0], labels[1]]
    assert same["tie"]
    assert (same["only_first"], same["only_second"], same["p"]) == (0, 0, 1)
    unlike = pairs[labels[0], labels[2]]
    assert sum(unlike[key] for key in ("both", "only_first", "only_second", "neither")) == 3 * PER_CLASS
    assert unlike["difference"] == pytest.approx(found["results"][2]["top1"] - found["results"][0]["top1"])


def test_broken_images_are_named_and_left_out(vitnas: Cli, toy: str, images: Path) -> None:
    (images / "cat" / "0.png").write_bytes(b"no picture")
    found = judged(vitnas, toy, "--data", str(images))
    assert found["images"] == 3 * PER_CLASS - 1
    assert found["skipped"] == [str(images / "cat" / "0.png")]
    assert any("kipped 1 image that cannot be decoded" in line for line in found["notes"])
    for path in images.rglob("*.png"):
        path.write_bytes(b"no picture")
    vitnas.refused(vitnas("evaluate", toy, "--data", str(images), *BARE), "none of 18 images can be used")


def test_the_page_shows_the_mistakes(vitnas: Cli, toy: str, images: Path, tmp_path: Path) -> None:
    code, out, err = vitnas("evaluate", toy, "--data", str(images), *BARE, "--out", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in out
    page = (tmp_path / "out" / "report.html").read_text()
    found = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    mistakes = found["results"][0]["mistakes"]
    assert page.count("data:image/jpeg;base64,") == len(mistakes) > 0
    assert mistakes[0]["image"] in page
    assert "http" not in page.replace("Content-Security-Policy", "").replace("http-equiv", "")
    assert f"{found['results'][0]['top1']:.1f}%" in page


def test_another_run_s_report_stays(vitnas: Cli, toy: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("a search's")
    words = ("evaluate", toy, "--data", str(images), *BARE, "--out", str(tmp_path))
    vitnas.refused(vitnas(*words), "holds the report.html of another run: give another --out")
    assert (tmp_path / "report.html").read_text() == "a search's"
    (tmp_path / "evaluate.json").write_text("{}")
    assert vitnas(*words)[0] == 0


def test_a_file_that_is_named_twice_is_judged_once(
    vitnas: Cli, toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = judged(vitnas, "toy.onnx", "./toy.onnx", toy, "--data", str(images))
    assert [each["model"] for each in found["results"]] == ["toy.onnx"]


def test_names_are_no_markup(vitnas: Cli, images: Path, tmp_path: Path) -> None:
    """Nor formulas."""
    bold = ("élan", "cost $\\foo$", "<b>cat")
    (images / "cat").rename(images / bold[2])
    (images / "dog").rename(images / bold[1])
    path = write_toy(tmp_path / "toy.onnx", card=toy_card(classes=bold), scale=-1)
    vitnas("evaluate", str(path), "--data", str(images), *BARE, "--out", str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>cat" not in page
    assert "&lt;b&gt;cat" in page


def test_what_cannot_be_judged_leaves_nothing(vitnas: Cli, toy: str, images: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))

    def refused(*words: str, told: str) -> None:
        vitnas.refused(vitnas("evaluate", *words, *BARE, *out), told)
        assert not (tmp_path / "out").exists()

    data = ("--data", str(images))
    refused(toy, told="give the images to judge on: --data FOLDER")
    refused(*data, told="name the networks to judge")
    refused(toy, "--data", str(tmp_path / "none"), told="no such folder")
    refused(str(tmp_path / "none.onnx"), *data, told="no such file")
    refused(str(tmp_path / "none.safetensors"), *data, told="no such file")
    refused(toy, *data, "--runtime", "tensorrt", told="hoose from onnxruntime, openvino, torch")
    refused(toy, *data, "--runtime", "torch", told="leave --runtime torch out")
    refused("shvit_s1", *data, "--runtime", "openvino", told="is no ONNX file")
    vitnas.refused(vitnas("evaluate", toy, *data, "--threads", "0", "-q"), "threads is 0")
    refused(toy, *data, "--split", "dev", told="choose from train, val, test, all")
    nan = write_toy(tmp_path / "nan.onnx", card=toy_card(classes=CLASSES), scale=float("nan"))
    refused(str(nan), *data, told="NaN or infinite")
    foreign = str(write_toy(tmp_path / "foreign.onnx"))
    refused(foreign, *data, told="--preprocess")
    refused(foreign, *data, "--preprocess", "imagenet", told="--labels FILE")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    refused(toy, *data, "--labels", str(tmp_path / "two.txt"), told="and all of these do: leave it out")
    refused(
        foreign, *data, "--preprocess", "imagenet", "--labels", str(tmp_path / "two.txt"), told="3 outputs, 2 names"
    )


def test_a_damaged_file_is_told_before_pytorch_is_loaded(
    vitnas: Cli, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(module: str, quiet: bool) -> None:
        raise AssertionError(f"{module} is loaded")

    monkeypatch.setattr("nas.cli.progress.load", load)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    vitnas.refused(vitnas("evaluate", str(broken), "--data", str(images), *BARE), "broken.onnx")


def test_the_usual_ways_to_prepare_images_are_compared(vitnas: Cli, images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    foreign = str(write_toy(tmp_path / "foreign.onnx"))
    words = (foreign, "--data", str(images), "--labels", str(tmp_path / "labels.txt"), "--preprocess")
    found = judged(vitnas, *words, "try")
    given = [each["given"] for each in found["results"]]
    assert given[0] == "imagenet"
    assert {"inception", "clip", "none", "raw"} < set(given)
    assert sum("better than guessing" in line for line in found["notes"]) <= 1
    best = max(found["results"], key=lambda each: each["top1"])
    assert any(f"chosen by these images: foreign.onnx, {best['given']}" in line for line in found["notes"])
    (alone,) = judged(vitnas, *words, "none")["results"]
    two = judged(vitnas, *words, "none", "--runtime", "onnxruntime", "--runtime", "openvino")
    assert not any("several ways" in line for line in two["notes"])
    assert alone["top1"] == next(each["top1"] for each in found["results"] if each["given"] == "none")
    own = judged(
        vitnas,
        str(write_toy(tmp_path / "own.onnx", card=toy_card(classes=CLASSES))),
        *words[1:3],
        "--preprocess",
        "try",
    )
    assert own["results"][0]["given"] is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network of timm's of 3 classes at 32 px, whose answers differ."""
    torch.manual_seed(0)
    model = create(TimmNetwork(TINY, 32, 3))
    torch.nn.init.normal_(model.get_classifier().weight)
    folder = tmp_path_factory.mktemp("tiny")
    card = Card(preprocess=Preprocess.own(32), classes=list(CLASSES))
    replace_network(model, folder, FileOptions(2), True, card)
    return folder


def test_a_folder_is_its_onnx_file_unless_pytorch_is_asked_for(vitnas: Cli, tiny: Path, images: Path) -> None:
    found = judged(vitnas, str(tiny), "--data", str(images), "--runtime", "torch", "--runtime", "onnxruntime")
    one, other = found["results"]
    assert (one["runtime"], one["file"]) == ("torch", str(tiny / "model.safetensors"))
    assert (other["runtime"], other["file"]) == ("onnxruntime", str(tiny / "model.onnx"))
    assert one["confusion"] == other["confusion"]
    assert one["ece"] == pytest.approx(other["ece"], abs=0.01)
    (usual,) = judged(vitnas, str(tiny), "--data", str(images))["results"]
    assert usual["runtime"] == "onnxruntime"
    (weights,) = judged(vitnas, str(tiny / "model.safetensors"), "--data", str(images))["results"]
    assert weights["confusion"] == one["confusion"]


def test_weights_are_of_the_network_that_they_are_called_after(
    vitnas: Cli, tiny: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    named = tmp_path / f"{TINY}.safetensors"
    named.write_bytes((tiny / "model.safetensors").read_bytes())
    words = ("--data", str(images), "--labels", str(tmp_path / "labels.txt"))
    (result,) = judged(vitnas, f"{named}@32", *words)["results"]
    assert (result["classes"], result["resolution"]) == (3, 32)
    unnamed = named.rename(tmp_path / "unheard-of.safetensors")
    vitnas.refused(
        vitnas("evaluate", str(unnamed), *words, *BARE), "does not say which network it is of: put its arch.json"
    )


def test_published_weights_of_imagenet(vitnas: Cli, images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create(TimmNetwork(TINY, 32))
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / f"{TINY}.safetensors")
    for name, new in zip(CLASSES, ("n01440764", "n01443537", "n01484850"), strict=True):
        (images / name).rename(images / new)
    found = judged(vitnas, f"timm/{TINY}@32", "--data", str(images), "--weights-from", str(tmp_path))
    (result,) = found["results"]
    assert (result["classes"], result["top5"] is not None, result["file"]) == (1000, True, None)
    assert {each["name"] for each in result["per_class"]} == {"n01440764", "n01443537", "n01484850"}
    assert any("WordNet" in line for line in found["notes"])
    assert any("1,000 classes; the images are of 3 of them" in line for line in found["notes"])


def test_latency_stands_beside(
    vitnas: Cli, toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.measure.worker.WARM_UP_MS", 1)
    fixed = str(write_toy(tmp_path / "fixed.onnx", (2, 3, 16, 16), card=toy_card(classes=CLASSES)))
    code, out, _ = vitnas("evaluate", toy, fixed, "--data", str(images), "--threads", "1", "-q", "--json")
    assert code == 0
    found = json.loads(out)
    one, two = (each["speed"] for each in found["results"])
    assert (one["batch_size"], two["batch_size"], one["threads"]) == (1, 2, 1)
    assert two["throughput"] == pytest.approx(2000 / two["latency_ms"])
    assert found["cpu"]


def test_ctrl_c_while_judging_leaves_nothing(
    vitnas: Cli, toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(judge, "decode_or_name", interrupt)
    code, out, err = vitnas("evaluate", toy, "--data", str(images), *BARE, "--out", str(tmp_path / "out"))
    assert (code, out, err) == (130, "", "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_measuring_keeps_the_accuracy(
    vitnas: Cli, toy: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted({}, 0)

    monkeypatch.setattr(speed, "measure_side_by_side", interrupt)
    code, out, _ = vitnas("evaluate", toy, "--data", str(images), "--threads", "1", "-q")
    assert code == 130
    assert "toy.onnx" in out
    assert "Interrupted: latency was not measured." in out


def test_paths_are_called_by_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/best", "b/best", "c/d"):
        Path(name).mkdir(parents=True)
    assert short_names(["a/best", "c/d", "timm/x"]) == {"a/best": "best", "c/d": "d", "timm/x": "timm/x"}
    assert short_names(["a/best", "b/best"]) == {"a/best": "a/best", "b/best": "b/best"}
    assert short_names(["a/best", "a/best/"]) == {"a/best": "a/best", "a/best/": "a/best/"}
    assert short_names(["a/best", "best"]) == {"a/best": "a/best", "best": "best"}


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_bf16_stands_beside_fp32(
    vitnas: Cli, toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file is neither int8 nor fp16 already, and the runtime has it."""
    opened = []
    monkeypatch.setattr("nas.evaluate.session.check_settings", lambda settings: opened.append(settings.precision))
    half = str(write_toy(tmp_path / "half.onnx", half=True, card=toy_card(classes=CLASSES)))
    both = ("--precision", "fp32", "--precision", "bf16")
    out = tmp_path / "out"
    found = judged(vitnas, toy, half, "--data", str(images), "--runtime", "openvino", *both, "--out", str(out))
    told = [(each["label"], each["precision"]) for each in found["results"]]
    assert told == [("toy.onnx, fp32", "fp32"), ("toy.onnx, bf16", "bf16"), ("half.onnx", "fp16")]
    assert [f"<h2>{label}</h2>" in (out / "report.html").read_text() for label, _ in told] == [True] * 3
    assert opened.count("bf16") == 2, "the toy, before and after PyTorch is loaded"
    assert not any("ways to prepare images" in note for note in found["notes"])
    monkeypatch.undo()
    refused = vitnas("evaluate", toy, "--data", str(images), "--precision", "bf16", *BARE)
    vitnas.refused(refused, "runtime onnxruntime has", "not bf16", "openvino")
    vitnas.refused(vitnas("evaluate", toy, "--data", str(images), "--precision", "int8", *BARE), "int8", "bf16")
