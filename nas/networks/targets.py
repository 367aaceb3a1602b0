"""What a user names on the command line: a published network, an arch.json, a run's folder, an ONNX file, timm's, a
repository on the Hugging Face hub.

Each may be followed by @ and an input resolution: `levit_128s@160`, `runs/mine@96`, `timm/lcnet_050@64`. Of the hub's
the first @ is that of a revision: `hf-hub:me/pets@main@64`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserError
from nas.networks.hub import ARCH, HUB, fetch
from nas.networks.timm_form import TimmForm
from nas.networks.timm_network import LARGEST, TIMM, TimmNetwork, nearest

if TYPE_CHECKING:
    from search_spaces import Arch


BEGUN = ("study.journal", "hardware.json", "state")
"""In the folder of a run from its beginning, one of them at least."""
SMALLEST_ARCH, LARGEST_ARCH = 16, 512
"""What an Arch takes at all."""


@dataclass(frozen=True)
class Target:
    """label: how tables call it. Exactly one of `arch`, `timm` and `onnx` is set. folder: where its arch.json was read.

    resolution: what was asked for by @ or `at`, in px; None: the network's own. own: the network as it was read from a
    document or by its published name, where it is now one at another resolution.
    """

    label: str
    arch: Arch | None = None
    onnx: Path | None = None
    folder: Path | None = None
    timm: TimmNetwork | None = None
    resolution: int | None = None
    own: Arch | TimmNetwork | None = None

    @property
    def network(self) -> Arch | TimmNetwork | None:
        return self.arch or self.timm

    def require(self) -> Arch | TimmNetwork:
        """The network, for who builds it.

        Raises:
            UserError: there is only an ONNX file.
        """
        if self.network is None:
            usual = f"a published name, an arch.json, a run's folder, {TIMM}NAME or {HUB}REPO"
            raise UserError(f"{self.label} is {self.kind}: give {usual}")
        return self.network

    @property
    def kind(self) -> str:
        """What a message calls it."""
        return "an ONNX file" if self.onnx else "one of timm's networks" if self.timm else "a network of ours"

    @property
    def weights(self) -> Path | None:
        """The trained weights beside the arch.json, if there are any.

        Raises:
            UserError: they are of another resolution than `network`.
        """
        path = self._beside
        if path is not None and self.own is not None and self.network is not None:
            raise UserError(
                f"{self.label}: {path} is trained at {self.own.resolution} px: "
                f"`vitnas train {self.folder} --weights {path} --resolution {self.network.resolution}` resizes it"
            )
        return path

    @property
    def trained_at(self) -> int | None:
        """The resolution of the weights in its folder, where that is not the one it is measured at."""
        return self.own.resolution if self.own is not None and self._beside is not None else None

    @property
    def _beside(self) -> Path | None:
        path = self.folder / "model.safetensors" if self.folder else None
        return path if path is not None and path.is_file() else None

    def at(self, resolution: int) -> Target:
        """The same network for images of another size (`resolution` of an ONNX file is for who reads the file).

        Raises:
            UserError: it cannot take them.
        """
        found = replace(self, resolution=resolution)
        if not 1 <= resolution <= LARGEST:
            raise UserError(f"{self.label}: a resolution of {resolution} px: give 1 to {LARGEST} px")
        if self.network is None or self.network.resolution == resolution:
            return found
        if self.timm is not None:
            return replace(found, timm=self.timm.at(resolution), own=self.own or self.timm)
        assert self.arch is not None
        arch = _resized(self.label, self.arch, resolution)
        return replace(found, arch=arch, own=self.own or self.arch)

    def as_trained(self) -> Target:
        """The same network at the resolution that it was read at: that of its weights."""
        return self if self.own is None else replace(self, **_field_of(self.own), own=None)


def _field_of(network: Arch | TimmNetwork) -> dict[str, Any]:
    """The field of a `Target` that holds a network."""
    return {"timm" if isinstance(network, TimmNetwork) else "arch": network}


def _resized(label: str, arch: Arch, resolution: int) -> Arch:
    from search_spaces import ArchError

    def works(px: int) -> bool:
        try:
            return bool(arch.at(px))
        except ArchError:
            return False

    if not SMALLEST_ARCH <= resolution <= LARGEST_ARCH:
        raise UserError(f"{label} takes {SMALLEST_ARCH} to {LARGEST_ARCH} px, not {resolution}")
    try:
        return arch.at(resolution)
    except ArchError as error:
        told = nearest(resolution, works) or f"it takes {arch.resolution} px"
        raise UserError(f"{label}: {error}: {told}") from None


def find_target(text: str, resolution: int | None = None) -> Target:
    """Resolve a published name, an arch.json, a folder that holds one (a run, or its best/), timm/NAME, a .onnx file;
    each may end in @PX. A file or folder that is called so wins. Or hf-hub:REPO, which is downloaded once in a process.

    Args:
        resolution: in px, for a network that is named without @; None: its own.

    Raises:
        UserError: none of these, a document that cannot be read, or a resolution that the network cannot take.
    """
    name, asked = _split(text)
    found = replace(_find(name), label=text)
    size = resolution if asked is None else asked
    return found if size is None else found.at(size)


def _split(text: str) -> tuple[str, int | None]:
    """A name, and the resolution behind its @."""
    name, at, size = text.rpartition("@")
    if text.startswith(HUB) and "@" not in name:  # a revision
        return text, None
    if not at or os.path.lexists(text) or "/" in size or "." in size:
        return text, None
    if not name or not re.fullmatch(r"[1-9]\d{0,5}", size):
        raise UserError(f"{text}: give the resolution in px after the @, as in {name or 'levit_128s'}@64")
    return name, int(size)


def _find(text: str) -> Target:
    path = Path(text)
    if text.startswith(TIMM):
        return Target(text, timm=TimmNetwork(text.removeprefix(TIMM)))
    if text.startswith(HUB):
        found = fetch(text.removeprefix(HUB)).document
        what = f"{found.name} of {text}"
        own = read_network(found, what) if found.name == ARCH else TimmForm.read(found, what).network(what)
        return Target(text, folder=found.parent, **_field_of(own))
    if os.path.isdir(text):
        for candidate in (path / "arch.json", path / "best" / "arch.json"):
            if os.path.isfile(candidate):
                return Target(text, folder=candidate.parent, **_field_of(read_network(candidate)))
        if any((path / name).exists() for name in BEGUN):
            raise UserError(f"{text} is a run without a network so far: the command that began it goes on with it")
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
        return Target(text, folder=path.parent, **_field_of(read_network(path)))
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


def read_network(path: Path, what: str = "") -> Arch | TimmNetwork:
    """Read an arch.json, of an Arch or of a network of timm's. what: how messages call it; "": by its path.

    Raises:
        UserError: unreadable, or not a valid document.
    """
    from nas.networks.build import from_document
    from search_spaces import ArchError, table

    try:
        network = from_document(path.read_bytes())
        if not isinstance(network, TimmNetwork):
            table(network)
    except OSError as error:
        raise UserError(f"{what or path}: {error.strerror}") from None
    except (ArchError, UserError) as error:
        raise UserError(f"{what or path}: {error}") from None
    return network
