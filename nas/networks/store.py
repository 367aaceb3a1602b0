"""The pretrained weights that a search may begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nas import connection
from nas.errors import UserError
from nas.files import tell
from nas.networks.hub import Bytes, Unreached
from nas.networks.pretrained import OPTION, Pretrained, find_here, find_pretrained, label_of

if TYPE_CHECKING:
    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch

Found = TypeVar("Found", Pretrained, Pretrained | None)


class Store:
    """Weights on this machine (`nas.networks.pretrained`), and those that can be downloaded. Each network's are looked
    up once, at whatever resolution and with whatever classes; the first failed connection ends all downloads."""

    offline = False
    """Whether a connection has failed, which was told."""

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] = tell) -> None:
        """folder: as `find_pretrained`. say: called with the line of a failed connection."""
        self._folder, self._say = folder, say
        self._found: dict[str, Pretrained | None] = {}
        self._asked = False
        self.begun: dict[str, str] = {}
        """SHA-256 of the weights that a run began with, by the name of their network: others are refused."""
        self.left_out: dict[str, str] = {}
        """Why files of the user's folder are not used, by the name of their network."""

    def apart(self) -> Store:
        """One that looks in the same places, and whose finds are not among this one's."""
        return Store(self._folder, self._say)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the weights found so far, by the name of their network."""
        return {name: found.digest for name, found in sorted(self._found.items()) if found is not None}

    @property
    def files(self) -> dict[str, Path]:
        """Where the weights found so far are, by the name of their network."""
        return {name: found.path for name, found in self._found.items() if found is not None}

    def reach(self) -> bool:
        """Whether weights can be downloaded: no connection has failed. The hub is asked once."""
        if not self._asked and not self.offline:
            self._asked = True
            if why := connection.unreachable():
                self._lose(why)
        return not self.offline

    def here(self, network: Arch | TimmNetwork) -> Pretrained | None:
        """A network's weights on this machine; None where it has none.

        Raises:
            UserError: a folder that is missing or without weights, or others than a run began with.
        """
        label = label_of(network)
        if label not in self._found:
            self._found[label] = self._agreed(find_here(network, self._folder))
        return self._found[label]

    def leave_out(self, network: Arch | TimmNetwork, why: str) -> None:
        """Have no weights of a network from now on, as its file in the user's folder cannot be used."""
        self.left_out[label_of(network)] = why
        self._found[label_of(network)] = None

    def get(self, network: Arch | TimmNetwork, progress: Bytes | None = None) -> Pretrained:
        """A network's weights, downloaded where they are not on this machine.

        Raises:
            UserError: they cannot be had, or are others than a run began with. DiskFull: there is no room for them.
        """
        found = self.here(network)
        if found is not None:
            return found
        if why := self.left_out.get(label_of(network)):
            raise UserError(why)
        if self.offline:
            raise UserError(f"no weights of {label_of(network)}: nothing is downloaded after a failed connection")
        try:
            found = self._agreed(find_pretrained(network, self._folder, progress))
        except Unreached as error:
            self._lose(str(error))
            raise
        self._found[label_of(network)] = found
        return found

    def _agreed(self, found: Found) -> Found:
        if found is not None and self.begun.get(found.name, found.digest) != found.digest:
            raise UserError(
                f"{found.path}: not the weights of {found.name} that this study began with (sha256 "
                f"{self.begun[found.name]}): give the same {OPTION}, or another --study"
            )
        return found

    def _lose(self, why: str) -> None:
        self.offline = True
        self._say(f"only weights on this machine are used ({why}); {OPTION} DIR names a folder of others")
