"""What a user names on the command line: a published network, an arch.json, a run's folder, an ONNX file, timm's."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError

if TYPE_CHECKING:
    from search_spaces import Arch


TIMM = "timm/"


@dataclass(frozen=True)
class TimmNetwork:
    """A network as timm builds it. name: as in timm.list_models(), with or without a weights tag.

    resolution: of its square input, in px; None becomes the size timm builds it for (`input_size`).

    Raises:
        UserError: timm has no such network or tag, or it does not take square images.
    """

    name: str
    resolution: int | None = None

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
        if self.resolution is None:
            _, height, width = config.input_size
            if height != width:
                raise UserError(f"{TIMM}{self.name} takes images of {height}x{width} px: only square ones are measured")
            object.__setattr__(self, "resolution", height)


@dataclass(frozen=True)
class Target:
    """label: how tables call it. Exactly one of `arch`, `timm` and `onnx` is set. folder: where the Arch was read."""

    label: str
    arch: Arch | None = None
    onnx: Path | None = None
    folder: Path | None = None
    timm: TimmNetwork | None = None

    @property
    def network(self) -> Arch | TimmNetwork | None:
        return self.arch or self.timm

    @property
    def kind(self) -> str:
        """What a message calls it."""
        return "an ONNX file" if self.onnx else "one of timm's networks" if self.timm else "a network of ours"

    @property
    def weights(self) -> Path | None:
        """The trained weights beside the Arch, if there are any."""
        path = self.folder / "model.safetensors" if self.folder else None
        return path if path is not None and path.is_file() else None


def find_target(text: str) -> Target:
    """Resolve a published name, an arch.json, a folder that holds one (a run, or its best/), timm/NAME, a .onnx file.

    Raises:
        UserError: none of these, or a document that cannot be read.
    """
    path = Path(text)
    if text.startswith(TIMM):
        return Target(text, timm=TimmNetwork(text.removeprefix(TIMM)))
    if os.path.isdir(text):
        for candidate in (path / "arch.json", path / "best" / "arch.json"):
            if os.path.isfile(candidate):
                return Target(text, arch=read_arch(candidate), folder=candidate.parent)
        raise UserError(f"{text} holds no arch.json and no best/arch.json")
    if path.suffix.lower() == ".onnx":
        if not os.path.isfile(text):
            raise UserError(f"{text}: no such file")
        return Target(text, onnx=path)
    if os.path.isfile(text):
        if path.suffix.lower() != ".json" and not _begins_json(path):
            raise UserError(
                f"{text} holds no network: give a published name, an arch.json, a folder, timm/NAME or a .onnx file"
            )
        return Target(text, arch=read_arch(path), folder=path.parent)
    if path.suffix == ".json" or "/" in text:
        raise UserError(f"{text}: no such file or folder")
    return Target(text, arch=published(text))


def _begins_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def find_arch(text: str) -> Arch:
    """As `find_target`, for verbs that need the Arch itself."""
    target = find_target(text)
    if target.arch is None:
        raise UserError(f"{text} is {target.kind}: give a published name, an arch.json or a run's folder")
    return target.arch


def published(name: str) -> Arch:
    """The Arch of a published variant."""
    from search_spaces import get_arch

    try:
        return get_arch(name)
    except KeyError as error:
        raise UserError(error.args[0]) from None


def read_arch(path: Path) -> Arch:
    """Read an arch.json.

    Raises:
        UserError: unreadable, or not a valid Arch.
    """
    from search_spaces import Arch, ArchError, table

    try:
        arch = Arch.from_json(path.read_bytes())
        table(arch)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ArchError as error:
        raise UserError(f"{path}: {error}") from None
    return arch
