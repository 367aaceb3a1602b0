"""Image folders and digits: splits, transforms, broken files, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from nas.data.batches import loader, skipped_line
from nas.data.dataset import open_data, some_of
from nas.data.images import Augmentation, Images, decode, hold_out, split, train_transform
from nas.errors import UserError

GREYS = {"black": 0, "white": 255}


def fill(folder: Path, **counts: int) -> Path:
    """Folders of plain JPEGs and PNGs by turns, 30 x 20 pixels; a class's grey is its own."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (30, 20), (GREYS.get(name, 128),) * 3)
            image.save(folder / name / f"{i:03}.{'jpg' if i % 2 else 'png'}")
    return folder


def truncate(file: Path) -> str:
    """Keep the header and lose the pixels."""
    file.write_bytes(file.read_bytes()[:-40])
    return str(file)


def spoil(file: Path) -> str:
    file.write_text("no image")
    return str(file)


def test_one_folder_is_split_by_class(tmp_path):
    data = open_data(fill(tmp_path / "images", black=20, white=60), 16, 2, seed=0)
    assert data.classes == ["black", "white"]
    assert (data.name, data.demo) == (str(tmp_path / "images"), False)
    assert [data.val.labels.count(label) for label in (0, 1)] == [2, 6]
    assert [data.train.labels.count(label) for label in (0, 1)] == [18, 54]
    assert len({*data.train.sources, *data.val.sources}) == 80
    for part in (data.train, data.val):
        assert all(
            file.parent.name == data.classes[label] for file, label in zip(part.sources, part.labels, strict=True)
        )


def test_the_split_depends_on_the_seed_alone(tmp_path):
    folder = fill(tmp_path, black=30, white=30)
    first, again, other = (open_data(folder, size, 2, seed).val.sources for size, seed in ((16, 1), (32, 1), (16, 2)))
    assert first == again != other


def test_split_keeps_shares():
    labels = [0] * 100 + [1] * 10 + [2] * 2
    train, val = split(labels, 0.2, seed=3)
    assert [sum(labels[i] == label for i in val) for label in range(3)] == [20, 2, 1]
    assert sorted(train + val) == list(range(112))


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_folders_of_train_and_val(tmp_path, val):
    fill(tmp_path / "train", cat=3, dog=4)
    fill(tmp_path / val, cat=1, dog=2)
    data = open_data(tmp_path, 16, None, seed=0)
    assert (len(data.train), len(data.calibration), len(data.val)) == (7, 7, 3)
    assert all(file.is_relative_to(tmp_path / val) for file in data.val.sources)


def test_a_class_may_be_called_train(tmp_path):
    data = open_data(fill(tmp_path, train=10, plane=10), 16, 2, seed=0)
    assert data.classes == ["plane", "train"]


def test_classes_in_natural_order_hidden_entries_left_out(tmp_path):
    fill(tmp_path, **{"class 10": 2, "class 9": 2, ".cache": 2})
    (tmp_path / "class 9" / "deeper").mkdir()
    (tmp_path / "class 9" / "000.png").rename(tmp_path / "class 9" / "deeper" / "x.PNG")
    (tmp_path / "class 9" / "._001.jpg").write_text("what macOS leaves behind")
    (tmp_path / "class 9" / "notes.txt").write_text("no image")
    data = open_data(tmp_path, 16, 2, seed=0)
    assert data.classes == ["class 9", "class 10"]
    assert len(data.train) + len(data.val) == 4


@pytest.mark.parametrize("resolution", [16, 37])
def test_images_are_normalised_and_keep_the_resolution(tmp_path, resolution):
    data = open_data(fill(tmp_path, black=10, white=10), resolution, 2, seed=0)
    for part in (data.train, data.calibration, data.val):
        for value, label in zip((0.0, 1.0), (0, 1), strict=True):
            image, found = part[part.labels.index(label)]
            expected = (value - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)
            assert (image.shape, image.dtype, found) == ((3, resolution, resolution), torch.float32, label)
            assert torch.allclose(image, expected[:, None, None].expand_as(image), atol=1e-5)


