"""How an image becomes the numbers that a network reads: the same in training, in judging and in use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from timm.models import PretrainedCfg

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
"""What timm and Pillow both have."""
Colour = tuple[float, float, float]
"""Red, green, blue."""


@dataclass(frozen=True)
class Pixels:
    """An image's shorter side is brought to floor(R / crop_pct) px for a network of R px, the middle square of R px is
    cut out and normalised: (value - mean) / std, a value from 0 to 1. The defaults are ImageNet's.

    `crop_pct` holds at every R, so a checkpoint that is used at another resolution than its own sees the same share of
    an image. timm's crop modes "squash" and "border" are not followed: the middle is cut out.
    """

    mean: Colour = (0.485, 0.456, 0.406)
    """From 0 to 1."""
    std: Colour = (0.229, 0.224, 0.225)
    """Above 0."""
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    """The share of the shorter side that is seen; above 0, at most 1."""

    @classmethod
    def of_timm(cls, config: PretrainedCfg) -> Pixels:
        """Those that a checkpoint of timm was trained with (`pretrained_cfg`, its evaluation at training size)."""
        from timm.data.config import resolve_data_config

        found = resolve_data_config(pretrained_cfg=config.to_dict())
        return cls(tuple(found["mean"]), tuple(found["std"]), found["interpolation"], found["crop_pct"])

    def normalise(self, values: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(..., 3) from 0 to 255 -> the same shape, to the bit as torchvision's ToTensor and Normalize make it."""
        import numpy as np

        mean, std = (np.array(each, np.float32) for each in (self.mean, self.std))
        found: NDArray[np.float32] = (values.astype(np.float32) / np.float32(255) - mean) / std
        return found

    def whole(self) -> Pixels:
        """The same with nothing cut off the shorter side."""
        return replace(self, crop_pct=1.0)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in each) for each in (self.mean, self.std))
        return f"mean {mean}, std {std}, {self.interpolation}, crop {self.crop_pct:.4g}"


IMAGENET = Pixels()
"""Of a network from scratch."""


def otherwise(pixels: Pixels, demo: bool) -> str | None:
    """How images are prepared, in words; None where it is as for a network from scratch. demo: they are digits."""
    return None if pixels == (IMAGENET.whole() if demo else IMAGENET) else str(pixels)
