"""What a race tries next: ready networks first, then cut ones of tuned parents, nothing twice."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Self

import numpy as np
import pytest
from optuna.trial import TrialState

from nas.errors import TrainingError, UserError
from nas.measure.budget import Limits
from nas.measure.runtime import Settings
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate, Kind
from nas.quality.surrogate import describe_candidate
from nas.quality.trainer import Parent
from nas.search import choose, derive, propose
from nas.search.choose import Chooser, Sized, Tried
from nas.search.given import GIVEN
from nas.search.propose import Measured
from nas.search.ready import GUESSED, Entrant, Field
from nas.search.speed import POWER
from pruning.units import anatomy, equal_scores
from search_spaces import get_arch

PX, BUDGET_MS, PER_MAC = 64, 0.6, 0.05e-6
"""EfficientViT-M0 at 64 px takes 0.31 ms, M1 0.68, M2 0.81."""
NAMES = ("efficientvit_m0", "efficientvit_m1", "efficientvit_m2")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive, "SHARES", (0.85, 0.7, 0.6))
    monkeypatch.setattr(choose, "DRAWN", 1)
    monkeypatch.setattr(choose, "DRAWN_FROM_SCRATCH", 12)
    monkeypatch.setattr(choose, "Promise", Promise)


class Promise:
    """The larger the better, within the budget. `tests/nas/search/test_propose.py` tests the real one."""

    def __init__(self, *_: object) -> None:
        pass

    def of(self, features: np.ndarray) -> float:
        macs = 2 ** features[1]
        return macs if macs * PER_MAC <= BUDGET_MS else -macs


class Bench:
    """A race whose trials are made up."""

    def __init__(
        self,
        trials: int = 40,
        families: tuple[str, ...] = ("efficientvit",),
        sampler: str = "auto",
        limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        self.trials: list[SimpleNamespace] = []
        self.tuned: list[tuple[str, int]] = []
        self.parents = SimpleNamespace(failed={}, uncut={}, tuned=self._tune)
        self.surrogate = SimpleNamespace(
            trained=[], predict=lambda features, key="": SimpleNamespace(value=features[1])
        )
        tier = SimpleNamespace(parents=self.parents, surrogate=lambda: self.surrogate)
        request = SimpleNamespace(
            trials=trials,
            budget_ms=BUDGET_MS,
            seed=0,
            families=families,
            sampler=sampler,
            num_classes=5,
            resolution=PX,
            limits=limits,
            settings=Settings(),
            precisions=("fp32",),
        )
        entrants = [
            Entrant(name, "efficientvit", get_arch(name).replace(num_classes=5), (PX,))
            for name in NAMES
            if "efficientvit" in families
        ]
        self.chooser = Chooser(tier, request, Field(entrants, BUDGET_MS, (6e6, 0.3)))

    def study(self) -> Self:
        return self

    def get_trials(self, deepcopy: bool) -> list[SimpleNamespace]:
        return self.trials

    def offer(self) -> list[Candidate]:
        return self.chooser.offer(self.study())

    def run(self, candidate: Candidate, fails: bool = False) -> None:
        counts = counts_of(candidate.network)
        ms = counts.macs * PER_MAC
        features = describe_candidate(candidate, counts)
        detail = {
            "digest": candidate.network.digest(),
            "key": candidate.key,
            "latency_ms": ms,
            "file_mb": 4 * counts.params / 1e6,
            "training": {"features": features.tolist(), "rungs": {}},
        }
        attributes = {GIVEN: candidate.to_json(), "family": candidate.network.family}
        state = TrialState.FAIL if fails else TrialState.COMPLETE
        if not fails:
            attributes |= {"detail": detail, "feasible": int(ms <= BUDGET_MS)}
        self.trials.append(SimpleNamespace(number=len(self.trials), params={}, user_attrs=attributes, state=state))

    def _tune(self, name: str, px: int) -> Parent:
        self.tuned.append((name, px))
        if name in self.parents.failed:
            raise TrainingError("no")
        arch = get_arch(name).replace(num_classes=5).at(px)
        return Parent(name, arch, {}, equal_scores(anatomy(arch)))


def test_a_race_tries_ready_networks_then_those_cut_from_the_parents_just_over_the_budget() -> None:
    bench = Bench(trials=20)
    order = []
    for _ in range(10):
        first = bench.offer()[0]
        order.append(first)
        bench.run(first)
    keys = [each.key for each in order]
    assert len(set(keys)) == len(keys), "nothing twice"
    assert "efficientvit_m0@64" in {each.name for each in order}
    kinds = [each.kind for each in order]
    assert kinds.index(Kind.DERIVED) <= 3
    derived = [each for each in order if each.kind == Kind.DERIVED]
    assert {each.parent for each in derived} == {"efficientvit_m1", "efficientvit_m2"}
    assert sorted(bench.tuned) == [("efficientvit_m1", PX), ("efficientvit_m2", PX)], "each once"
    assert len({each.parent for each in derived[: choose.FIRST]}) == 1
    assert f"and what can be cut from {derived[0].parent}" in bench.chooser.why_none(bench.study())
    assert len({each.parent for each in derived[: 2 * choose.FIRST]}) == 2
    ms = [counts_of(each.network).macs * PER_MAC for each in derived]
    assert sum(each <= BUDGET_MS for each in ms) >= len(ms) * 0.6
    assert max(each for each in ms if each <= BUDGET_MS) > 0.85 * BUDGET_MS, "just within the budget"


def test_ready_networks_have_a_share_of_the_trials_at_most() -> None:
    bench = Bench(trials=2)
    bench.run(bench.offer()[0])
    assert all(each.kind == Kind.DERIVED for each in bench.offer())


def test_what_waits_or_has_failed_is_not_offered_again() -> None:
    bench = Bench()
    first = bench.offer()[0]
    bench.run(first, fails=True)
    assert first.key not in {each.key for each in bench.offer()}


def test_a_parent_that_cannot_be_had_makes_room_for_the_next() -> None:
    bench = Bench(trials=20)
    bench.parents.failed["efficientvit_m1"] = "damaged"
    while (first := bench.offer()[0]).kind == Kind.READY:
        bench.run(first)
    assert first.parent == "efficientvit_m2"


def test_parents_are_few_and_those_of_which_most_is_expected() -> None:
    bench = Bench(trials=20)
    while bench.offer()[0].kind == Kind.READY:
        bench.run(bench.offer()[0])
    assert bench.tuned == [("efficientvit_m1", PX)], "the nearest"
    bench = Bench(trials=20)
    better = {counts_of(get_arch(name).replace(num_classes=5).at(PX)).macs: name for name in NAMES}
    bench.surrogate.trained = [None] * 3
    bench.surrogate.predict = lambda features, key="": SimpleNamespace(
        value=50 if better.get(round(2 ** features[1])) == "efficientvit_m2" else 30
    )
    while bench.offer()[0].kind == Kind.READY:
        bench.run(bench.offer()[0])
    assert bench.tuned == [("efficientvit_m2", PX)], "the better"


def test_without_weights_networks_are_from_scratch_and_with_some_a_few_are() -> None:
    bench = Bench(families=("sepvit",))
    assert {(each.kind, each.network.family) for each in bench.offer()} == {(Kind.SCRATCH, "sepvit")}
    bench = Bench(trials=60, families=("efficientvit", "sepvit"))
    order = []
    for _ in range(14):
        order.append(bench.offer()[0])
        bench.run(order[-1])
    made_up = [each for each in order if each.kind != Kind.READY]
    assert 1 <= sum(each.kind == Kind.SCRATCH for each in made_up) <= math.ceil(choose.SCRATCH_SHARE * len(made_up))


def test_where_nothing_else_is_left_networks_are_from_scratch() -> None:
    bench = Bench(trials=20, families=("sepvit",))
    bench.chooser._field.entrants = [
        Entrant("timm/one", "one", get_arch("efficientvit_m0").replace(num_classes=5), (PX,))
    ]
    order = []
    for _ in range(5):
        order.append(bench.offer()[0].kind)
        bench.run(bench.offer()[0])
    assert order == [Kind.READY] + [Kind.SCRATCH] * 4


def test_a_network_that_cannot_run_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(trials=20)
    while bench.offer()[0].kind == Kind.READY:
        bench.run(bench.offer()[0])

    def refuse(network: object) -> None:
        raise UserError("it cannot run")

    monkeypatch.setattr(choose, "counts_of", refuse)
    bench.chooser._described.clear()
    assert bench.offer() == []


def test_with_a_sampler_only_ready_networks_are_offered() -> None:
    bench = Bench(sampler="nsga2")
    while offered := bench.offer():
        assert offered[0].kind == Kind.READY
        bench.run(offered[0])
    assert bench.trials
    assert bench.tuned == []


def test_a_parent_is_measured_before_it_is_tuned() -> None:
    bench = Bench(trials=20)
    bench.chooser._field = Field(bench.chooser._field.entrants[:2], BUDGET_MS, (6e6, 0.4))
    bench.chooser._ready = lambda tried, latencies: []
    first = bench.offer()[0]
    assert (first.kind, first.name, bench.tuned) == (Kind.READY, "efficientvit_m1@64", [])
    bench.run(first)
    assert bench.offer()[0].parent == "efficientvit_m1"


def test_only_the_parent_whose_turn_is_next_is_measured() -> None:
    bench = Bench(trials=60)
    bench.chooser._field = Field(bench.chooser._field.entrants, BUDGET_MS, (6e6, 0.45))
    bench.chooser._ready = lambda tried, latencies: []
    order = []
    for _ in range(choose.FIRST + 2):
        order.append(bench.offer()[0])
        bench.run(order[-1])
    kinds = [each.kind for each in order]
    assert kinds == [Kind.READY, *[Kind.DERIVED] * choose.FIRST, Kind.READY], "each just before it is cut"
    assert (order[0].name, order[-1].name) == ("efficientvit_m1@64", "efficientvit_m2@64")


def test_children_are_as_far_from_the_budget_as_those_before_them_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive, "SHARES", tuple(0.9**i for i in range(14)))
    bench, place = Bench(), ("efficientvit_m2", PX)
    whole = Candidate(get_arch("efficientvit_m2").replace(num_classes=5).at(PX), Kind.READY, name="efficientvit_m2@64")
    macs = counts_of(whole.network).macs

    def shares(tried: list[Tried]) -> list[float]:
        rng = np.random.default_rng(0)
        made = bench.chooser._children(Sized("efficientvit_m2", "efficientvit", PX, 1.5), tried, rng)
        return [counts_of(each.network).macs / macs for each in made]

    def tried(candidate: Candidate, ms: float) -> Tried:
        return Tried(candidate, Measured("efficientvit", {}, "", [], ms, True), False)

    low, high = ((times / 1.5) ** (1 / choose.CUT_POWER) for times in choose.NEAR)
    assert low <= min(shares([])) < 0.45 < max(shares([])) <= high
    child = next(iter(bench.chooser._made[place].values()))
    left = counts_of(child.network).macs / macs
    known = [tried(whole, 0.9), tried(child, 0.9 * left**1.1)]
    assert min(shares(known)) >= (0.75 / 1.5) ** (1 / 1.1), "its latency fell faster: less need be cut"
    assert max(shares(known)) > high


@pytest.mark.parametrize(("other", "rivals"), [(49.0, True), (45.0, False)])
def test_a_parent_that_promises_much_less_is_not_tuned(other: float, rivals: bool) -> None:
    bench = Bench(trials=40)
    macs = counts_of(get_arch("efficientvit_m2").replace(num_classes=5).at(PX)).macs
    bench.surrogate.trained = [None] * 3
    bench.surrogate.predict = lambda features, key="": SimpleNamespace(
        value=other if round(2 ** features[1]) == macs else 50.0
    )
    latencies = {"efficientvit_m0@64": 0.5, "efficientvit_m1@64": 0.8, "efficientvit_m2@64": 1.0}
    found = [each.name for each in bench.chooser._parents(latencies, [])]
    assert found == ["efficientvit_m1", "efficientvit_m2"][: 1 + rivals]


def in_two_precisions(bench: Bench, ratio: float) -> Chooser:
    """A search that has measured a network of another family in both."""
    bench.chooser._request.precisions = ("fp32", "bf16")
    bench.run(Candidate(get_arch("shvit_s1").replace(num_classes=5).at(PX), Kind.READY, name="shvit_s1@64"))
    bench.trials[0].user_attrs["detail"]["by_precision"] = {"fp32": 1.0, "bf16": ratio}
    return bench.chooser


def test_a_parent_that_fits_in_a_later_precision_only_is_cut_to_fit_in_the_first() -> None:
    bench = Bench(trials=40)
    chooser = in_two_precisions(bench, 0.5)
    latencies = {f"{name}@64": 0.5 * ms for name, ms in zip(NAMES, (0.31, 0.68, 0.81), strict=True)}
    tried = chooser.tried(bench.study())
    found = chooser._parents(latencies, tried)
    assert [(each.name, each.fits) for each in found] == [("efficientvit_m1", True), ("efficientvit_m2", True)]
    assert [each.over for each in found] == pytest.approx([0.68 / BUDGET_MS, 0.81 / BUDGET_MS])
    assert "none could be cut" in chooser.why_none(bench.study())
    found = chooser._parents(latencies | {"efficientvit_m2@64": 0.8}, tried)
    assert [each.name for each in found] == ["efficientvit_m2", "efficientvit_m1"], "first what is over in both"
    chooser._tier.parents.failed["efficientvit_m2"] = "its tuning failed"
    found = chooser._parents(latencies | {"efficientvit_m2@64": 0.8}, tried)
    assert [each.name for each in found] == ["efficientvit_m1"]


def test_what_is_too_slow_to_be_cut_is_told_of_the_first_precision() -> None:
    """In a later one it fits."""
    bench = Bench(trials=40)
    chooser = in_two_precisions(bench, 0.5)
    whole = Candidate(get_arch("efficientvit_m2").replace(num_classes=5).at(PX), Kind.READY, name="efficientvit_m2@64")
    bench.run(whole)
    bench.trials[1].user_attrs["detail"] |= {"by_precision": {"fp32": 4.5 * BUDGET_MS, "bf16": 0.5}, "latency_ms": 0.5}
    chooser._field = Field(chooser._field.entrants[2:], BUDGET_MS, (6e6, 0.3))
    assert "networks over it in fp32 take more than 4 times as long, too long" in chooser.why_none(bench.study())


def test_each_family_leads_with_a_parent_that_is_over_in_every_precision() -> None:
    bench = Bench(trials=40)
    chooser = in_two_precisions(bench, 0.5)
    sizes = {"efficientvit_m0": 0.4, "efficientvit_m1": 0.65, "efficientvit_m2": 0.7, "shvit_s1": 0.4, "shvit_s2": 0.75}
    entrants = [Entrant(name, name[:5], get_arch(name).replace(num_classes=5), (PX,)) for name in sizes]
    chooser._field = Field(entrants, BUDGET_MS, (6e6, 0.3))
    found = chooser._parents({f"{name}@64": ms for name, ms in sizes.items()}, bench.chooser.tried(bench.study()))
    assert [each.name for each in found] == ["efficientvit_m1", "shvit_s2"]


def test_a_poor_parent_does_not_keep_better_ones_away_that_fit_in_a_later_precision() -> None:
    bench = Bench(trials=40)
    chooser = in_two_precisions(bench, 0.5)
    macs = counts_of(get_arch("efficientvit_m2").replace(num_classes=5).at(PX)).macs
    bench.surrogate.trained = [None] * 3
    bench.surrogate.predict = lambda features, key="": SimpleNamespace(
        value=40.0 if round(2 ** features[1]) == macs else 50.0
    )
    latencies = {"efficientvit_m0@64": 0.1, "efficientvit_m1@64": 0.4, "efficientvit_m2@64": 0.65}
    found = chooser._parents(latencies, chooser.tried(bench.study()))
    assert [(each.name, each.fits) for each in found] == [("efficientvit_m1", True)]


def test_what_is_cut_from_a_parent_that_fits_in_a_later_precision_fits_in_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its children all fit in the later one, where the largest of them promise most."""
    monkeypatch.setattr(choose, "Promise", propose.Promise)
    monkeypatch.setattr(derive, "SHARES", tuple(0.95**i for i in range(1, 20)))
    bench = Bench(trials=40)
    chooser = in_two_precisions(bench, 0.5)
    whole = Candidate(get_arch("efficientvit_m2").replace(num_classes=5).at(PX), Kind.READY, name="efficientvit_m2@64")
    bench.run(whole)
    bench.trials[1].user_attrs["detail"] |= {"by_precision": {"fp32": 0.8, "bf16": 0.4}, "latency_ms": 0.4}
    tried = chooser.tried(bench.study())
    parent = next(each for each in chooser._parents(choose.latencies_of(tried), tried) if each.name == NAMES[2])
    promise = propose.Promise([each.measured for each in tried if each.measured], bench.surrogate, chooser._request)
    children = chooser._children(parent, tried, np.random.default_rng(0))
    best = chooser._best(children, tried, promise)[0]
    share = counts_of(best.network).macs / counts_of(whole.network).macs
    assert parent.fits
    assert 0.85 < 0.8 * share**choose.CUT_POWER / BUDGET_MS <= 0.95