def test_only_training_images_vary(tmp_path):
    folder = fill(tmp_path, black=10, white=10)
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    for file in folder.rglob("*.png"):
        Image.fromarray(noise).save(file)
    data = open_data(folder, 24, 2, seed=0)
    i = next(i for i, file in enumerate(data.train.sources) if file.suffix == ".png")
    assert data.calibration.sources == data.train.sources
    assert torch.equal(data.calibration[i][0], data.calibration[i][0])
    assert not torch.equal(data.train[i][0], data.train[i][0])


def test_digits():
    data = open_data(None, 16, None, seed=0)
    assert data.demo
    assert data.name == "digits (scikit-learn, 1,797 images of 8x8 pixels)"
    assert data.classes == list("0123456789")
    assert len(data.train) + len(data.val) == 1797
    assert max(source.max() for source in data.val.sources) == 255
    for label in range(10):
        assert data.val.labels.count(label) == round(0.2 * (data.train.labels + data.val.labels).count(label))
    assert data.val.labels != open_data(None, 16, 10, seed=1).val.labels
    assert open_data(None, 224, 10, seed=0).train[0][0].shape == (3, 224, 224)


def test_digits_stay_upright():
    """Scaled back down, a digit is the picture it was made from; nothing mirrors it in training."""
    data = open_data(None, 64, None, seed=0)
    seven = data.calibration.labels.index(7)
    image, _ = data.calibration[seven]
    small = torch.nn.functional.interpolate(image[None], 8, mode="area")[0, 0]
    raw = torch.from_numpy(data.calibration.sources[seven].astype(np.float32))
    assert np.corrcoef(small.flatten(), raw.flatten())[0, 1] > 0.97
    for each in (data, data.at(64, Augmentation(scale=0.08, hflip=1.0))):
        shown = torch.stack([each.train[seven][0] for _ in range(50)]).mean(0)[None]
        small = torch.nn.functional.interpolate(shown, 8, mode="area")[0, 0].flatten()
        assert np.corrcoef(small, raw.flatten())[0, 1] > np.corrcoef(small, raw.flip(1).flatten())[0, 1] + 0.2


def halves(folder: Path) -> Path:
    """Two classes of pictures that are black on the left and white on the right."""
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (20, 0, 40, 40))
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(4):
            image.save(folder / name / f"{i}.png")
    return folder


def mirrored(images: Images) -> list[bool]:
    return [bool(image[..., :2].mean() > image[..., -2:].mean()) for image, _ in (images[0] for _ in range(40))]


def test_augmentation(tmp_path):
    data = open_data(halves(tmp_path), 16, 2, seed=0)
    same = data.at(24, Augmentation(scale=1.0, hflip=0.0))
    assert same.train[0][0].shape == same.calibration[0][0].shape == same.val[0][0].shape == (3, 24, 24)
    assert (same.train.sources, same.val.labels) == (data.train.sources, data.val.labels)
    assert not any(mirrored(same.train))
    assert all(mirrored(data.at(24, Augmentation(scale=1.0, hflip=1.0)).train))
    assert 5 < sum(mirrored(data.at(24).train)) < 35
    assert not any(mirrored(data.at(24, Augmentation(hflip=1.0)).calibration))

    erased = same.at(24, Augmentation(scale=1.0, hflip=0.0, erasing=1.0)).train
    for _ in range(10):
        assert 0.01 < (erased[0][0] != same.train[0][0]).any(0).float().mean() < 0.5
    mixed = data.at(24, Augmentation(scale=1.0, hflip=0.0, auto_augment="rand-m9-mstd0.5-inc1")).train
    assert len({mixed[0][0].sum().item() for _ in range(10)}) > 2


def test_least_crop():
    """The smallest of 300 crops shows as little of a ramp from left to right as `scale` and the side ratio allow."""
    ramp = np.tile(np.linspace(0, 255, 100).astype(np.uint8), (100, 1))
    images = Images([ramp], [0], None)
    for scale in (0.08, 0.5):
        shown = images.transformed(train_transform(32, Augmentation(scale=scale, hflip=0.0), demo=False))
        spans = [(image.max() - image.min()).item() for image, _ in (shown[0] for _ in range(300))]
        least = (scale * 3 / 4) ** 0.5 * (1 / torch.tensor(IMAGENET_DEFAULT_STD)).min()
        assert 0.8 * least < min(spans) < 1.5 * least


