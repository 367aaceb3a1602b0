"""What each part of a network costs in time, as measured: halved beside the whole network, group by group.

A group's saving comes from the paired ratio of one interleaved run. Where its 95% interval holds 0 the group is
measured once more, longer; where it still does, no saving is shown: the group costs nothing, so that the allocation
leaves it alone, as it does one that is slower when halved, or saves no MACs (`Saving.why_not`). What is unsure never
decides what is cut.

Residual branches are measured twice: without them, and at half of their inner widths. What the first saves beyond all
that narrowing would, at the second's rate, a branch takes at any width: it stays worth removing when it is narrow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pydantic import JsonValue

from nas.intervals import Interval, of_difference
from nas.measure.samples import Measurement, paired_ratio
from nas.prune.widths import group_of, half

if TYPE_CHECKING:
    from pruning.units import Anatomy, Kind
    from search_spaces import Arch

ROUNDS = 10
LONGER_ROUNDS = 40
"""Of the second measurement, of the groups whose saving the first one did not settle."""
HALVED = "{}, at half of their inner widths"
"""What branches of a group are called then."""

Compare = Callable[[Mapping[str, "Arch"], int], Mapping[str, Measurement]]
"""Measures networks side by side by their names, in this many rounds."""


@dataclass(frozen=True)
class Saving:
    """What a group of knobs saves at half its size (branches: without them)."""

    group: str
    macs: int
    """Multiply-accumulates less."""
    ms: float
    """Milliseconds less."""
    ci: tuple[float, float]
    """95% interval of ms."""
    rounds: int
    """Rounds that it was measured in."""
    branches: int = 0
    """How many residual branches the group is; 0 of widths."""
    fixed_ms: float = 0.0
    """Milliseconds of `ms` that its branches take at any width; 0 where none are shown."""

    @property
    def shown(self) -> bool:
        return self.macs > 0 and self.ci[0] > 0

    @property
    def rate(self) -> float:
        """Milliseconds of a multiply-accumulate, beside `fixed_each`; 0 where no saving is shown."""
        return (self.ms - self.fixed_ms) / self.macs if self.shown else 0.0

    @property
    def fixed_each(self) -> float:
        """Milliseconds of one branch at any width."""
        return self.fixed_ms / self.branches if self.branches and self.shown else 0.0

    @property
    def why_not(self) -> str:
        """Why it shows no saving; empty where it shows one."""
        if self.shown:
            return ""
        if self.macs <= 0:
            return "no MACs saved"
        return "slower" if self.ci[1] < 0 else "none shown"

    def to_json(self) -> dict[str, JsonValue]:
        return asdict(self) | {"ci": list(self.ci), "shown": self.shown, "rate": self.rate}


def measure_savings(
    parts: Anatomy, kinds: Collection[Kind], multiple_of: int, compare: Compare
) -> tuple[list[Saving], float]:
    """The saving of every group of knobs of these kinds, and the whole network's latency in ms."""
    from pruning.allocation import movable
    from pruning.units import cut, equal_scores
    from search_spaces import table

    knobs = movable(parts, kinds, multiple_of)
    smaller = {knob.name: 0 if knob.kind == "blocks" else half(knob.size, knob.kind, multiple_of) for knob in knobs}
    knobs = [knob for knob in knobs if smaller[knob.name] != knob.size]
    groups: dict[str, dict[str, int]] = defaultdict(dict)
    branches = Counter[str]()
    for knob in knobs:
        group = group_of(knob.width, knob.kind)
        groups[group][knob.name] = smaller[knob.name]
        if knob.kind == "blocks":
            branches[group] += 1
            inner = [each.name for each in knobs if each.width.startswith(f"{knob.width}.") and each.kind != "heads"]
            groups[HALVED.format(group)].update({name: smaller[name] for name in inner})
    archs = {name: cut(parts, equal_scores(parts), settings).arch for name, settings in groups.items() if settings}
    macs = {name: parts.table.macs() - table(arch).macs() for name, arch in archs.items()}

    def measured(names: Collection[str], rounds: int) -> tuple[list[Saving], float]:
        results = compare({"": parts.arch} | {name: archs[name] for name in names}, rounds)
        whole = results[""]
        return [_saving(name, macs[name], results[name], whole, rounds) for name in names], whole.p50_ms

    found, own = measured(archs, ROUNDS)
    useless = {HALVED.format(saving.group) for saving in found if not saving.shown}
    unsure = [each.group for each in found if each.ci[0] <= 0 <= each.ci[1] and each.group not in useless]
    if unsure:
        longer = {saving.group: saving for saving in measured(unsure, LONGER_ROUNDS)[0]}
        found = [longer.get(saving.group, saving) for saving in found]
    known = {saving.group: saving for saving in found}
    for group, count in branches.items():
        known[group] = _with_fixed(known[group], known.pop(HALVED.format(group), None), count)
    return list(known.values()), own


def _with_fixed(without: Saving, halved: Saving | None, branches: int) -> Saving:
    """The saving of residual branches, with what they take at any width. halved: of their inner widths; None: they have
    none that may change."""
    found = replace(without, branches=branches)
    if not found.shown or halved is None or halved.macs <= 0:
        return found
    times = found.macs / halved.macs
    narrowed = Interval(*(times * end for end in halved.ci))
    if of_difference(found.ms, Interval(*found.ci), times * halved.ms, narrowed).low <= 0:
        return found
    return replace(found, fixed_ms=min(found.ms, found.ms - times * halved.ms))


def _saving(group: str, macs: int, cut: Measurement, whole: Measurement, rounds: int) -> Saving:
    ratio, (low, high) = paired_ratio(cut, whole)
    own = whole.p50_ms
    return Saving(group, macs, (1 - ratio) * own, ((1 - high) * own, (1 - low) * own), rounds)


WHY_NOT = {
    "none shown": "no saving shown, though measured twice (95% interval of the saving holds 0)",
    "slower": "slower when halved",
    "no MACs saved": "no MACs saved",
}


def left_alone(savings: Collection[Saving]) -> str:
    """Which groups show no saving, by the reason; empty where all do."""
    groups = {why: [saving.group for saving in savings if saving.why_not == why] for why in WHY_NOT}
    told = [f"{WHY_NOT[why]}: {', '.join(names)}" for why, names in groups.items() if names]
    left = sum(map(len, groups.values()))
    return f"left alone, {left} of {len(savings)} groups: {'; '.join(told)}" if told else ""


def rates(savings: Collection[Saving]) -> dict[str, float]:
    """Milliseconds of a multiply-accumulate, by group."""
    return {saving.group: saving.rate for saving in savings}


def fixed(savings: Collection[Saving]) -> dict[str, float]:
    """Milliseconds of a residual branch at any width, by group; 0 of widths."""
    return {saving.group: saving.fixed_each for saving in savings}
