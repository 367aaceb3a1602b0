"""Networks as timm builds them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nas.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def create_timm(network: TimmNetwork) -> nn.Module:
    """timm's network for inference, at its resolution, with timm's random weights.

    Raises:
        Exception: any kind, where it cannot be built at that resolution; some raise only when they run.
    """
    import timm
    from timm.utils.model import reparameterize_model

    config = timm.get_pretrained_cfg(network.name)
    resized = config and config.fixed_input_size and config.input_size[-1] != network.resolution
    options: dict[str, Any] = {"img_size": network.resolution} if resized else {}
    model = timm.create_model(network.name, **options)
    return reparameterize_model(model.eval().requires_grad_(False), inplace=True)


TIMM = "timm/"


LARGEST = 4096
"""The largest resolution, in px, that anything is asked for."""


@dataclass(frozen=True)
class TimmNetwork:
    """A network as timm builds it. name: as in timm.list_models(), with or without a weights tag.

    resolution: of its square input, in px; 0 becomes the size timm builds it for (`input_size`).

    Raises:
        UserError: timm has no such network or tag, or it does not take square images.
    """

    name: str
    resolution: int = 0

    def __post_init__(self) -> None:
        import timm

        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models(), n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(TIMM + name for name in near)}?" if near else "see timm.list_models()"
            raise UserError(f"timm has no network {self.name!r}: {meant}")
        try:
            config = timm.get_pretrained_cfg(self.name)
        except RuntimeError:
            arch, tag = self.name.split(".", 1)
            raise UserError(f"timm has no weights {tag!r} of {arch}: give {TIMM}{arch}") from None
        if config is None:
            raise UserError(f"timm does not say what images {TIMM}{self.name} takes: choose another network")
        if not self.resolution:
            _, height, width = config.input_size
            if height != width:
                raise UserError(f"{TIMM}{self.name} takes images of {height}x{width} px: only square ones are measured")
            object.__setattr__(self, "resolution", height)

    def at(self, resolution: int) -> TimmNetwork:
        """The same network for images of another size.

        Raises:
            UserError: it cannot take them; the message names sizes near it that it takes.
        """
        if resolution == self.resolution:
            return self
        if not self._takes(resolution):
            told = nearest(resolution, self._takes) or f"it takes {self.resolution} px"
            raise UserError(f"{TIMM}{self.name} cannot take images of {resolution} px: {told}")
        return replace(self, resolution=resolution)

    def _takes(self, resolution: int) -> bool:
        """Whether it runs at a resolution; tried without memory or arithmetic."""
        import torch

        try:
            with torch.device("meta"), torch.inference_mode():
                create_timm(replace(self, resolution=resolution))(torch.empty(1, 3, resolution, resolution))
        except Exception:  # timm's networks raise whatever their authors thought of
            return False
        return True


def nearest(resolution: int, works: Callable[[int], bool], tries: int = 3) -> str:
    """Which multiples of 32 next to a resolution work, in words ("96 px and 128 px work"); "" where none does."""
    below = range((resolution - 1) // 32 * 32, 0, -32)[:tries]
    above = range(resolution // 32 * 32 + 32, LARGEST, 32)[:tries]
    found = [f"{px} px" for px in (next(filter(works, side), None) for side in (below, above)) if px]
    return f"{' and '.join(found)} work{'s' * (len(found) == 1)}" if found else ""
