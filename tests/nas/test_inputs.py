"""What an input's digest follows: what the input holds, not where it lies."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.data import ImageData, open_data
from nas.errors import UserError
from nas.inputs import changed, data_digest, identity
from search_spaces import get_arch


def pictures(root: Path, shade: int = 0) -> Path:
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(root / part / label / f"{i}.png")
    return root


def opened(root: Path, seed: int = 0) -> ImageData:
    return open_data(root, 32, None, seed)


def test_a_folder_of_images_may_move_but_not_change(tmp_path: Path) -> None:
    first = data_digest(opened(pictures(tmp_path / "first")))
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(tmp_path / "first", moved)
    assert data_digest(opened(moved)) == first
    (moved / "train" / "a" / "0.png").rename(moved / "train" / "b" / "7.png")
    assert data_digest(opened(moved)) != first, "another label"
    shutil.rmtree(moved)
    shutil.copytree(tmp_path / "first", moved)
    with (moved / "val" / "b" / "1.png").open("ab") as file:
        file.write(b"longer")
    assert data_digest(opened(moved)) != first, "another size"
    shutil.rmtree(moved)
    shutil.copytree(tmp_path / "first", moved)
    shutil.copy(moved / "val" / "b" / "1.png", moved / "val" / "b" / "2.png")
    assert data_digest(opened(moved)) != first, "one more"


def test_images_exchanged_for_others_of_equal_size_and_time_are_other_data(tmp_path: Path) -> None:
    root = pictures(tmp_path / "first", shade=10)
    first = data_digest(opened(root))
    file = root / "train" / "a" / "0.png"
    state = file.stat()
    Image.fromarray(np.full((8, 8, 3), 11, np.uint8)).save(file)
    assert file.stat().st_size == state.st_size
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert data_digest(opened(root)) != first


def test_digits_and_names_that_are_no_text(tmp_path: Path) -> None:
    assert data_digest(open_data(None, 32, None, 0)) == data_digest(open_data(None, 64, None, 0))
    root = pictures(tmp_path / "odd")
    os.rename(root / "train" / "a" / "0.png", os.fsencode(root / "train" / "a") + b"/\xff.png")
    assert data_digest(opened(root))


def test_networks_go_by_arch_and_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    known = identity(model=(get_arch("shvit_s1"), weights))
    other = weights.with_name("copy")
    shutil.copy(weights, other)
    assert identity(model=(get_arch("shvit_s1"), other)) == known
    weights.write_bytes(b"two")
    assert changed(known, identity(model=(get_arch("shvit_s1"), weights))) == "the weights of --model"
    assert changed(known, identity(model=(get_arch("shvit_s2"), other))) == "the network of --model"
    assert "network" in changed(known, identity(model=None))
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        identity(model=(get_arch("shvit_s1"), weights))
