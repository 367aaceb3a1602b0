"""Folders as users have them: what is a split, a class and an image, and what is left out and said."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.data.about import describe
from nas.data.dataset import ImageData, open_data
from nas.data.folders import split_of
from nas.data.images import decode
from nas.data.look import oddities
from nas.errors import UserError

rng = np.random.default_rng(0)


def fill(folder: Path, *classes: str, count: int = 4, suffix: str = ".png", form: str = "PNG") -> Path:
    """Pictures of noise, each its own."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / name / f"{i}{suffix}", form)
    return folder


def opened(folder: Path) -> ImageData:
    return open_data(folder, 16, None, seed=0)


def message(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        opened(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("train", "Train", "TRAINING", "training_set", "trainset", "2021_train", "trn")),
        *((name, "val") for name in ("valid", "Val", "validation", "dev", "val2017", "Validation Images", "eval")),
        *((name, "test") for name in ("test", "Test_Set", "testing")),
        *((name, None) for name in ("train station", "trainer", "values", "cat", "tests tube", "42", "set", "evals-x")),
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("train", "val", "others"),
    [
        ("Train", "Val", []),
        ("training_set", "test_set", []),
        ("train", "dev", []),
        ("train", "valid", ["test"]),
        ("training", "validation", ["images", "Test"]),
    ],
)
def test_splits_whatever_they_are_called(tmp_path: Path, train: str, val: str, others: list[str]) -> None:
    for part in (train, val, *others):
        fill(tmp_path / part, "cat", "dog", count=2)
    data = opened(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert {path.relative_to(tmp_path).parts[0] for path in data.val.sources} == {val}
    assert {path.relative_to(tmp_path).parts[0] for path in data.train.sources} == {train}
    assert f"4 validate ({val}/)" in describe(data)
    assert data.left_out == tuple(f"{name}/" for name in sorted(others))


def test_one_class_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        fill(tmp_path / "split" / part, "cat")
    assert message(tmp_path / "split").endswith("has one class ('cat'): give two or more")
    fill(tmp_path / "whole", "cat")
    assert message(tmp_path / "whole").endswith("has one class ('cat'): give two or more, or train/ beside val/")


def test_folders_that_could_be_several_things_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        fill(tmp_path / "a" / part, "cat", "dog")
    assert "has val/ and valid/, which could all be its validation images: leave one" in message(tmp_path / "a")
    for part in ("val", "test"):
        fill(tmp_path / "b" / part, "cat", "dog")
    assert "has test/ and val/ but no train/" in message(tmp_path / "b")


@pytest.mark.parametrize("below", ["data", "data/deeper"])
@pytest.mark.parametrize("inside", [("daisy", "rose"), ("train", "val")])
def test_one_folder_of_classes(tmp_path: Path, below: str, inside: tuple[str, str]) -> None:
    for part in inside:
        fill(tmp_path / below / part, "x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "readme.txt").write_text("")
    assert message(tmp_path).endswith(f"holds one folder: did you mean {tmp_path / below}?")


def test_hidden_and_system_entries_are_left_out_at_every_depth(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog", ".hidden", "@eaDir/x", "__MACOSX", "cat/.ipynb_checkpoints", "dog/a/.cache", "dog/a")
    for name in ("cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "cat/._0.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    data = opened(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert len(data.train) + len(data.val) == 12
    assert "; left out: " in describe(data)
    for name in (".hidden/", "@eaDir/", "__MACOSX/", ".ipynb_checkpoints/", ".cache/"):
        assert name in describe(data)


def test_links(tmp_path: Path) -> None:
    """To the folder above, to another class and to themselves they are left out, others read."""
    root = fill(tmp_path / "root", "cat", "dog")
    fill(tmp_path / "elsewhere", "cow", "pigs")
    for link, target in (
        ("cat/up", ".."),
        ("cat/higher", "../.."),
        ("cat/dogs", "../dog"),
        ("kitten", "cat"),
        ("cow", "../elsewhere/cow"),
        ("dog/pigs", "../../elsewhere/pigs"),
        ("dog/again", "../../elsewhere/pigs"),
    ):
        os.symlink(target, root / link)
    data = opened(root)
    assert data.classes == ["cat", "cow", "dog"]
    counts = [(data.train.labels + data.val.labels).count(label) for label in range(3)]
    assert counts == [4, 4, 8]
    for link in ("cat/up", "cat/higher", "cat/dogs", "kitten"):
        assert f"link {link} (to a folder that is read anyway)" in data.left_out
    assert sum("dog/" in line for line in data.left_out) == 1


@pytest.mark.parametrize(
    ("suffix", "form"), [(".jfif", "JPEG"), (".gif", "GIF"), (".avif", "AVIF"), ("", "PNG"), (".0", "JPEG")]
)
def test_images_under_other_suffixes_are_used(tmp_path: Path, suffix: str, form: str) -> None:
    fill(fill(tmp_path, "cat"), "dog", suffix=suffix, form=form)
    (tmp_path / "dog" / f"list{suffix or '.txt'}").write_text("no image")
    data = opened(tmp_path)
    assert len(data.train) + len(data.val) == 8
    assert data.left_out == (f"files that Pillow cannot open (1 {suffix or '.txt'})",)


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    for i in range(3):
        (tmp_path / "cat" / f"{i}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "cat" / "notes").write_text("")
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    line = describe(opened(tmp_path))
    assert "1 image beside the class folders (loose.png)" in line
    assert "files that Pillow cannot open (3 .heic, 1 without a suffix)" in line
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "x.heic").write_bytes(b"")
    assert "eel holds no images but files that Pillow cannot open (1 .heic): add some" in message(tmp_path)


def test_classes_that_validation_lacks_are_noted(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b", "c")
    fill(tmp_path / "val", "a")
    (tmp_path / "val" / "b").mkdir()
    (tmp_path / "val" / "empty").mkdir()
    data = opened(tmp_path)
    assert (data.classes, set(data.val.labels)) == (["a", "b", "c"], {0})
    assert data.notes == ("val/ has no images of b, c: accuracy says nothing of them",)
    fill(tmp_path / "val", "A")
    assert "class 'A' is in" in message(tmp_path)
    assert message(tmp_path).endswith("not in train/: rename it to a")


def test_validation_without_images_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b")
    (tmp_path / "val" / "a").mkdir(parents=True)
    assert message(tmp_path).endswith("val holds no images: add some, or remove it")


def test_a_class_written_in_two_ways_of_unicode_is_one(tmp_path: Path) -> None:
    fill(tmp_path / "train", "caf\u00e9", "b")
    fill(tmp_path / "val", "cafe\u0301", "b")
    data = opened(tmp_path)
    assert data.val.labels == [0] * 4 + [1] * 4
    assert data.notes == ()


def test_what_looks_odd_is_noted(tmp_path: Path) -> None:
    fill(tmp_path / "case", "Cat", "cat ", "train")
    assert opened(tmp_path / "case").notes == (
        "a class is called 'train', as a split is",
        "the classes 'Cat' and 'cat ' differ in case or spaces only",
    )
    fill(tmp_path / "deep", "pets/cat", "pets/dog", "farm/cow", "farm/hen")
    assert opened(tmp_path / "deep").notes[0].startswith("2 classes of 2 hold folders of their own (farm: cow, hen)")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    root = fill(tmp_path / "a\nb", "c\nd", os.fsdecode(b"caf\xe9"), "\u00b2", "5\u2461")
    line = describe(opened(root))
    assert "\n" not in line
    assert "5\u2461, c\\nd, caf\\xe9, \u00b2: 4 each" in line
    (root / "c\nd" / ".." / "empty\n").mkdir()
    assert "empty\\n holds no images" in message(root)


@pytest.mark.parametrize("name", ["braces{1}", "photos.tar"])
def test_a_folder_may_be_called_like_shards(tmp_path: Path, name: str) -> None:
    assert opened(fill(tmp_path / name, "cat", "dog")).classes == ["cat", "dog"]


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    for name, hint in (("x.zip", "unpack it and give the folder"), ("x.tar.gz", "unpack it"), ("x.csv", "<class>/")):
        (tmp_path / name).write_bytes(b"")
        assert hint in message(tmp_path / name)


def test_images_of_one_value_are_noted(tmp_path: Path) -> None:
    assert oddities(opened(fill(tmp_path / "noise", "a", "b"))) == []
    for name in ("a", "b"):
        (tmp_path / "masks" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 2, (32, 32), np.uint8)).save(tmp_path / "masks" / name / f"{i}.png")
    (line,) = oddities(opened(tmp_path / "masks"))
    assert "training images looked at are of nearly one value (levels 0 to 1 of 0 to 255)" in line


def test_the_same_image_twice_is_noted(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "val", "a", "b")
    copy = (tmp_path / "train" / "a" / "1.png").read_bytes()
    (tmp_path / "val" / "a" / "other name.png").write_bytes(copy)
    (tmp_path / "train" / "b" / "copy.png").write_bytes(copy)
    first, second = oddities(opened(tmp_path))
    assert first.startswith("1 of 9 validation images are training images too (")
    assert "other name.png" in first
    assert second.startswith("1 training images are in two classes (")
    assert "a/1.png and " in second


def test_an_animated_picture_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "x.gif").getpixel((4, 4)) == (255, 0, 0)


def test_pipes_devices_and_links_that_lead_nowhere_are_left_out(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", "cats", "dogs")
    os.mkfifo(data / "cats" / "pipe.png")
    (data / "cats" / "zero.png").symlink_to("/dev/zero")
    (data / "dogs" / "gone.png").symlink_to("nowhere.png")
    (data / "dogs" / "circle").symlink_to("circle")
    told = describe(opened(data))
    assert "8 images" in told
    for name in ("cats/pipe.png", "cats/zero.png", "dogs/gone.png", "dogs/circle"):
        assert f"{name} (no regular file)" in told


def test_suffixes_are_those_of_torchvision() -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from nas.data.listing import SUFFIXES

    assert SUFFIXES == IMG_EXTENSIONS
