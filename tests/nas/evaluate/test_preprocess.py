"""Pixels without PyTorch: those of training's own evaluation, to the bit; and --preprocess."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toy_onnx

from nas.data.decoding import decode
from nas.data.images import plain_transform
from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.evaluate.preprocess import EXAMPLE, PRESETS, crop, normalise, parse_preprocess
from nas.export.card import Preprocess


@pytest.mark.parametrize("size", [8, 16, 33])
@pytest.mark.parametrize(
    "pixels",
    [
        IMAGENET,
        PRESETS["clip"],
        Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.9),
        Pixels((0.1, 0.2, 0.3), (1.0, 0.7, 0.3), "nearest", 0.95),
        Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "lanczos", 1.0),
    ],
    ids=["imagenet", "clip", "bilinear", "nearest", "lanczos"],
)
def test_pixels_are_those_of_evaluation_to_the_bit(tmp_path: Path, size: int, pixels: Pixels) -> None:
    how, transform = Preprocess.own(size, pixels), plain_transform(size, pixels)
    assert how == Preprocess.of(transform, pixels)
    for kind, path in toy_onnx.odd_images(tmp_path).items():
        image = decode(path)
        found = normalise(crop(image, how), how)
        assert found.dtype == np.float32
        assert np.array_equal(found.transpose(2, 0, 1), transform(image).numpy()), kind


def test_every_value_is_normalised_to_the_bit() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for pixels in PRESETS.values():
        transform = plain_transform(16, pixels)
        wanted = transform.transforms[3](transform.transforms[2](values)).numpy()
        assert np.array_equal(normalise(values, Preprocess.own(16, pixels)).transpose(2, 0, 1), wanted)


@pytest.mark.filterwarnings("error")
def test_numbers_that_float32_does_not_hold_are_not_warned_of() -> None:
    how = Preprocess.own(16).model_copy(update={"mean": (1e300, 0.5, 0.5), "std": (1e-320, 0.5, 0.5)})
    assert not np.isfinite(normalise(np.zeros((16, 16, 3), np.uint8), how)).all()


def test_presets() -> None:
    how = parse_preprocess("imagenet").at(224)
    assert how == Preprocess.own(224)
    assert parse_preprocess("raw").at(16).std == pytest.approx((1 / 255,) * 3)
    assert parse_preprocess("clip").at(224).resize == 224
    inception = parse_preprocess("inception,resize=250,interpolation=bilinear").at(224)
    assert (inception.mean, inception.resize, inception.interpolation) == ((0.5,) * 3, 250, "bilinear")
    assert parse_preprocess("none,crop=1,size=64,layout=nhwc").at(None).model_dump() == {
        "resize": 64,
        "size": 64,
        "interpolation": "bicubic",
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
        "layout": "NHWC",
        "crop_pct": 1.0,
    }


def test_pairs_say_all_that_the_example_says() -> None:
    how = parse_preprocess(EXAMPLE).at(None)
    assert how == Preprocess.own(224)
    levels = parse_preprocess("mean=123.675/116.28/103.53,std=58.395/57.12/57.375,resize=256,interpolation=bicubic")
    assert levels.at(224).mean == pytest.approx(how.mean)
    assert levels.at(224).std == pytest.approx(how.std)


def test_a_file_says_it(tmp_path: Path) -> None:
    own = Preprocess.own(24, Pixels(interpolation="bilinear", crop_pct=0.9))
    (tmp_path / "preprocess.json").write_text(own.model_dump_json())
    given = parse_preprocess(str(tmp_path / "preprocess.json"))
    assert given.at(None) == given.at(24) == own
    (tmp_path / "config.json").write_text('{"mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(UserError, match=r"config\.json is no preprocess\.json as vitnas writes it"):
        parse_preprocess(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "did you mean imagenet"),
        ("nowhere.json", "nowhere.json: No such file"),
        ("mean=0.5,std=0.5", "lacks interpolation, resize or crop: give it, or begin with a preset"),
        ("imagenet,siz=3", "unknown key of --preprocess 'siz': did you mean size"),
        ("imagenet,size=3,size=4", "write each key once"),
        ("imagenet,size", "write each key once"),
        ("imagenet,size=-3", "give a whole number of px"),
        ("imagenet,size=4097", "give a whole number of px from 1 to 4,096"),
        (f"imagenet,resize={'9' * 5000}", "give a whole number of px from 1 to 8,192"),
        ("imagenet,mean=0.5/0.5", "give one number or three"),
        ("imagenet,mean=a", "give one number or three"),
        ("imagenet,std=0", "give numbers above 0"),
        ("imagenet,mean=120", "give both of them"),
        ("imagenet,crop=0", "a share of the shorter side"),
        ("imagenet,crop=0.9,resize=256", "say the same"),
        ("imagenet,interpolation=cubic", "did you mean bicubic"),
        ("imagenet,layout=chw", "unknown layout 'chw': choose from NCHW, NHWC"),
        ("", "unknown --preprocess ''"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_preprocess(text)


@pytest.mark.parametrize(
    ("text", "side", "message"),
    [
        ("imagenet", None, "net.onnx takes images of any size: add size=PX"),
        ("imagenet,size=32", 64, "net.onnx takes images of 64 px, --preprocess says size=32"),
        ("imagenet,resize=200", 224, "resize=200 is less than size=224"),
        ("imagenet,crop=0.00001", 8, "8 px cut from 799,999 px are too many: images are brought to 8,192 px at most"),
    ],
)
def test_a_size_that_does_not_fit_is_named(text: str, side: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_preprocess(text).at(side, "net.onnx")
