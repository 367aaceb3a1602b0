"""The ready networks of a race: published ones with weights of their own, at the resolutions that the budget allows.

The best resolution of a network is the highest within the budget. It is found with few measurements: the first is made
where multiply-accumulates say that the network just fits; what it showed says where the next is worth making.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

from nas.errors import UserError
from nas.networks.counts import counts_of
from nas.networks.pretrained import label_of
from nas.networks.ready import Ready, ready_networks
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.quality.candidate import Candidate, Kind, label_at
from nas.search.speed import POWER

if TYPE_CHECKING:
    from nas.networks.store import Store
    from search_spaces import Arch

SHARE = 0.5
"""Of a search's trials, what ready networks take at most: they are what the user would have fine-tuned, so they come
first; at least as many trials are left to beat them."""
SIZES = range(64, 513, 32)
"""Resolutions in px that a network is tried at, up to that of its checkpoint."""
NEARLY = 0.9
"""Of the budget: a network that takes more may be over it in the closing run, so its next lower resolution is worth
measuring too."""
GUESSED, ALIKE, LINE = 2.5, 2.0, 1.15
"""A latency that is foretold from another network's is wrong by less than these factors, either way: from the reference
network's, from that of a network of the same group, and from the same network's at two other resolutions."""
EXPONENTS = (0.6, 0.85, 1.1)
"""Of one network latency grows with this power of the pixels: at least, likely and at most. Of three CNNs from 64 to
128 px, measured on one CPU: 0.72, 0.85 and 0.90."""


@dataclass(frozen=True)
class Forecast:
    """A network's latency in ms at a resolution; the ends are sure, as far as a forecast is."""

    low: float
    likely: float
    high: float

    @classmethod
    def within(cls, likely: float, factor: float) -> Self:
        return cls(likely / factor, likely, likely * factor)

    def longer(self, leeway: float) -> Forecast:
        """The same, but so many times less is possible."""
        return replace(self, low=self.low / leeway)


@dataclass(frozen=True)
class Entrant:
    """A ready network."""

    name: str
    """efficientvit_m0, timm/lcnet_050."""
    group: str
    """What it is a size of: its family or, of timm's, the paper that it is from."""
    network: Arch | TimmNetwork
    """At the resolution that it was published for, with the user's classes."""
    sizes: tuple[int, ...]
    """Resolutions in px that it may be tried at, ascending; one at least."""

    @cached_property
    def _macs_per_pixel(self) -> float:
        return counts_of(self.network).macs / self.network.resolution**2

    def macs(self, px: int) -> float:
        """Multiply-accumulates at a resolution, about: in proportion to its pixels."""
        return self._macs_per_pixel * px**2

    def at(self, px: int) -> Candidate:
        """The candidate at a resolution.

        Raises:
            ArchError, UserError: it takes no such images.
        """
        return Candidate(self.network.at(px), Kind.READY, name=self.label(px))

    def label(self, px: int) -> str:
        """Its candidate's name at a resolution."""
        return label_at(self.name, px, self.network.resolution)

    def forecast(self, px: int, measured: Mapping[int, float]) -> Forecast:
        """Its latency at a resolution.

        Args:
            measured: its latencies in ms by resolution; one at least.
        """
        if px in measured:
            return Forecast(measured[px], measured[px], measured[px])
        near, *others = sorted(measured, key=lambda each: abs(each - px))
        if others and (slope := _slope(near, others[0], measured)) > 0:
            likely = measured[near] + slope * (px**2 - near**2)
            if likely > 0:
                return Forecast.within(likely, LINE)
        return Forecast(*sorted(measured[near] * (px / near) ** (2 * exponent) for exponent in EXPONENTS))


def _slope(one: int, other: int, measured: Mapping[int, float]) -> float:
    """Ms of a pixel."""
    return (measured[one] - measured[other]) / (one**2 - other**2)


@dataclass(frozen=True)
class Open:
    """A measurement of a ready network that is worth making."""

    entrant: Entrant
    px: int
    urgent: bool
    """Whether it comes before any network that is made up: its group has not begun, or the network has."""
    off: float
    """How far its likely latency is from the budget: the absolute logarithm of their ratio."""


