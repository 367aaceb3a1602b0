"""How an image becomes the input of a deployed file, without PyTorch, and how a user says it: --preprocess."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
from PIL import Image
from pydantic import ValidationError

from nas.data.pixels import IMAGENET, Colour, Interpolation, Pixels
from nas.errors import UserError, unknown
from nas.export.card import LARGEST_RESIZE, Preprocess
from nas.networks.timm_network import LARGEST
from nas.text import first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

Layout = Literal["NCHW", "NHWC"]
PRESETS = {
    "imagenet": IMAGENET,
    "inception": Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "clip": Pixels(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), crop_pct=1.0),
    "none": Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "raw": Pixels(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)),
}
"""By name: pixels from -2 to 3, -1 to 1, -2 to 3, 0 to 1 and 0 to 255. All are bicubic; clip's crop is the whole of the
shorter side, the others' 0.875 of it. Source of imagenet, inception and clip: timm.data.constants."""
KEYS = ("size", "resize", "crop", "mean", "std", "interpolation", "layout")
DIGITS = 9
"""Of a number of px, at most; Python refuses to read thousands."""
EXAMPLE = "size=224,resize=256,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,interpolation=bicubic"
WAYS = f"a preset ({', '.join(PRESETS)}), key=value pairs ({EXAMPLE}), or a preprocess.json"


@dataclass(frozen=True)
class GivenPreprocess:
    """What a user says of a file's input; the file's own size completes it.

    size: side of the input, in px. resize: what the shorter side of an image is brought to, in px; None: by the crop of
    `pixels`. layout: of an input whose shape does not tell; None: as the file says, or else NCHW.
    """

    pixels: Pixels
    size: int | None = None
    resize: int | None = None
    layout: Layout | None = None

    def at(self, side: int | None, name: str = "the file") -> Preprocess:
        """For an input of `side` px; None: of any size. name: how a message calls the file.

        Raises:
            UserError: no size is known, or two that differ, or one is too large.
        """
        size = self.size or side
        if size is None:
            raise UserError(f"{name} takes images of any size: add size=PX to --preprocess, such as size=224")
        if side not in (None, size):
            raise UserError(f"{name} takes images of {side} px, --preprocess says size={size}: leave it out")
        pixels, usual = self.pixels, math.floor(size / self.pixels.crop_pct)
        if size > LARGEST or (self.resize or usual) > LARGEST_RESIZE:
            raise UserError(
                f"--preprocess: {size:,} px cut from {self.resize or usual:,} px are too many: images are brought to "
                f"{LARGEST_RESIZE:,} px at most, and cut to {LARGEST:,}"
            )
        try:
            return Preprocess(
                resize=self.resize or usual,
                size=size,
                interpolation=pixels.interpolation,
                mean=pixels.mean,
                std=pixels.std,
                layout=self.layout or "NCHW",
                **{"crop_pct": pixels.crop_pct} if self.resize in (None, usual) else {},
            )
        except ValidationError as error:
            if self.resize and self.resize < size:
                raise UserError(
                    f"--preprocess: resize={self.resize} is less than size={size}: give {size} or more"
                ) from None
            raise UserError(f"--preprocess: {first_line(error)}") from None


def parse_preprocess(text: str) -> GivenPreprocess:
    """Read --preprocess: a preset, key=value pairs after a preset or alone, or the path of a preprocess.json.

    Alone, the pairs must say mean, std, interpolation, and resize or crop. mean and std are of pixels from 0 to 1, or,
    where one of them is above 1, of 0 to 255: one number or three, as 0.485/0.456/0.406.

    Raises:
        UserError: anything else.
    """
    first, *_ = text.split(",")
    if "=" not in first and first not in PRESETS:
        if text.endswith(".json") or Path(text).is_file():
            return _read(Path(text))
        raise unknown("--preprocess", first, [*PRESETS, "FILE.json", "key=value"])
    words = text.split(",") if "=" in first else text.split(",")[1:]
    given: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in KEYS:
            raise unknown("key of --preprocess", key, KEYS)
        if not value or key in given:
            raise UserError(f"--preprocess {text}: write each key once, as {EXAMPLE}")
        given[key] = value
    if {"resize", "crop"} <= given.keys():
        raise UserError("--preprocess: resize and crop say the same: leave one of them out")
    base = PRESETS.get(first)
    lacking = [key for key in ("mean", "std", "interpolation") if key not in given]
    lacking += [] if {"resize", "crop"} & given.keys() else ["resize or crop"]
    if base is None and lacking:
        raise UserError(f"--preprocess {text} lacks {', '.join(lacking)}: give it, or begin with a preset")
    return _completed(base or IMAGENET, given)


