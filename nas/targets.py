"""What a user names on the command line: a published network, an arch.json, a run's folder, or an ONNX file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError

if TYPE_CHECKING:
    from search_spaces import Arch


@dataclass(frozen=True)
class Target:
    """label: how tables call it. Exactly one of `arch` and `onnx` is set. folder: where the Arch was read."""

    label: str
    arch: Arch | None = None
    onnx: Path | None = None
    folder: Path | None = None

    @property
    def weights(self) -> Path | None:
        """The trained weights beside the Arch, if there are any."""
        path = self.folder / "model.safetensors" if self.folder else None
        return path if path is not None and path.is_file() else None


def find_target(text: str) -> Target:
    """Resolve a published name, an arch.json, a folder that holds one (a run, or its best/), or a .onnx file.

    Raises:
        UserError: none of these, or a document that cannot be read.
    """
    path = Path(text)
    if os.path.isdir(text):
        for candidate in (path / "arch.json", path / "best" / "arch.json"):
            if os.path.isfile(candidate):
                return Target(text, arch=read_arch(candidate), folder=candidate.parent)
        raise UserError(f"{text} holds no arch.json and no best/arch.json")
    if path.suffix == ".onnx":
        if not os.path.isfile(text):
            raise UserError(f"{text}: no such file")
        return Target(text, onnx=path)
    if os.path.isfile(text):
        return Target(text, arch=read_arch(path), folder=path.parent)
    if path.suffix == ".json" or "/" in text:
        raise UserError(f"{text}: no such file or folder")
    return Target(text, arch=published(text))


def find_arch(text: str) -> Arch:
    """As `find_target`, for verbs that need the Arch itself."""
    target = find_target(text)
    if target.arch is None:
        raise UserError(f"{text} is an ONNX file: give a published name, an arch.json or a run's folder")
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
