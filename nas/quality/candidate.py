"""What a search tries: a network, and where its weights come from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from nas.networks.build import from_document
from nas.networks.timm_network import TimmNetwork

if TYPE_CHECKING:
    from search_spaces import Arch


class Kind(StrEnum):
    """Where a candidate's weights come from."""

    READY = "ready"
    """They are its own, published ones."""
    DERIVED = "derived"
    """They are cut from a larger published network's."""
    SCRATCH = "scratch"
    """It has none: they are random."""


@dataclass(frozen=True)
class Candidate:
    """A network that a search may try.

    Raises:
        ValueError: a derived network without a parent, or another with one.
    """

    network: Arch | TimmNetwork
    kind: Kind = Kind.SCRATCH
    parent: str = ""
    """Published name of the network whose weights a derived one's are cut from; "" of other kinds."""
    name: str = ""
    """Of a ready network or a published variant, such as efficientvit_m0, efficientvit_m0@96, timm/lcnet_050@96; ""
    where the search made it up."""

    def __post_init__(self) -> None:
        if (self.kind == Kind.DERIVED) != bool(self.parent):
            raise ValueError(f"a {self.kind} network with the parent {self.parent!r}")

    @property
    def key(self) -> str:
        """What trainings and results go by, and whether two are the same: the network's digest, of a derived one
        together with its parent. Latencies go by the network's digest alone."""
        digest = self.network.digest()
        return hashlib.sha256(f"{digest} {self.parent}".encode()).hexdigest() if self.parent else digest

    @property
    def arch(self) -> Arch:
        """Its Arch.

        Raises:
            TypeError: it is a network of timm's.
        """
        if isinstance(self.network, TimmNetwork):
            raise TypeError(f"timm/{self.network.name} has no Arch")
        return self.network

    def to_json(self) -> dict[str, object]:
        """The candidate as JSON, with its network's document."""
        document: object = json.loads(self.network.to_json())
        return {"network": document, "kind": str(self.kind), "parent": self.parent, "name": self.name}

    @classmethod
    def from_json(cls, kept: object) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: something else.
            ArchError, UserError: as `nas.networks.build.from_document`.
        """
        from pydantic import TypeAdapter

        found = TypeAdapter(dict[str, object]).validate_python(kept)
        told = TypeAdapter(_Told).validate_python({key: value for key, value in found.items() if key != "network"})
        return cls(from_document(json.dumps(found.get("network"))), told.kind, told.parent, told.name)


def label_at(name: str, px: int, published_px: int) -> str:
    """What a ready network is called at a resolution: efficientvit_m0@96; without it at that it was published for."""
    return name if px == published_px else f"{name}@{px}"


@dataclass(frozen=True)
class _Told:
    kind: Kind
    parent: str
    name: str