def test_the_latency_in_the_first_precision_is_foretold_by_the_ratio_of_the_family() -> None:
    bench = Bench(trials=40)
    chooser = in_two_precisions(bench, 0.9)
    bench.run(
        Candidate(get_arch("efficientvit_m0").replace(num_classes=5).at(PX), Kind.READY, name="efficientvit_m0@64")
    )
    bench.trials[1].user_attrs["detail"]["by_precision"] = {"fp32": 0.4, "bf16": 0.2}
    tried = chooser.tried(bench.study())
    sizes = {
        each.name: each for _, each in chooser._sizes({"efficientvit_m0@64": 0.2, "efficientvit_m2@64": 0.4}, tried)
    }
    assert sizes["efficientvit_m2"].over == pytest.approx(0.8 / BUDGET_MS)


def test_a_parent_is_over_by_what_was_measured_in_the_first_precision() -> None:
    bench = Bench(trials=40)
    chooser = in_two_precisions(bench, 0.5)
    whole = Candidate(get_arch("efficientvit_m2").replace(num_classes=5).at(PX), Kind.READY, name="efficientvit_m2@64")
    bench.run(whole)
    bench.trials[1].user_attrs["detail"]["by_precision"] = {"fp32": 1.0, "bf16": 0.55}
    tried = chooser.tried(bench.study())
    found = chooser._parents(choose.latencies_of(tried), tried)
    assert {each.name: each.over for each in found}["efficientvit_m2"] == pytest.approx(1.0 / BUDGET_MS)