class Field:
    """The ready networks of a search, and which of their measurements come next."""

    def __init__(self, entrants: Sequence[Entrant], budget_ms: float, reference: tuple[float, float]) -> None:
        """reference: the reference network's multiply-accumulates, and its latency in ms."""
        self.entrants, self._budget, self._reference = entrants, budget_ms, reference
        self.ratio, self.leeway = 1.0, 1.0
        """Of a search of several precisions, where latencies are the likely ones in the fastest: what a guess is of the
        latency in the first, and how many times less than is likely it may be (`nas.search.precision.Faster`)."""

    def next(self, latencies: Mapping[str, float], tried: Collection[str], failed: Collection[str] = ()) -> list[Open]:
        """What is worth measuring, one a network, those nearest the budget first: of each group without one a network,
        then further resolutions of networks that are measured, then other networks, and last lower resolutions of those
        that hardly fit. Where all are surely over the budget the fastest, as that is only a guess before anything is
        measured.

        Args:
            latencies: in ms, by `Entrant.label`.
            tried: labels of candidates that are waiting, running, or over, whatever became of them.
            failed: labels of those that have failed.
        """
        found = [each for entrant in self.entrants if (each := self._next(entrant, latencies, tried)) is not None]
        if not found and not tried:
            found = self._fastest()
        found.sort(key=lambda each: each.off)
        begun = {each.name for each in self.entrants if any(each.label(px) in tried for px in each.sizes)}
        stand = {each.group for each in self.entrants if self._stands(each, latencies, {*tried} - {*failed})}
        further = [each for each in found if each.entrant.name in begun]
        leaders: list[Open] = []
        rest: list[Open] = []
        for each in found:
            if each.entrant.name not in begun:
                (rest if each.entrant.group in stand else leaders).append(each)
                stand.add(each.entrant.group)
        spare = [each for entrant in self.entrants if (each := self._spare(entrant, latencies, tried)) is not None]
        return [*leaders, *further, *(replace(each, urgent=False) for each in rest), *spare]

    def over(self, latencies: Mapping[str, float]) -> list[str]:
        """What is surely over the budget without having been measured: by network, the lowest such resolution."""
        told = []
        for entrant in self.entrants:
            known = _measured(entrant, latencies)
            sure = [
                px
                for px in entrant.sizes
                if px not in known and self.forecast(entrant, px, latencies).low > self._budget
            ]
            if sure:
                told.append(f"{entrant.name}@{min(sure)}" + " and more" * (len(sure) > 1))
        return told

    def forecast(self, entrant: Entrant, px: int, latencies: Mapping[str, float]) -> Forecast:
        """A network's latency at a resolution: from its own at others, else from a network's of its group, else from
        the reference network's."""
        measured = _measured(entrant, latencies)
        if measured:
            return entrant.forecast(px, measured).longer(self.leeway)
        macs = entrant.macs(px)
        kin = [each for each in self.entrants if each.group == entrant.group]
        known = [(each.macs(at), ms) for each in kin for at, ms in _measured(each, latencies).items()]
        if not known:
            return self.guess(macs)
        others, ms = min(known, key=lambda each: abs(math.log(each[0] / macs)))
        return Forecast.within(ms * (macs / others) ** POWER, ALIKE).longer(self.leeway)

    def guess(self, macs: float) -> Forecast:
        """The latency of a network of any family with so many multiply-accumulates, from the reference network's."""
        others, ms = self._reference
        return Forecast.within(self.ratio * ms * (macs / others) ** POWER, GUESSED).longer(self.leeway)

    def _stands(self, entrant: Entrant, latencies: Mapping[str, float], tried: Collection[str]) -> bool:
        """Whether a network is in the race: it fits at a resolution, or that is not known yet."""
        labels = [entrant.label(px) for px in entrant.sizes]
        return any(label in tried and latencies.get(label, 0.0) <= self._budget for label in labels)

    def _fastest(self) -> list[Open]:
        all_of_them = (
            Open(entrant, px, True, abs(math.log(self.forecast(entrant, px, {}).likely / self._budget)))
            for entrant in self.entrants
            for px in entrant.sizes
        )
        return sorted(all_of_them, key=lambda each: each.off)[:1]

    def _next(self, entrant: Entrant, latencies: Mapping[str, float], tried: Collection[str]) -> Open | None:
        """The measurement of a network that is worth most: the highest resolution that likely fits; None where its best
        is known, or it cannot fit."""
        best = max((px for px, ms in _measured(entrant, latencies).items() if ms <= self._budget), default=0)
        untried = [px for px in entrant.sizes if px > best and entrant.label(px) not in tried]
        forecasts = {px: self.forecast(entrant, px, latencies) for px in untried}
        fitting = [px for px in untried if forecasts[px].likely <= self._budget]
        possible = [px for px in untried if forecasts[px].low <= self._budget]
        if fitting:
            px = max(fitting)
        elif possible and not best:
            px = min(possible)
        else:
            return None
        return Open(entrant, px, True, abs(math.log(forecasts[px].likely / self._budget)))

    def _spare(self, entrant: Entrant, latencies: Mapping[str, float], tried: Collection[str]) -> Open | None:
        """The next lower resolution of a network that hardly fits at each that is measured."""
        fitting = {px: ms for px, ms in _measured(entrant, latencies).items() if ms <= self._budget}
        if not fitting or min(fitting.values()) <= NEARLY * self._budget:
            return None
        lower = [px for px in entrant.sizes if px < min(fitting)]
        if not lower or any(entrant.label(px) in tried for px in lower):
            return None
        off = abs(math.log(self.forecast(entrant, max(lower), latencies).likely / self._budget))
        return Open(entrant, max(lower), False, off)


