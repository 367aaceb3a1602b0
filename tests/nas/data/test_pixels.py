"""A checkpoint's own pixels, checked against timm's transforms for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from timm.data.constants import DEFAULT_CROP_PCT

from nas.data.about import describe
from nas.data.dataset import open_data
from nas.data.images import Augmentation, Images, cached, plain_transform
from nas.data.inputs import identity
from nas.data.pixels import IMAGENET, Pixels
from nas.identity import IMAGES, PIXELS

NETWORKS = (
    "tf_efficientnet_lite0",
    "levit_128s",
    "tiny_vit_5m_224",
    "mobilenetv4_conv_small",
    "mobilenetv3_large_150d",
)
OTHER = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.95)


def photograph(height: int = 90, width: int = 131) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((3 * width, 3 * height))


def folder(root: Path) -> Path:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(4):
            photograph(40 + 7 * i).save(root / label / f"{i}.png")
    return root


def test_a_network_from_scratch_has_imagenet_s():
    assert (IMAGENET.mean, IMAGENET.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert IMAGENET.crop_pct == DEFAULT_CROP_PCT


@pytest.mark.parametrize("resolution", [224, 160, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_timm_evaluates_a_checkpoint_with(name: str, resolution: int):
    """At its own resolution and at others, where the same share of the image is seen."""
    config = timm.get_pretrained_cfg(name)
    wanted = resolve_data_config({"input_size": (3, resolution, resolution)}, pretrained_cfg=config.to_dict())
    image = photograph()
    found = plain_transform(resolution, Pixels.of_timm(config))(image)
    assert torch.equal(found, create_transform(**wanted)(image))


def test_the_checkpoints_differ():
    """Each in another way, so that the comparison above sees all of it."""
    assert {name: str(Pixels.of_timm(timm.get_pretrained_cfg(name))) for name in NETWORKS} == {
        "tf_efficientnet_lite0": "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bicubic, crop 0.875",
        "levit_128s": "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, crop 0.9",
        "tiny_vit_5m_224": "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, crop 0.95",
        "mobilenetv4_conv_small": "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, crop 0.875",
        "mobilenetv3_large_150d": "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear, crop 0.95",
    }


def test_all_images_of_a_data_set_follow(tmp_path: Path):
    plain = Augmentation(scale=1.0, hflip=0.0)
    before = open_data(folder(tmp_path), 32, None, 0)
    after = before.at(32, plain, OTHER)
    assert after.pixels == OTHER != before.pixels == IMAGENET
    for part in ("calibration", "val"):
        wanted = plain_transform(32, OTHER)(Image.open(getattr(after, part).sources[0]))
        assert torch.equal(getattr(after, part)[0][0], wanted), part
    grey = Image.new("RGB", (60, 50), (64, 128, 255))
    shown = after.train.transform(grey).mean((1, 2))
    assert torch.allclose(shown, 2 * torch.tensor([64, 128, 255]) / 255 - 1, atol=1e-5)
    assert after.at(24).pixels == OTHER, "another resolution keeps them"
    assert after.at(24).val[0][0].shape == (3, 24, 24)


def test_digits_are_seen_whole_whatever_the_pixels():
    data = open_data(None, 32, None, 0).at(32, pixels=OTHER)
    assert data.pixels == OTHER.whole()
    assert data.val[0][0].min() == -1, "and are normalised as asked"


@pytest.mark.parametrize("pixels", [IMAGENET, OTHER, Pixels(crop_pct=1.0, interpolation="lanczos")])
def test_a_cache_keeps_what_evaluation_sees(tmp_path: Path, pixels: Pixels):
    files = sorted(folder(tmp_path).glob("*/*.png"))
    images = Images(files, [0] * len(files), plain_transform(32, pixels))
    kept = cached(images, 32, pixels=pixels)
    assert {min(source.shape[:2]) for source in kept.sources} == {int(32 / pixels.crop_pct)}
    assert all(torch.equal(kept[i][0], images[i][0]) for i in range(len(files)))


def test_other_pixels_are_another_input(tmp_path: Path):
    data = open_data(folder(tmp_path), 32, None, 0)
    assert identity(data).keys() == {IMAGES}, "as an earlier vitnas wrote it"
    assert identity(data.at(32, pixels=OTHER))[PIXELS] == str(OTHER)
    assert describe(data.at(32, pixels=OTHER)) == f"{describe(data)}; prepared as the weights expect ({OTHER})"
    digits = open_data(None, 32, None, 0)
    assert PIXELS not in identity(digits)
    assert PIXELS not in identity(digits.at(32, pixels=IMAGENET.whole()))
