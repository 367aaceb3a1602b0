"""Which images networks are judged on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.data.images import Images, plain_transform
from nas.data.lineage import record
from nas.errors import UserError
from nas.evaluate.images import open_images
from nas.evaluate.request import EvaluateRequest


def draw(folder: Path, *classes: str, count: int = 4, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_one_part_of_a_data_set(tmp_path: Path) -> None:
    draw(tmp_path / "train", "a", "b", count=6)
    draw(tmp_path / "val", "b", "c", count=2)
    found = open_images(str(tmp_path), None, None, [None])
    assert (found.classes, found.part, len(found.images)) == (["b", "c"], "val/", 4)
    assert found.images.labels == [0, 0, 1, 1]
    train = open_images(str(tmp_path), "train", None, [None])
    assert (train.part, train.classes, len(train.images)) == ("train/", ["a", "b"], 12)
    both = open_images(str(tmp_path), "all", None, [None])
    assert (both.classes, len(both.images)) == (["a", "b", "c"], 16)
    with pytest.raises(UserError, match=r"has train/ and val/ but no test/"):
        open_images(str(tmp_path), "test", None, [None])


def test_a_part_alone_is_a_data_set(tmp_path: Path) -> None:
    draw(tmp_path / "val", "b", "c")
    assert open_images(str(tmp_path / "val"), None, None, [None]).part == ""
    assert open_images(str(tmp_path), None, None, [None]).part == "val/"
    with pytest.raises(UserError, match="leave --split out"):
        open_images(str(tmp_path / "val"), "test", None, [None])


def test_training_images_are_never_the_default(tmp_path: Path) -> None:
    draw(tmp_path / "train", "b", "c")
    with pytest.raises(UserError, match=r"has train/ but no val/ or test/: say which"):
        open_images(str(tmp_path), None, None, [None])


def test_an_empty_class_is_told(tmp_path: Path) -> None:
    draw(tmp_path, "a")
    (tmp_path / "b").mkdir()
    found = open_images(str(tmp_path), None, None, [None])
    assert found.classes == ["a"]
    assert any("no images of b" in line for line in found.notes)


def test_no_images_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(str(tmp_path), None, None, [None])


def test_some_of_the_images(tmp_path: Path) -> None:
    draw(tmp_path, "a", "b", count=5)
    found = open_images(str(tmp_path), None, 3, [None])
    assert len(found.images) == 3
    assert any("3 of 10 images are judged, picked at random" in line for line in found.notes)
    with pytest.raises(UserError, match="--limit is 0"):
        EvaluateRequest(["toy.onnx"], str(tmp_path), limit=0).check()


def test_what_was_trained_on_is_left_out_where_it_can_be(tmp_path: Path) -> None:
    data, run = draw(tmp_path / "images", "a", "b"), tmp_path / "run"
    run.mkdir()
    seen = [data / "a" / "0.png", data / "a" / "1.png", data / "b" / "3.png"]
    record(run, Images(seen, [0, 0, 1], plain_transform(1)))
    found = open_images(str(data), None, None, [run / "model.onnx"])
    assert len(found.images) == 5
    assert not set(seen) & set(found.images.sources)
    assert "5 of 8 that the network was not trained on" in found.part
    assert not found.notes
    every = open_images(str(data), "all", None, [run / "model.onnx"])
    assert len(every.images) == 8
    assert any("3 of 8 judged images were in the training of" in line for line in every.notes)


def test_what_a_foreign_network_was_trained_on_is_unknown(tmp_path: Path) -> None:
    found = open_images(str(draw(tmp_path, "a", "b")), None, None, [tmp_path / "other.onnx", "timm"])
    assert len(found.images) == 8
    assert len(found.notes) == 1
    assert "is unknown" in found.notes[0]