def _completed(base: Pixels, given: dict[str, str]) -> GivenPreprocess:
    mean, std = (_colour(key, given[key]) if key in given else None for key in ("mean", "std"))
    if max(mean or (0,)) > 1 or max(std or (0,)) > 1:
        if mean is None or std is None:
            raise UserError("--preprocess: mean and std above 1 are of pixels from 0 to 255: give both of them so")
        mean, std = (_scaled(each) for each in (mean, std))
    if "interpolation" in given and given["interpolation"] not in get_args(Interpolation):
        raise unknown("interpolation", given["interpolation"], get_args(Interpolation))
    if "layout" in given and given["layout"].upper() not in get_args(Layout):
        raise unknown("layout", given["layout"], get_args(Layout))
    pixels = replace(
        base,
        mean=mean or base.mean,
        std=std or base.std,
        interpolation=cast(Interpolation, given.get("interpolation", base.interpolation)),
        crop_pct=_share(given["crop"]) if "crop" in given else base.crop_pct,
    )
    size, resize = (_side(key, given[key]) if key in given else None for key in ("size", "resize"))
    layout = cast(Layout, given["layout"].upper()) if "layout" in given else None
    return GivenPreprocess(pixels, size, resize, layout)


def _read(path: Path) -> GivenPreprocess:
    try:
        found = Preprocess.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--preprocess {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--preprocess {path} is no preprocess.json as vitnas writes it: give {WAYS}") from None
    layout = found.layout if "layout" in found.model_fields_set else None
    return GivenPreprocess(found.pixels, found.size, found.resize, layout)


def _colour(key: str, text: str) -> Colour:
    try:
        values = [float(each) for each in text.split("/")]
    except ValueError:
        values = []
    values *= 3 if len(values) == 1 else 1
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise UserError(f"--preprocess {key}={text}: give one number or three, as {key}=0.485/0.456/0.406")
    if key == "std" and min(values) <= 0:
        raise UserError(f"--preprocess std={text}: give numbers above 0")
    return values[0], values[1], values[2]


def _scaled(colour: Colour) -> Colour:
    red, green, blue = (value / 255 for value in colour)
    return red, green, blue


def _side(key: str, text: str) -> int:
    most = LARGEST if key == "size" else LARGEST_RESIZE
    if not text.isdecimal() or len(text) > DIGITS or not 0 < int(text) <= most:
        raise UserError(f"--preprocess {key}={text}: give a whole number of px from 1 to {most:,}, as {key}=224")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"--preprocess crop={text}: give a share of the shorter side, above 0 and at most 1")
    return share


def crop(image: Image.Image, how: Preprocess) -> NDArray[np.uint8]:
    """The middle of an RGB image, (size, size, 3), to the pixel as torchvision's Resize and CenterCrop make it."""
    shorter = min(image.size)
    width, height = (how.resize * side // shorter for side in image.size)
    resized = image.resize((width, height), Image.Resampling[how.interpolation.upper()])
    left, top = (round((side - how.size) / 2) for side in resized.size)
    return np.asarray(resized.crop((left, top, left + how.size, top + how.size)))


def normalise(values: NDArray[np.uint8], how: Preprocess) -> NDArray[np.float32]:
    """(..., 3) from 0 to 255 -> float32 of the same shape, to the bit as torchvision's ToTensor and Normalize make
    it. Of numbers too large or small for float32 it is infinite or NaN."""
    with np.errstate(all="ignore"):
        return how.pixels.normalise(values)
