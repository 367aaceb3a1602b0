"""What a race tries next: ready networks first, then what promises most of all that can be made of them.

Ready networks take up to half of the trials (`nas.search.ready.SHARE`). Parents are a few networks over the budget:
each is tuned once, then cut to the budget in many ways. A few networks are from scratch, of families without weights.
What comes next is chosen as `nas.search.propose` does, by constrained expected improvement over all of these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nas.errors import TrainingError, UserError
from nas.measure.budget import Limits
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate, Kind
from nas.quality.surrogate import LEAST, describe_candidate
from nas.search import ready
from nas.search.derive import Cutter, levels_of, reduced, within
from nas.search.given import GIVEN
from nas.search.precision import Faster
from nas.search.propose import Measured, Promise
from nas.search.rows import candidate_of, trial_of
from nas.study.ledger import ledger_of
from search_spaces import Arch, ArchError, count
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.quality.race import RaceTier
    from nas.search.ready import Entrant, Field, Open
    from nas.search.request import SearchRequest

SCRATCH_SHARE = 0.1
"""Of the networks that are made up, those from scratch, where other families have weights: they rarely win on few
images, but a family without weights stays in sight. With nothing else to try, they have the trials that are left."""
PARENT_IN = 20
"""Trials for each parent that is tuned, which takes as long as a full training; two parents at least."""
FIRST = 3
"""Networks cut from each parent before parents compete."""
OVER = (1.0, 4.0)
"""How many times the budget a parent's latency is, at least and at most: one that fits in the first precision is in the
race itself, and little is left of a much larger one."""
LOSS = 1.5
"""Points of top-1 that a parent is taken to lose with each halving of its latency, where parents are compared. Refitted
children of EfficientViT-M1 lost 0.1 points at 40% of its multiply-accumulates and 2.7 at 25%."""
RIVAL = 3.0
"""Points that a further parent may promise less than the best; else its tuning is not worth its time."""
DRAWN = 6
"""Random variations that each parent gets more of with every trial, and networks from scratch that are compared. To
describe a network costs about 0.07 s of a CPU, so what was drawn once stays in the choice."""
DRAWN_FROM_SCRATCH = 48
"""Networks that those from scratch are taken from: most of a space is far over a budget."""
NEAR, NEAR_FIRST = (0.75, 1.15), (0.75, 0.95)
"""Networks are cut from a parent to a latency that is likely so many times the budget: one that is much faster loses
more than it must, and one that is slower is measured in vain. And where the parent itself fits in a later precision:
there it has little to gain, so its children are cut to surely fit in the first one."""
SMALLER = 0.25
"""With limits beside the latency: times the least share of MACs, as memory or size may ask for smaller networks."""
CUT_POWER, POWERS = 0.7, (0.2, 1.2)
"""A child's latency is about its parent's times this power of the share of MACs that it has left (0.6 of a child of
EfficientViT-M1, 0.97 of one of SHViT-S1); and within which that is taken from children that are measured."""
TELLING = 0.9
"""Children with less than this share of their parent's MACs tell that power."""
BEST = 3
"""Children whose parameters are varied beside the parent's."""
OFFERED = 8
"""Candidates that are offered, best first, should other workers take some."""


@dataclass(frozen=True)
class Tried:
    """A trial of a race, whatever became of it."""

    candidate: Candidate
    measured: Measured | None
    """None: it failed, or is not measured yet."""
    failed: bool


@dataclass(frozen=True)
class Sized:
    """A parent at a resolution."""

    name: str
    group: str
    px: int
    over: float
    """Its likely latency as a multiple of the budget."""
    fits: bool = False
    """Whether it is likely to fit whole, but only in a later precision of the search; `over` is of the first one."""


