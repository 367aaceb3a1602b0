"""config.json as timm writes it to the Hugging Face hub: which network of timm's it is, and what its images are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from nas.errors import UserError
from nas.networks.timm_network import LARGEST, MOST_CLASSES, TimmNetwork

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Side = Annotated[int, Field(gt=0, le=LARGEST)]
KNOWN_ARGS = {"num_classes", "img_size"}
"""Arguments of a network's construction that are those of a `TimmNetwork` too."""


class PretrainedForm(BaseModel):
    """`pretrained_cfg`, what is used of it; the defaults are timm's."""

    model_config = ConfigDict(frozen=True)

    input_size: tuple[int, Side, Side] = (3, 224, 224)
    """Channels, height and width in px."""
    interpolation: str = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    """The share of the shorter side that is seen."""
    crop_mode: str = "center"
    """Others than "center" are not followed: the middle is cut out."""
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)] = 1000
    fixed_input_size: bool = False
    label_names: tuple[str, ...] | None = None
    """In the order of the logits."""
    classifier: str | tuple[str, ...] | None = None
    """The classifier's path in timm's network, as the next."""
    first_conv: str | tuple[str, ...] | None = None


class TimmForm(BaseModel):
    """The document. architecture: timm's name of the network; None of one that timm has not."""

    model_config = ConfigDict(frozen=True)

    architecture: str | None = None
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)] | None = None
    label_names: tuple[str, ...] | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: PretrainedForm

    @model_validator(mode="before")
    @classmethod
    def _split(cls, found: Any) -> Any:
        """Older files have everything on one level."""
        if isinstance(found, dict) and "pretrained_cfg" not in found and "architecture" in found:
            return {**found, "label_names": found.get("labels"), "pretrained_cfg": found}
        return found

    @classmethod
    def read(cls, path: Path, what: str) -> Self:
        """Read a file. what: how messages call it.

        Raises:
            UserError: it cannot be read, or is another document.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{what}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{what} is not what timm writes: {where}{': ' * bool(where)}{first['msg']}") from None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the logits, where they are known."""
        return self.label_names or self.pretrained_cfg.label_names

    @property
    def resize(self) -> int:
        """Px that the shorter side of an image is brought to."""
        return math.floor(self.pretrained_cfg.input_size[-1] / self.pretrained_cfg.crop_pct)

    def network(self, what: str) -> TimmNetwork:
        """The network. what: how messages call the document.

        Raises:
            UserError: timm has no such network, or it is built in another way than timm builds it by default.
        """
        channels, height, width = self.pretrained_cfg.input_size
        if self.architecture is None:
            raise UserError(f"{what} names no architecture of timm's")
        if channels != 3 or height != width:
            raise UserError(f"{what}: images of {channels}x{height}x{width}: only square ones in colour are read")
        if others := sorted((self.model_args or {}).keys() - KNOWN_ARGS):
            raise UserError(f"{what}: {self.architecture} is built with {', '.join(others)}: only timm's own is read")
        classes = self.pretrained_cfg.num_classes if self.num_classes is None else self.num_classes
        if not classes:
            raise UserError(f"{what}: {self.architecture} has no classifier")
        try:
            return TimmNetwork(self.architecture, height, classes)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
