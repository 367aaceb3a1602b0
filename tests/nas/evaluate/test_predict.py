"""`vitnas predict` and `vitnas.predict`: what images show, and images and commands that are wrong."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_onnx import CLASSES, odd_images, toy_card, write_toy

import vitnas as api
from nas.cli.predict import told
from nas.data.decoding import decode
from nas.data.images import plain_transform
from nas.evaluate.onnx_file import OnnxFile, softmax
from nas.evaluate.predict import Encoded, Guess, Prediction

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network's folder, images in it and below, a broken one, and a file that is none."""
    write_toy(tmp_path / "model.onnx", card=toy_card())
    (tmp_path / "photos/more").mkdir(parents=True)
    odd_images(tmp_path / "photos")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "photos/more/red.png")
    (tmp_path / "photos/broken.jpg").write_bytes(b"no image")
    (tmp_path / "photos/ribbon.txt").write_text("no image")
    Image.new("RGB", (2000, 4)).save(tmp_path / "photos/ribbon.png")
    return tmp_path


def test_images_have_the_classes_of_evaluation(folder: Path) -> None:
    said: list[str] = []
    shown: list[Prediction] = []
    result = api.predict(api.PredictRequest(folder, [folder / "photos"], top_k=3, threads=1), said.append, shown.append)
    paths = sorted(path for path in (folder / "photos").rglob("*.*") if path.stem not in ("broken", "ribbon"))
    assert [each.image for each in result.predictions] == [str(path) for path in paths]
    assert tuple(shown) == result.predictions
    transform = plain_transform(16)
    pixels = np.stack([transform(decode(path)).numpy() for path in paths])
    wanted = softmax(OnnxFile.open(folder).logits(pixels))
    for row, each in zip(wanted, result.predictions, strict=True):
        assert [guess.index for guess in each.guesses] == np.argsort(-row).tolist()
        assert [guess.name for guess in each.guesses] == [CLASSES[guess.index] for guess in each.guesses]
        assert [guess.probability for guess in each.guesses] == pytest.approx(sorted(row, reverse=True), abs=1e-6)
    broken, ribbon = (str(folder / "photos" / name) for name in ("broken.jpg", "ribbon.png"))
    assert [each.image for each in result.skipped] == [broken, ribbon]
    assert said == [
        f"{broken} is skipped: no image that Pillow knows, or a damaged one",
        f"{ribbon} is skipped: more than 100 times as long as wide",
        "2 images smaller than 16 px: enlarged",
    ]
    assert result.notes == (said[-1],)