class Chooser:
    """Chooses the candidates of a race."""

    def __init__(self, tier: RaceTier, request: SearchRequest, field: Field) -> None:
        self._tier, self._request, self._field = tier, request, field
        self._faster = Faster(request.precisions)
        self._cutters: dict[tuple[str, int], Cutter] = {}
        self._made: dict[tuple[str, int], dict[str, Candidate]] = {}
        """Children by their keys, of each parent at a resolution."""
        self._levels: dict[str, Mapping[str, int]] = {}
        """Parameters of networks made up by this process, by the key of the candidate."""
        self._described: dict[str, np.ndarray | None] = {}
        self.over_limits: set[str] = set()
        """Names of ready networks that are surely over a limit of memory or size, and so not measured."""
        self._ready_ones: dict[str, Candidate | None] = {}
        """By label; None: it takes no images of that size."""

    @property
    def opened(self) -> int:
        """How many parents have been opened, and so tuned where no run had tuned them."""
        return len(self._cutters)

    def tried(self, study: optuna.Study) -> list[Tried]:
        """The candidates of a study's trials, with the latencies that are likely in their fastest precision."""
        self._faster = Faster.of_study(self._request.precisions, study)
        self._field.ratio, self._field.leeway = self._faster.ratio(), self._faster.leeway
        return [_in_fastest(each, self._faster) for each in tried_in(study)]

    def offer(self, study: optuna.Study) -> list[Candidate]:
        """Candidates that are worth trying, best first; none where nothing is left. A parent may be tuned for them.
        Where the user has named a sampler, ready networks alone: the sampler makes up others.

        Raises:
            UserError: as `nas.quality.parents.Parents.tuned`.
        """
        tried = self.tried(study)
        latencies = latencies_of(tried)
        open_ready = self._ready(tried, latencies)
        promise = Promise([each.measured for each in tried if each.measured], self._tier.surrogate(), self._request)
        urgent = self._built((each for each in open_ready if each.urgent), promise)
        if urgent or self._request.sampler != "auto":
            return urgent
        rng = self._generator(len(tried))
        if self._scratch_is_due(tried) and (fresh := self._best(self._scratch(rng), tried, promise)):
            return fresh
        pool = self._built(open_ready, promise)
        for parent in self._parents(latencies, tried):
            if (whole := self._unmeasured(parent, tried)) is not None:
                return [whole]
            children = self._children(parent, tried, rng)
            number = sum(_place_of(each.candidate) == (parent.name, parent.px) for each in tried)
            if number < FIRST and (fresh := self._best(children, tried, promise)):
                return fresh
            pool += children
        return self._best(pool, tried, promise) or self._best(self._scratch(rng), tried, promise)

    def why_none(self, study: optuna.Study) -> str:
        """Why nothing is left to try, and what may help, where no sampler is named."""
        tried = self.tried(study)
        latencies = latencies_of(tried)
        low, high = OVER
        over = [each.over for _, each in self._sizes(latencies, tried)]
        parents = sorted({each.candidate.parent for each in tried if each.candidate.kind == Kind.DERIVED})
        why, helps = "every ready network that may meet the budget has been", []
        first, *lower = self._request.precisions
        in_first = f" in {first}" if lower else ""
        if self._open(tried, latencies):
            why, helps = "ready networks have had their half of the trials", ["more --trials, for other ready networks"]
        if parents:
            why += f", and what can be cut from {', '.join(parents)} has been tried"
        elif all(each <= low for each in over):
            why += f", and no pretrained network of these families is over it{in_first}, to cut smaller ones from"
            helps += ["a smaller --latency-budget", "--weights-from DIR with weights of larger networks"]
        elif not any(low < each <= high for each in over):
            why += (
                f", and the pretrained networks over it{in_first} take more than {high:g} times as long, too long to "
                "be cut to it"
            )
            helps += ["a larger --latency-budget"]
        else:
            why += ", and of the pretrained networks over it none could be cut"
        if self._request.limits != Limits():
            helps += [f"looser limits than{self._request.limits.words.removeprefix(',')}"]
        return f"{why}; may help: {', '.join([*helps, '--from-scratch'])}"

    def _generator(self, number: int) -> np.random.Generator:
        seed = self._request.seed
        return np.random.default_rng(None if seed is None else [seed, number])

    def _best(self, pool: Iterable[Candidate], tried: Sequence[Tried], promise: Promise) -> list[Candidate]:
        """The most promising that have not been tried."""
        known = {each.candidate.key for each in tried}
        found: dict[str, tuple[float, Candidate]] = {}
        for candidate in pool:
            features = None if candidate.key in known | found.keys() else self._features(candidate)
            if features is not None:
                found[candidate.key] = promise.of(features), candidate
        ordered = sorted(found.values(), key=lambda each: each[0], reverse=True)
        return [candidate for _, candidate in ordered[:OFFERED]]

    def _features(self, candidate: Candidate) -> np.ndarray | None:
        """None: it cannot run."""
        if candidate.key not in self._described:
            try:
                self._described[candidate.key] = describe_candidate(candidate, counts_of(candidate.network))
            except UserError:
                self._described[candidate.key] = None
        return self._described[candidate.key]

    # Ready networks

    def _ready(self, tried: Sequence[Tried], latencies: Mapping[str, float]) -> list[Open]:
        """Ready networks still to measure; none where they have had their share."""
        return [] if self._ready_have_had_theirs(tried) else self._open(tried, latencies)

    def _ready_have_had_theirs(self, tried: Sequence[Tried]) -> bool:
        number = sum(each.candidate.kind == Kind.READY for each in tried)
        return number >= math.ceil(ready.SHARE * self._request.trials)

    def _open(self, tried: Sequence[Tried], latencies: Mapping[str, float]) -> list[Open]:
        """Ready networks still to measure, whatever their share."""
        mine = [each for each in tried if each.candidate.kind == Kind.READY]
        labels = {each.candidate.name for each in mine}
        failed = {each.candidate.name for each in mine if each.failed}
        impossible = {label for label, candidate in self._ready_ones.items() if candidate is None}
        return self._field.next(latencies, labels | impossible, failed | impossible)

    def _built(self, measurements: Iterable[Open], promise: Promise) -> list[Candidate]:
        """The first of them as candidates; none that is surely over a limit of memory or size."""
        found = (self._ready_one(each.entrant, each.px) for each in measurements)
        able = (one for one in found if one is not None and self._may_meet(one, promise))
        return list(itertools.islice(able, OFFERED))

    def _may_meet(self, candidate: Candidate, promise: Promise) -> bool:
        if self._request.limits == Limits():
            return True
        features = self._features(candidate)
        able = features is None or promise.may_meet(features)
        (self.over_limits.discard if able else self.over_limits.add)(candidate.name)
        return able

    def _ready_one(self, entrant: Entrant, px: int) -> Candidate | None:
        """A ready network at a resolution; None where it takes no such images."""
        label = entrant.label(px)
        if label not in self._ready_ones:
            try:
                self._ready_ones[label] = entrant.at(px)
            except (ArchError, UserError):
                self._ready_ones[label] = None
        return self._ready_ones[label]

    # Networks cut from a parent

    def _parents(self, latencies: Mapping[str, float], tried: Sequence[Tried]) -> list[Sized]:
        """Parents that children are cut from: those that have been, then the best of each family, then others. Last
        those that fit whole in a later precision: their children, cut to fit in the first one, have them to beat."""
        low, high = OVER
        parents = self._tier.parents
        found = [
            each
            for entrant, each in self._sizes(latencies, tried)
            if each.name not in parents.failed
            and (each.name, each.px) not in parents.uncut
            and low < each.over <= high
            and self._ready_one(entrant, each.px) is not None
        ]
        children = (each.candidate for each in tried if each.candidate.kind == Kind.DERIVED)
        begun = {_place_of(child) for child in children} | self._cutters.keys()
        loss = self._loss()
        found.sort(key=loss)
        first = {(each.group, each.fits): each for each in reversed(found)}
        more = max(2, self._request.trials // PARENT_IN) - len(begun)
        worst = loss(found[0]) + RIVAL if found else 0.0
        others = [each for each in found if (each.name, each.px) not in begun and loss(each) <= worst]
        others.sort(key=lambda each: (each.fits, first[each.group, each.fits] is not each))
        return [*(each for each in found if (each.name, each.px) in begun), *others[: max(0, more)]]

    def _sizes(self, latencies: Mapping[str, float], tried: Sequence[Tried]) -> Iterator[tuple[Entrant, Sized]]:
        """Every ready network of a family at each resolution."""
        budget, firsts = self._request.budget_ms, self._in_first(tried)
        for entrant in self._field.entrants:
            if not isinstance(entrant.network, Arch):
                continue
            for px in entrant.sizes:
                likely = self._field.forecast(entrant, px, latencies).likely
                first = firsts.get(entrant.label(px), likely / self._faster.ratio(entrant.group))
                fits = likely <= budget < first
                yield entrant, Sized(entrant.name, entrant.group, px, (first if fits else likely) / budget, fits)

    def _in_first(self, tried: Sequence[Tried]) -> dict[str, float]:
        """In ms, of ready networks by their labels: as measured in the first of several precisions."""
        first, ready_ones = self._request.precisions[0], (each for each in tried if each.candidate.kind == Kind.READY)
        measured = ((each.candidate.name, each.measured) for each in ready_ones if each.measured)
        return {label: found.by_precision[first] for label, found in measured if found.by_precision}

    def _unmeasured(self, parent: Sized, tried: Sequence[Tried]) -> Candidate | None:
        """A parent whose latency is only foretold, as a ready network: it is measured before it is cut, so that it is
        known how far. None where it is measured or begun, or where ready networks have had their share."""
        if (parent.name, parent.px) in self._cutters or self._ready_have_had_theirs(tried):
            return None
        entrant = next(each for each in self._field.entrants if each.name == parent.name)
        candidate = self._ready_one(entrant, parent.px)
        known = {each.candidate.key for each in tried}
        begun = any(_place_of(each.candidate) == (parent.name, parent.px) for each in tried)
        return None if begun or candidate is None or candidate.key in known else candidate

    def _loss(self) -> Callable[[Sized], float]:
        """Points of top-1 that a parent is taken to lose when it is cut, less those that it is expected to have."""
        surrogate = self._tier.surrogate()
        entrants = {entrant.name: entrant for entrant in self._field.entrants}
        known = len(surrogate.trained) >= LEAST

        def of(parent: Sized) -> float:
            loss = LOSS * math.log2(parent.over)
            candidate = self._ready_one(entrants[parent.name], parent.px) if known else None
            features = None if candidate is None else self._features(candidate)
            if candidate is None or features is None:
                return loss
            return loss - surrogate.predict(features, candidate.key).value

        return of

    def _children(self, parent: Sized, tried: Sequence[Tried], rng: np.random.Generator) -> list[Candidate]:
        """Networks cut from a parent, which is tuned where it is not yet; none where it cannot be."""
        place = parent.name, parent.px
        if place not in self._cutters:
            try:
                self._cutters[place] = Cutter(self._tier.parents.tuned(parent.name, parent.px))
            except TrainingError:  # told by the parents
                return []
        whole, own = self._cutters[place].parent.arch, levels_of(parent.name)
        power, macs = _power_of(place, tried), count(whole).macs
        near = NEAR_FIRST if parent.fits else NEAR
        least, most = ((times / parent.over) ** (1 / power) for times in near)
        if self._request.limits != Limits():
            least *= SMALLER
        for arch in self._cutters[place].cuts(least, most):
            self._keep(place, arch)
        bases = [own, *self._best_levels(place, tried)]
        reduces = FAMILIES[whole.family].reduction is not None
        for i in range(DRAWN):
            made = reduced(whole, own, rng) if reduces and i % 2 else within(whole, bases, rng)
            if made is not None:
                arch, levels = made
                self._levels[self._keep(place, arch)] = levels
        found = self._made.get(place, {}).values()
        return [each for each in found if least <= count(each.arch).macs / macs <= most]

    def _keep(self, place: tuple[str, int], arch: Arch) -> str:
        """Add a child to those of its parent, and give its key."""
        candidate = Candidate(arch, Kind.DERIVED, place[0])
        self._made.setdefault(place, {})[candidate.key] = candidate
        return candidate.key

    def _best_levels(self, place: tuple[str, int], tried: Sequence[Tried]) -> list[Mapping[str, int]]:
        """Parameters of a parent's best children within the budget, of those that this process has made up."""
        surrogate = self._tier.surrogate()
        found = [
            (
                surrogate.predict(np.array(each.measured.features), each.candidate.key).value,
                self._levels[each.candidate.key],
            )
            for each in tried
            if each.measured
            and each.measured.feasible
            and _place_of(each.candidate) == place
            and each.candidate.key in self._levels
        ]
        return [levels for _, levels in sorted(found, key=lambda each: -each[0])[:BEST]]

    # Networks from scratch

    @cached_property
    def _without_weights(self) -> list[str]:
        """The families that nothing is ready of."""
        groups = {entrant.group for entrant in self._field.entrants}
        return [family for family in self._request.families if family not in groups]

    def _scratch_is_due(self, tried: Sequence[Tried]) -> bool:
        """Whether a network from scratch is next; all are where nothing has weights."""
        made = [each.candidate.kind for each in tried if each.candidate.kind != Kind.READY]
        share = made.count(Kind.SCRATCH) + 1 <= SCRATCH_SHARE * (len(made) + 1)
        return not self._field.entrants or (share and bool(self._without_weights))

    def _scratch(self, rng: np.random.Generator) -> list[Candidate]:
        """Some whose size does not say that they are surely over the budget, or the smallest that was drawn."""
        families, request = self._without_weights, self._request
        if not families:
            return []
        drawn = []
        for _ in range(DRAWN_FROM_SCRATCH):
            space = FAMILIES[families[rng.integers(len(families))]].space
            drawn.append(space.decode(random_params(rng), request.num_classes, request.resolution))
        macs = {arch: count(arch).macs for arch in drawn}
        may_fit = [arch for arch in drawn if self._field.guess(macs[arch]).low <= request.budget_ms]
        return [Candidate(arch) for arch in may_fit[:DRAWN] or [min(drawn, key=macs.__getitem__)]]


def tried_in(study: optuna.Study) -> list[Tried]:
    """The candidates of a study's trials, then those that wait or run; not of trials that a sampler has begun."""
    now = ledger_of(study)
    return [each for each in (*now.read(_tried), *map(_tried, now.open)) if each is not None]


def _tried(trial: FrozenTrial) -> Tried | None:
    from optuna.trial import TrialState

    failed = trial.state == TrialState.FAIL
    try:
        measured = Measured.of(trial)
        if GIVEN in trial.user_attrs:
            return Tried(Candidate.from_json(trial.user_attrs[GIVEN]), measured, failed)
        if measured is not None and "detail" in trial.user_attrs:
            return Tried(candidate_of(trial_of(trial)), measured, failed)
    except (ValueError, UserError):  # of another worker's timm: it cannot be offered here either
        pass
    return None


def _in_fastest(tried: Tried, faster: Faster) -> Tried:
    found = tried.measured
    if found is None or not found.by_precision:
        return tried
    likely = faster.fastest_ms(found.family, found.by_precision)
    return replace(tried, measured=replace(found, latency_ms=likely))


def latencies_of(tried: Iterable[Tried]) -> dict[str, float]:
    """In ms, of the ready networks that are measured, by their labels."""
    return {
        each.candidate.name: each.measured.latency_ms
        for each in tried
        if each.measured and each.candidate.kind == Kind.READY
    }


def _power_of(place: tuple[str, int], tried: Sequence[Tried]) -> float:
    """Of a parent at a resolution: with which power of their share of MACs its children's latencies fall; the median of
    those that are measured, where the parent is."""
    name, px = place
    known = [each for each in tried if each.measured is not None and each.candidate.network.resolution == px]
    whole = next((each for each in known if each.candidate.name.partition("@")[0] == name), None)
    if whole is None or whole.measured is None:
        return CUT_POWER
    found = [
        math.log(each.measured.latency_ms / whole.measured.latency_ms) / math.log(share)
        for each in known
        if each.measured is not None
        and _place_of(each.candidate) == place
        and (share := count(each.candidate.arch).macs / count(whole.candidate.arch).macs) < TELLING
    ]
    return min(max(float(np.median(found)), POWERS[0]), POWERS[1]) if found else CUT_POWER


def _place_of(candidate: Candidate) -> tuple[str, int]:
    return candidate.parent, candidate.network.resolution