def _measured(entrant: Entrant, latencies: Mapping[str, float]) -> dict[int, float]:
    labels = {px: entrant.label(px) for px in entrant.sizes}
    return {px: latencies[label] for px, label in labels.items() if label in latencies}


def find_entrants(
    families: Iterable[str], resolution: int | None, num_classes: int, store: Store
) -> tuple[list[Entrant], list[str]]:
    """The ready networks that may race: timm's small ones, and the published ones of the families that are searched.

    Args:
        resolution: in px, of all networks; None: each has those from 64 px to its checkpoint's.
        store: knows whose weights can be had.

    Returns:
        Those whose weights are here or can be downloaded, and the names of the others, but those that the store
        has left out.

    Raises:
        UserError: a folder of weights that is missing or empty, or files in it of which none can be used.
    """
    found, lacking = [], []
    for ready in _published(families):
        entrant = _entrant(ready, resolution, num_classes, store)
        if store.here(entrant.network) is not None or (ready.timm and store.reach()):
            found.append(entrant)
        elif label_of(entrant.network) not in store.left_out:
            lacking.append(entrant.name)
    if store.left_out and not found:
        why, *more = store.left_out.values()
        others = f" (nor can the weights of {', '.join([*store.left_out][1:])} be used)" if more else ""
        raise UserError(f"{why}{others}: replace or remove {'them' if more else 'it'}")
    return found, lacking


def _published(families: Iterable[str]) -> Iterator[Ready]:
    """Every published network of the families, also one that timm has no weights for (the user may), then timm's."""
    from search_spaces.registry import FAMILIES

    known = {each.name: each for each in ready_networks()}
    for family in families:
        for name, variant in FAMILIES[family].variants.items():
            if not variant.reduced:
                yield known.pop(name, Ready(name, "", variant.source))
    yield from (each for name, each in known.items() if name.startswith(TIMM))


def _entrant(ready: Ready, resolution: int | None, num_classes: int, store: Store) -> Entrant:
    from search_spaces import get_arch

    network: Arch | TimmNetwork
    if ready.name.startswith(TIMM):
        network = TimmNetwork(ready.timm, num_classes=num_classes)
        name = ready.name.partition(".")[0]
        group = ready.source
    else:
        name, network = ready.name, get_arch(ready.name).replace(num_classes=num_classes)
        group = network.family
    native = native_size(network, store)
    if resolution is not None:
        return Entrant(name, group, network, (resolution,))
    sizes = tuple(px for px in SIZES if px <= native) or (native,)
    return Entrant(name, group, network, sizes)


def native_size(network: Arch | TimmNetwork, store: Store) -> int:
    """The resolution in px of a checkpoint: as the tensors of a file in the user's folder show it, else
    the published. The store leaves such a file out if it is damaged or of another network."""
    from nas.networks.weights import load, load_as_trained

    found = store.here(network)
    if found is None or found.source != "folder":
        return network.resolution
    what = label_of(network)
    try:
        if isinstance(network, TimmNetwork):
            load(network, found.path, what)
            return network.resolution
        return load_as_trained(network, found.path, network.resolution, what=what).arch.resolution
    except UserError as error:
        store.leave_out(network, str(error))
        return network.resolution