def test_held_out_by_class():
    labels = [0] * 100 + [1] * 50 + [2] * 7
    images = Images([np.full((2, 2), i, np.uint8) for i in range(157)], labels, None)
    rest, held = hold_out(images, 31, seed=3)
    assert (len(rest), len(held)) == (126, 31)
    assert [held.labels.count(label) for label in range(3)] == pytest.approx([19.7, 9.9, 1.4], abs=1)
    pixels = [int(source[0, 0]) for source in (*rest.sources, *held.sources)]
    assert sorted(pixels) == list(range(157))
    assert all(labels[int(source[0, 0])] == label for source, label in zip(held.sources, held.labels, strict=True))

    def chosen(seed: int, of: Images = images) -> list[int]:
        return [int(source[0, 0]) for source in hold_out(of, 31, seed)[1].sources]

    assert chosen(3) == [int(source[0, 0]) for source in held.sources] == chosen(3, images.transformed(None))
    assert chosen(3) != chosen(4)
    with pytest.raises(UserError, match="157 images cannot be held out of 157"):
        hold_out(images, 157, seed=0)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 85])
def test_held_out_shares_for_every_count(count):
    labels = [i % 10 if i < 50 else 9 for i in range(90)]
    images = Images([np.zeros((2, 2), np.uint8)] * 90, labels, None)
    rest, held = hold_out(images, count, seed=0)
    assert (len(held), len(rest)) == (count, 90 - count)
    for label in range(10):
        assert abs(held.labels.count(label) - count * labels.count(label) / 90) <= 1


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),  # nothing of it shows: white does
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("P", 3, (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 25700, (100, 100, 100)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    image = Image.new(mode, (9, 9), colour)
    if mode == "P":
        image.putpalette([0] * 9 + [10, 20, 30])
    image.save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    with Image.open(next(tmp_path.iterdir())) as stored:
        assert stored.mode == mode
    found = decode(next(tmp_path.iterdir()))
    assert (found.mode, found.size) == ("RGB", (9, 9))
    assert np.abs(np.asarray(found, int) - expected).max() <= 1


def test_a_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 60, 70, 80])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=0)
    assert np.asarray(decode(tmp_path / "x.png")).tolist() == [[[255, 255, 255], [60, 70, 80]]]