def test_networks_from_scratch_are_not_surely_over_the_budget() -> None:
    bench = Bench(families=("sepvit",))
    rng = np.random.default_rng(0)
    found = [counts_of(each.network).macs for each in bench.chooser._scratch(rng)]
    assert len(found) == choose.DRAWN
    assert all(0.3 * (macs / 6e6) ** POWER / GUESSED <= BUDGET_MS for macs in found)
    bench.chooser._request.budget_ms = 1e-3
    assert len(bench.chooser._scratch(rng)) == 1, "the smallest, if nothing fits"


def test_a_limit_of_size_decides_what_is_cut_from_a_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientViT-M1 has 11 MB, which a child of the same latency loses little of."""
    monkeypatch.setattr(choose, "Promise", propose.Promise)
    monkeypatch.setattr(choose, "DRAWN", 24)
    sizes = {}
    for limits in (Limits(), Limits(file_mb=4.0)):
        bench, cut = Bench(trials=20, limits=limits), []
        for _ in range(5):
            candidate = bench.offer()[0]
            bench.run(candidate)
            if candidate.kind == Kind.DERIVED:
                cut.append(4 * counts_of(candidate.network).params / 1e6)
        sizes[limits] = cut
    assert min(sizes[Limits()]) > 7
    assert max(sizes[Limits(file_mb=4.0)]) < 7
    assert min(sizes[Limits(file_mb=4.0)]) <= 4


def test_a_ready_network_that_is_surely_over_a_limit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was measured of another one."""
    monkeypatch.setattr(choose, "Promise", propose.Promise)
    bench = Bench(sampler="random", limits=Limits(file_mb=1.0))
    (first, *_) = bench.offer()
    bench.run(first)
    assert bench.offer() == []
    assert bench.chooser.over_limits == {"efficientvit_m1@64"}