def test_content_and_files_in_the_order_in_which_they_are_named(folder: Path) -> None:
    paths = sorted((folder / "photos").glob("*.*"))
    named = [paths[3], Encoded(paths[0].read_bytes(), "first"), folder / "photos/more"]
    result = api.predict(api.PredictRequest(folder / "model.onnx", named, top_k=1, runtime="openvino"))
    assert [each.image for each in result.predictions] == [str(paths[3]), "first", str(folder / "photos/more/red.png")]
    assert all(len(each.guesses) == 1 for each in result.predictions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "--top-k is 0: give 1 or more"),
        ({"images": []}, "no images are named"),
        ({"images": ["a", "b"]}, "a, b: no such file or folder"),
        ({"model": "nothing.onnx"}, r"nothing\.onnx: no such file or folder"),
        ({"labels": ["a"]}, "has 3 outputs, 1 names of classes are given"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": folder, "images": [folder / "photos"], **change}
    with pytest.raises(api.UserError, match=message):
        api.predict(api.PredictRequest(**given))


def test_the_verb_prints_lines(vitnas: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code, out, err = vitnas("predict", ".", "photos/more/red.png")
    assert (code, err) == (0, "")
    name, *classes = out.splitlines()
    assert name == "photos/more/red.png"
    assert sorted(line.split()[-1] for line in classes) == sorted(CLASSES)
    assert sum(float(line.split("%")[0]) for line in classes) == pytest.approx(100, abs=0.2)
    code, out, err = vitnas("predict", ".", "photos/more", "photos/broken.jpg", "--csv", "classes.csv")
    assert (code, err) == (0, "photos/broken.jpg is skipped: no image that Pillow knows, or a damaged one\n")
    assert out.split() == [classes[0].split()[0], classes[0].split()[1], "photos/more/red.png"]
    (row,) = csv.DictReader((folder / "classes.csv").open())
    assert (row["image"], row["rank"], row["class"]) == ("photos/more/red.png", "1", classes[0].split()[1])
    assert f"{float(row['probability']):.1%}" == classes[0].split()[0]
    assert vitnas("predict", ".", "photos/broken.jpg", "-q") == (1, "", "")
    assert vitnas("predict", ".", "photos/more", "-v")[2].startswith("opening ")


def test_what_is_read_is_not_overwritten(vitnas: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    labels = folder / "labels.txt"
    labels.write_text("one\ntwo\nthree\n")
    read = ("model.onnx", "photos/more/red.png", "photos/broken.jpg", "labels.txt")
    before = [Path(each).read_bytes() for each in read]
    for each in read:
        words = ("predict", ".", "photos", "photos/more/red.png", "--labels", str(labels), "--csv", each)
        vitnas.refused(vitnas(*words), f"--csv {each} would overwrite what is read: name another file")
    assert [Path(each).read_bytes() for each in read] == before


def test_links_that_lead_nowhere_and_odd_files_are_named(folder: Path) -> None:
    more = folder / "photos/more"
    (more / "gone.jpg").symlink_to(folder / "gone.jpg")
    (more / "drawing.svg").write_text("<svg/>")
    said: list[str] = []
    result = api.predict(api.PredictRequest(folder, [more]), said.append)
    assert [each.image for each in result.skipped] == [str(more / "gone.jpg")]
    assert said == [
        f"{more}: left out files that Pillow cannot open (1 .svg)",
        f"{more / 'gone.jpg'} is skipped: a link that leads nowhere, or no file",
    ]


def test_names_are_those_of_the_files(vitnas: Any, folder: Path) -> None:
    more = folder / "photos/more"
    odd = more / "new\nline\udcff.png"
    (more / "red.png").rename(odd)
    code, out, _ = vitnas("predict", str(folder), str(more), "--csv", str(folder / "classes.csv"))
    assert (code, out.split()[-1]) == (0, f"{more}/new\\nline\\xff.png")
    (row,) = csv.DictReader((folder / "classes.csv").open(errors="surrogateescape", newline=""))
    assert row["image"] == str(odd)
    found = json.loads(vitnas("predict", str(folder), str(more), "--json")[1])
    assert found["predictions"][0]["image"] == str(odd)


def test_classes_of_one_name_are_told_apart() -> None:
    guesses = (Guess(4, "crane", 0.5, shared=True), Guess(5, "crane", 0.25, shared=True), Guess(1, "emu", 0.125))
    assert [each.label for each in (*guesses, Guess(2, "", 0.1, shared=True))] == ["crane (4)", "crane (5)", "emu", "2"]


def test_json_has_all_of_it(vitnas: Any, folder: Path) -> None:
    code, out, _ = vitnas("predict", str(folder), str(folder / "photos"), "--json", "-q", "--top-k", "2")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["model", "runtime", "preprocess", "predictions", "skipped", "notes"]
    assert [len(each["classes"]) for each in found["predictions"]] == [2] * 21
    assert set(found["predictions"][0]["classes"][0]) == {"class", "index", "probability"}
    assert [each["reason"] for each in found["skipped"]][1] == "more than 100 times as long as wide"
    assert found["preprocess"]["size"] == 16


def test_an_image_comes_from_standard_input(vitnas: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(content: bytes) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return vitnas("predict", str(folder), "-")

    path = folder / "photos/more/red.png"
    code, out, _ = given(path.read_bytes())
    assert (code, out.splitlines()[0]) == (0, "-")
    assert out.splitlines()[1:] == vitnas("predict", str(folder), str(path))[1].splitlines()[1:]
    vitnas.refused(given(b""), "standard input, which is empty")
    vitnas.refused(given(f"{path}\n".encode()), "holds names of images", "xargs")
    assert given(b"no image")[0] == 1
    monkeypatch.setattr(sys, "stdin", None)  # closed
    vitnas.refused(vitnas("predict", str(folder), "-"), "standard input, which is empty")


def test_a_file_of_others_is_told_what_it_lacks(vitnas: Any, folder: Path) -> None:
    theirs, labels = write_toy(folder / "theirs.onnx", ("N", 3, "H", "W")), folder / "labels.txt"
    labels.write_text("one\ntwo\nthree\n")
    words = ("predict", str(theirs), str(folder / "photos/more"))
    vitnas.refused(vitnas(*words), "--preprocess", "imagenet", "preprocess.json")
    vitnas.refused(vitnas(*words, "--preprocess", "imagnet"), "did you mean imagenet")
    code, out, err = vitnas(*words, "--preprocess", "imagenet,size=16", "--labels", str(labels))
    assert code == 0
    assert out.split()[1] in ("one", "two", "three")
    assert err == (
        "--preprocess: 16 px cut from the middle of 18 px, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, "
        "crop 0.875\n"
    )
    assert vitnas(*words, "--preprocess", "imagenet,size=16", "-q")[1].split()[1] in ("0", "1", "2")


def test_lines_fit_a_terminal() -> None:
    prediction = Prediction("x" * 70 + "photo.jpg", (Guess(0, "a" * 90, 0.5), Guess(1, "b\n", 0.25)))
    for width in (60, 80):
        assert len(told(prediction, 1, width)) == width
        assert [len(line) for line in told(prediction, 2, width).splitlines()] == [79, width, 11]
    short = Prediction("x" * 70 + "photo.jpg", (Guess(0, "cat", 0.5),))
    assert told(short, 1, 80) == " 50.0%  cat" + " " * 23 + "…" + "x" * 36 + "photo.jpg"
    assert told(short, 1, 0).endswith(short.image)


def test_the_process_does_not_import_torch(folder: Path) -> None:
    code = (
        "import sys; from nas.cli.app import app\n"
        f"app(['predict', {str(folder)!r}, {str(folder / 'photos')!r}, '-q'], standalone_mode=False)\n"
        "loaded = {'torch', 'torchvision', 'timm', 'onnx', 'openvino', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(', '.join(loaded) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
