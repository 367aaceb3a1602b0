"""What an input's digest follows: what the input holds, not where it lies."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.data.dataset import ImageData, open_data
from nas.data.digests import _digest
from nas.data.inputs import data_digest, identity
from nas.errors import UserError
from nas.identity import IMAGES, changed, older
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


@pytest.mark.parametrize(("name", "side"), [("x.bmp", 256), ("x.bmp", 700), ("x.tif", 700), ("x.ppm", 700)])
def test_images_that_differ_in_a_patch_differ(tmp_path: Path, name: str, side: int) -> None:
    """Of an uncompressed image, all bytes outside of the patch are the same."""
    pixels = np.full((side, side, 3), 200, np.uint8)
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / name)
    row = side // 5
    pixels[row : row + 50, 20:170] = 90
    Image.fromarray(pixels).save(tmp_path / "other" / name)
    one, other = (_digest(tmp_path / part / name) for part in ("one", "other"))
    assert one != other
    (tmp_path / "copy").write_bytes((tmp_path / "one" / name).read_bytes())
    assert _digest(tmp_path / "copy") == one, "whatever its name"


def test_of_a_large_compressed_file_three_pieces_are_read(tmp_path: Path) -> None:
    content = bytearray(b"\x89PNG" + bytes(2**20))
    (tmp_path / "a").write_bytes(content)
    content[2**19] = 1
    (tmp_path / "b").write_bytes(content)
    content[2**19] = 0
    content[2**18] = 1
    (tmp_path / "c").write_bytes(content)
    a, b, c = (_digest(tmp_path / name) for name in "abc")
    assert a == c != b


def test_what_an_older_vitnas_digested_is_called_so(tmp_path: Path) -> None:
    now = {IMAGES: data_digest(open_data(None, 32, None, 0))}
    before = {IMAGES: "0123456789abcdef"}
    assert older(before, now)
    assert not older(now, now)
    assert not older(now, {IMAGES: now[IMAGES][:-1] + "-"}), "other images"
    assert not older({}, now)
    assert not older(now, {})


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
