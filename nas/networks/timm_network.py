"""Networks as timm builds them."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from nas.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.checkpoints import Loaded

    class TimmModel(nn.Module):
        """timm's module, with what `search_spaces.network.Network` has: (B, 3, R, R) -> (B, classes) logits."""

        arch: TimmNetwork
        loaded: Loaded | None
        untrained: list[str]


def create_timm(network: TimmNetwork) -> TimmModel:
    """timm's network for training, at its resolution, with timm's random weights; nothing is fetched.

    Raises:
        Exception: any kind, where it cannot be built so; some raise only when they run.
    """
    import timm

    config = timm.get_pretrained_cfg(network.name)
    assert config is not None, "a TimmNetwork has one"
    options: dict[str, Any] = {}
    if config.fixed_input_size and config.input_size[-1] != network.resolution:
        options["img_size"] = network.resolution
    if config.num_classes != network.num_classes:
        options["num_classes"] = network.num_classes
    model = cast("TimmModel", timm.create_model(network.name, **options))
    model.arch, model.loaded, model.untrained = network, None, list(model.state_dict())
    return model


TIMM = "timm/"


LARGEST = 4096
"""The largest resolution, in px, that anything is asked for."""
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class TimmNetwork:
    """A network as timm builds it.

    Raises:
        UserError: timm has no such network or tag, or it does not take square images; or other numbers than named.
    """

    name: str
    """As in timm.list_models(), with or without a weights tag."""
    resolution: int = 0
    """Of its square input, in px, 1 to LARGEST; 0 becomes the size timm builds it for (`input_size`)."""
    num_classes: int = 0
    """1 to 100,000; 0 becomes timm's own number, which is 0 of a network without a classifier."""

    family: ClassVar[str] = "timm"

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
        for what, value, most in (
            ("pixels a side", self.resolution, LARGEST),
            ("classes", self.num_classes, MOST_CLASSES),
        ):
            if not 0 <= value <= most:
                raise UserError(f"{TIMM}{self.name} with {value} {what}: give 1 to {most}")
        if not self.num_classes:
            object.__setattr__(self, "num_classes", max(config.num_classes, 0))
        if not self.resolution:
            _, height, width = config.input_size
            if height != width:
                raise UserError(f"{TIMM}{self.name} takes images of {height}x{width} px: only square ones are measured")
            object.__setattr__(self, "resolution", height)

    @classmethod
    def from_json(cls, text: str | bytes) -> TimmNetwork:
        """Read what `to_json` writes; without "num_classes" it has timm's own number.

        Raises:
            UserError: it is another document, or as the constructor.
        """
        try:
            found = json.loads(text)
            name, sizes = found.pop("timm"), (found.pop("resolution"), found.pop("num_classes", 0))
            if found or not isinstance(name, str) or any(type(size) is not int for size in sizes):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                'no document of a network of timm\'s: that is {"timm": NAME, "resolution": PX, "num_classes": N}'
            ) from None
        return cls(name, *sizes)

    def to_json(self) -> str:
        """The document as indented JSON, ending in a newline."""
        return json.dumps(self._document(), indent=1) + "\n"

    def digest(self) -> str:
        """SHA-256 of the canonical document, as `Arch.digest`."""
        text = json.dumps(self._document(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _document(self) -> dict[str, str | int]:
        return {"timm": self.name, "resolution": self.resolution, "num_classes": self.num_classes}

    def replace(self, *, num_classes: int) -> TimmNetwork:
        """The same network for another number of classes.

        Raises:
            UserError: outside 1 to 100,000.
        """
        if num_classes < 1:
            raise UserError(f"{TIMM}{self.name} with {num_classes} classes: give 1 to {MOST_CLASSES}")
        return replace(self, num_classes=num_classes)

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
                create_timm(replace(self, resolution=resolution)).eval()(torch.empty(1, 3, resolution, resolution))
        except Exception:  # timm's networks raise whatever their authors thought of
            return False
        return True


def nearest(resolution: int, works: Callable[[int], bool], tries: int = 3) -> str:
    """Which multiples of 32 next to a resolution work, in words ("96 px and 128 px work"); "" where none does."""
    below = range((resolution - 1) // 32 * 32, 0, -32)[:tries]
    above = range(resolution // 32 * 32 + 32, LARGEST, 32)[:tries]
    found = [f"{px} px" for px in (next(filter(works, side), None) for side in (below, above)) if px]
    return f"{' and '.join(found)} work{'s' * (len(found) == 1)}" if found else ""