@pytest.mark.parametrize(("mode", "levels"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_grey_of_16_bits_keeps_its_levels(tmp_path, mode, levels):
    """Every 8-bit level comes back; Pillow's own conversion makes all but 256 of the 65,536 levels white."""
    ramp = (np.arange(256) * 257).astype(levels).reshape(16, 16)
    Image.frombytes(mode, (16, 16), ramp.tobytes()).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as stored:
        assert stored.mode == mode
    assert np.asarray(decode(tmp_path / "x.tif"))[..., 1].flatten().tolist() == list(range(256))


def test_a_turned_camera(tmp_path):
    """Orientation 6: the first row of the sensor is the right side of the scene."""
    sensor = Image.new("RGB", (4, 2), "black")
    sensor.paste("white", (0, 0, 4, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    sensor.save(tmp_path / "x.png", exif=exif)
    assert np.asarray(decode(tmp_path / "x.png"))[..., 0].tolist() == [[0, 255]] * 4


def test_an_array_in_colour():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(pixels)), pixels)


def no_folder(folder: Path) -> Path:
    return folder / "absent"


def a_file(folder: Path) -> Path:
    (folder / "a.jpg").write_text("")
    return folder / "a.jpg"


def empty(folder: Path) -> Path:
    return folder


def loose_images(folder: Path) -> Path:
    fill(folder, x=2)
    for file in (folder / "x").iterdir():
        file.rename(folder / file.name)
    (folder / "x").rmdir()
    return folder


def class_without_images(folder: Path) -> Path:
    fill(folder, cat=3, dog=0, eel=3)
    (folder / "dog" / "readme.txt").write_text("none yet")
    return folder


def class_only_in_val(folder: Path) -> Path:
    fill(folder / "train", cat=3, dog=3)
    fill(folder / "test", cat=3, dog=3, eel=3)
    return folder


def train_alone(folder: Path) -> Path:
    fill(folder / "train", cat=3, dog=3)
    return folder


def single_image(folder: Path) -> Path:
    return fill(folder, cat=3, dog=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, "absent: no such folder"),
        (a_file, "a.jpg is not a folder"),
        (empty, "has no class folders"),
        (loose_images, "has no class folders"),
        (class_without_images, "dog holds no images"),
        (class_only_in_val, "/test/ but not in train/: remove it, or add images to train/eel"),
        (train_alone, "has train/ but no val/ or test/: give "),
        (single_image, "dog holds one image"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Path], message: str):
    with pytest.raises(UserError) as error:
        open_data(make(tmp_path), 16, None, seed=0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_number_of_classes(tmp_path):
    with pytest.raises(UserError, match=r"images has 2 classes but --num-classes is 7$"):
        open_data(fill(tmp_path / "images", cat=3, dog=3), 16, 7, seed=0)
    with pytest.raises(UserError, match=r"^digits \(.*\) has 10 classes but --num-classes is 7$"):
        open_data(None, 16, 7, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_and_named(tmp_path, workers):
    """Of 44 training images one is no image and one is cut off; every other keeps its own label."""
    data = open_data(fill(tmp_path, black=24, white=24), 16, 2, seed=0)
    broken = [truncate(next(f for f in data.train.sources if f.suffix == ".jpg")), spoil(data.train.sources[-1])]
    batches = loader(data.train, 8, shuffle=True, seed=0, workers=workers)
    for _ in range(2):
        found = list(batches)
        assert sum(len(labels) for _, labels in found) == 42
        for images, labels in found:
            assert labels.dtype == torch.int64
            assert torch.equal(images.mean((1, 2, 3)) > 0, labels.bool())
    assert sorted(batches.skipped) == sorted(broken)
    line = skipped_line([batches, loader(data.val, 8, shuffle=False, seed=0)])
    assert line == f"skipped 2 images that cannot be decoded: {', '.join(batches.skipped)}"
    assert skipped_line([loader(data.val, 8, shuffle=False, seed=0)]) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_are_refused(tmp_path, workers):
    data = open_data(fill(tmp_path, black=30, white=30), 16, 2, seed=0)
    broken = {spoil(file) for file in data.train.sources[::9]}
    batches = loader(data.train, 8, shuffle=True, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"of the first \d+ images \(\d+%\) cannot be decoded, 5% may be: ") as error:
        list(batches)
    assert sum(name in str(error.value) for name in broken) == 3
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_some_images_are_those_that_can_be_decoded(tmp_path):
    val = open_data(fill(tmp_path, black=100, white=100), 16, 2, seed=0).val
    assert some_of(val).shape == (20, 3, 16, 16)
    spoil(val.sources[0])
    assert some_of(val).shape == (19, 3, 16, 16)
    for file in val.sources:
        spoil(file)
    assert some_of(val) is None


def test_nothing_but_broken_images_is_refused_at_the_first_batch(tmp_path):
    data = open_data(fill(tmp_path, black=100, white=100), 16, 2, seed=0)
    for file in data.train.sources:
        spoil(file)
    with pytest.raises(UserError, match=r"^8 of the first 8 images \(100%\) cannot be decoded"):
        next(iter(loader(data.train, 8, shuffle=True, seed=0)))


def mixture(broken: list[int], total: int) -> Images:
    sources = [Path("missing.jpg") if i in broken else np.zeros((2, 2), np.uint8) for i in range(total)]
    return Images(sources, [0] * total, lambda image: torch.zeros(1))


@pytest.mark.parametrize(
    ("broken", "total", "refused"),
    [
        ([], 3, False),
        ([0], 2, False),  # one is always skipped
        ([0], 1, True),
        ([0, 1], 3, True),
        (range(5), 100, False),
        (range(94, 100), 100, True),
        (range(7), 5000, False),  # next to each other at the beginning, few in all
        (range(8), 5000, True),  # nothing else at the beginning
        (range(1, 51), 5000, False),
        (range(1, 52), 5000, True),
        (range(0, 5000, 21), 5000, False),
        (range(0, 5000, 19), 5000, True),
    ],
)
def test_share_of_broken_images(broken, total, refused):
    def read() -> int:
        sizes = [len(labels) for _, labels in loader(mixture(list(broken), total), 4, shuffle=False, seed=0)]
        assert min(sizes) > 0
        return sum(sizes)

    if refused:
        with pytest.raises(UserError, match="cannot be decoded"):
            read()
    else:
        assert read() == total - len(broken)


def test_order_is_fixed_by_the_seed(tmp_path):
    data = open_data(fill(tmp_path, black=20, white=20), 16, 2, seed=0)

    def orders(seed: int, workers: int = 0) -> list[str]:
        batches = loader(data.train, 5, shuffle=True, seed=seed, workers=workers)
        return [json.dumps([labels.tolist() for _, labels in batches]) for _ in range(2)]

    first = orders(0)
    assert first == orders(0) == orders(0, workers=2)
    assert first[0] != first[1]
    assert first != orders(1)


class Greedy:
    """A stored image that no memory suffices for."""

    def read(self) -> bytes:
        raise MemoryError

    def __str__(self) -> str:
        return "huge.png"


@pytest.mark.parametrize("workers", [0, 1])
def test_want_of_memory_is_no_broken_image(workers):
    images = Images([np.zeros((2, 2), np.uint8), Greedy()], [0, 1], lambda image: torch.zeros(1))
    with pytest.raises(MemoryError, match=r"^huge\.png cannot be decoded$"):
        list(loader(images, 2, shuffle=False, seed=0, workers=workers))
    assert not multiprocessing.active_children()


class Deadly:
    """A stored image whose decoder is killed, as by the kernel for want of memory."""

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_decoder_is_told():
    images = Images([np.zeros((2, 2), np.uint8), Deadly()], [0, 1], lambda image: torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"^a process that decodes images has died.*fewer --workers$"):
        list(loader(images, 1, shuffle=False, seed=0, workers=1))
    assert not multiprocessing.active_children()


def test_a_ribbon_is_a_broken_image(tmp_path):
    """To 73 pixels across it would have 11 million pixels."""
    data = open_data(fill(tmp_path, black=20, white=20), 64, 2, seed=0)
    Image.new("L", (2100, 1)).save(data.val.sources[0], "png")
    batches = loader(data.val, 8, shuffle=False, seed=0)
    assert sum(len(labels) for _, labels in batches) == len(data.val) - 1
    assert batches.skipped == [str(data.val.sources[0])]
    assert skipped_line([batches]) == f"skipped 1 image more than 100 times as long as wide: {data.val.sources[0]}"


def test_many_ribbons_are_skipped_but_something_else_is_needed(tmp_path):
    data = open_data(fill(tmp_path, black=20, white=20), 64, 2, seed=0)
    for file in data.val.sources[:2]:
        Image.new("L", (2100, 1)).save(file, "png")
    batches = loader(data.val, 8, shuffle=False, seed=0)
    assert sum(len(labels) for _, labels in batches) == 2
    for file in data.val.sources:
        Image.new("L", (2100, 1)).save(file, "png")
    with pytest.raises(
        UserError, match=r"^none of the first 4 images can be used: skipped 4 images more than 100 times"
    ):
        list(loader(data.val, 8, shuffle=False, seed=0))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 257.0, 65535.0]], np.float32), [0, 1, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[-7.0, -7.0]], np.float32), [0, 0]),
    ],
)
def test_floats_and_32_bits_are_scaled(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.asarray(decode(tmp_path / "x.tif"))[0, :, 0].tolist() == expected


def test_pixels_that_are_not_finite_are_a_broken_image(tmp_path):
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="not finite"):
        decode(tmp_path / "x.tif")
