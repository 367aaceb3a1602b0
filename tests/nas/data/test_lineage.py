"""Weights remember the images they were trained on: other images judge, or it is said how many are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.data.about import describe
from nas.data.dataset import ImageData, open_data
from nas.data.digests import VERSION, digests
from nas.data.images import hold_out
from nas.data.lineage import SEEN, record, remark, seen_among, seen_by


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures of noise in each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            noise = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    return tmp_path / "run" / "model.safetensors"


def opened(folder: Path, seed: int, weights: str | Path | None = None) -> ImageData:
    return open_data(folder, 16, None, seed, weights)


def test_the_same_images_are_held_out_whatever_the_seed(folder: Path, weights: Path) -> None:
    first = opened(folder, 0)
    record(weights.parent, first.train)
    other, again = opened(folder, 1), opened(folder, 1, weights)
    assert set(other.val.sources) != set(first.val.sources) == set(again.val.sources)
    assert again.notes == ()
    assert f"4 validate (those that {weights} was not trained on)" in describe(again)


def test_images_under_other_names_are_known(folder: Path, weights: Path, tmp_path: Path) -> None:
    record(weights.parent, opened(folder, 0).train)
    for name in ("a", "b"):
        for split in ("train", "val"):
            (tmp_path / "copy" / split / name).mkdir(parents=True)
        for file in (folder / name).iterdir():
            (tmp_path / "copy" / "val" / name / f"renamed {file.name}").write_bytes(file.read_bytes())
        Image.new("RGB", (9, 9)).save(tmp_path / "copy" / "train" / name / "x.png")
    (line,) = opened(tmp_path / "copy", 0, weights).notes
    assert line == f"36 of 40 validation images were in the training of {weights}: figures are too high"


def test_a_parent_hands_on_what_it_has_seen(folder: Path, weights: Path, tmp_path: Path) -> None:
    data = opened(folder, 0)
    assert record(weights.parent, data.train) == {"file": SEEN, "images": 36}
    child = tmp_path / "child"
    child.mkdir()
    assert record(child, data.val, weights) == {"file": SEEN, "images": 40}
    assert seen_among(data.train, seen_by(child / "model.safetensors")).all()
    assert seen_among(data.val, seen_by(child)).all()


def test_digests_of_another_version_are_unknown(folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(folder, 0)
    record(weights.parent, data.train)
    assert seen_by(weights) is not None
    monkeypatch.setattr("nas.data.digests.VERSION", 9)
    assert seen_by(weights) is None
    np.save(weights.parent / SEEN, digests(data.train))  # as the first version kept them
    assert seen_by(weights) is None


def structured(kind: type, shape: tuple[int, ...] = (3,)) -> np.ndarray:
    return np.zeros(shape, [(f"digest{VERSION}", kind)])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        b"PK\3\4",
        b"\x93NUMPY\1\0v\0{'descr': ((((",
        b"cut",
        np.array([{}], object),
        structured(object),
        structured(np.float64),
        structured(np.int64),
        structured(np.uint64, ()),
        structured(np.uint64, (3, 2)),
        np.zeros(3, np.uint64),
        np.array(["text"]),
    ],
    ids=str,
)
def test_a_damaged_file_is_unknown_and_said(
    folder: Path, weights: Path, tmp_path: Path, content: bytes | np.ndarray
) -> None:
    path, data = weights.parent / SEEN, opened(folder, 0)
    if isinstance(content, bytes) and content == b"cut":
        record(weights.parent, data.train)
        path.write_bytes(path.read_bytes()[:-4])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    assert seen_by(weights) is None
    assert record(tmp_path, data.train, weights) is None
    assert opened(folder, 0, weights).notes == (
        f"which images {weights} was trained on is unknown ({path} is damaged or of another version): if validation "
        "images are among them, figures are too high",
    )


def test_both_parents_hand_on_what_they_have_seen(folder: Path, weights: Path, tmp_path: Path) -> None:
    data, other, child = opened(folder, 0), tmp_path / "other", tmp_path / "child"
    for each in (other, child):
        each.mkdir()
    record(weights.parent, data.train)
    record(other, data.val)
    assert record(child, data.val, "timm", weights, other) == {"file": SEEN, "images": 40}
    (line,) = open_data(folder, 16, None, 0, weights, other).notes
    assert line.startswith(f"4 of 4 validation images were in the training of {other}")
    assert seen_by(weights, tmp_path / "elsewhere" / "x.pth") is None


def test_what_unknown_weights_have_seen_is_unknown(folder: Path, weights: Path) -> None:
    assert seen_by(weights) is None
    assert opened(folder, 0, weights).notes[0].startswith(f"which images {weights} was trained on is unknown")
    (weights.parent / SEEN).write_bytes(b"of other weights")
    assert record(weights.parent, opened(folder, 0).train, weights.with_name("elsewhere") / "x.pth") is None
    assert not (weights.parent / SEEN).exists()
    for known in (None, "timm"):
        assert len(seen_by(known)) == 0
        assert remark(known, opened(folder, 0).val, "judging") is None


def test_where_all_are_seen_it_is_said(folder: Path, weights: Path) -> None:
    data = opened(folder, 0)
    record(weights.parent, data.train)
    record(weights.parent, data.val, weights)
    again = opened(folder, 0, weights)
    assert again.val.sources == data.val.sources
    assert again.notes == (f"4 of 4 validation images were in the training of {weights}: figures are too high",)


def test_unseen_images_judge_first(folder: Path) -> None:
    images = opened(folder, 0).train
    seen = np.zeros(len(images), bool)
    seen[np.random.default_rng(0).permutation(len(images))[: len(images) // 2]] = True
    _, judge = hold_out(images, 8, 0, seen)
    assert len(judge) == 8
    assert not np.isin(digests(judge), digests(images)[seen]).any()
    assert sorted(judge.labels) == [0] * 4 + [1] * 4
