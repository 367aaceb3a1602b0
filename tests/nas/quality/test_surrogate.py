"""The surrogate learns from trainings of any length, knows its error, and helps on what it was not shown."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from nas.networks.counts import counts_of
from nas.networks.timm_network import TimmNetwork
from nas.quality.candidate import Candidate, Kind
from nas.quality.surrogate import (
    DESCRIBED,
    KINDS,
    LEAST,
    WIDE,
    Surrogate,
    TrainedNetwork,
    describe,
    describe_candidate,
    kind_of,
)
from search_spaces import get_arch, list_models
from search_spaces.registry import FAMILIES

LAST = 9


def law(x: np.ndarray, epochs: int) -> float:
    """An invented accuracy: size, one shape that is best in the middle, and epochs."""
    return 40 + 4 * x[0] - 6 * (x[1] - 0.5) ** 2 + 5 * np.log(epochs / LAST)


def networks(count: int, seed: int, noise: float = 0.3, short: bool = False) -> list[TrainedNetwork]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        x = rng.uniform(0, 1, 4)
        rungs = (1, 3) if short and i % 2 else (1, 3, LAST)
        found.append(TrainedNetwork(str(i), x, {e: law(x, e) + noise * rng.standard_normal() for e in rungs}))
    return found


def tau_of(surrogate: Surrogate, others: list[TrainedNetwork]) -> float:
    found = [surrogate.predict(one.features).value for one in others]
    return kendalltau(found, [law(one.features, LAST) for one in others]).statistic


def test_predicts_what_it_has_not_seen():
    others = networks(40, seed=1, noise=0)
    surrogate = Surrogate(networks(24, seed=0), LAST, noise=0.3)
    assert tau_of(surrogate, others) > 0.8
    misses = [abs(surrogate.predict(one.features).value - law(one.features, LAST)) for one in others]
    assert np.mean(misses) < 0.6


def test_short_trainings_count():
    others = networks(40, seed=1, noise=0)
    some = networks(24, seed=0, short=True)
    only_long = [one for one in some if LAST in one.rungs]
    assert tau_of(Surrogate(some, LAST), others) > tau_of(Surrogate(only_long, LAST), others) - 0.02
    short = next(one for one in some if LAST not in one.rungs)
    found = Surrogate(some, LAST).predict(short.features)
    assert abs(found.value - law(short.features, LAST)) < 1.5, "the last rung, not the one it was trained to"
    assert found.value > max(short.rungs.values())


def test_error_covers_the_misses():
    surrogate = Surrogate(networks(24, seed=0), LAST, noise=0.3)
    found = [(surrogate.predict(one.features), one) for one in networks(60, seed=2)]
    inside = [abs(each.value - one.rungs[LAST]) <= 2 * each.error for each, one in found]
    assert 0.8 < np.mean(inside) <= 1
    far = surrogate.predict(np.array([30.0, -20, 9, 9]))
    assert far.error > 3 * surrogate.predict(np.full(4, 0.5)).error


def test_held_out_error_is_that_of_networks_left_out():
    some = networks(16, seed=3)
    error, tau = Surrogate(some, LAST).held_out()
    again = []
    for one in some:
        rest = Surrogate([other for other in some if other is not one], LAST)
        again.append(abs(rest.predict(one.features).value - one.rungs[LAST]))
    assert error == pytest.approx(np.mean(again), rel=0.5), "fitted anew for every network left out"
    assert error > 1.2 * np.mean([abs(Surrogate(some, LAST).predict(o.features).value - o.rungs[LAST]) for o in some])
    assert 0 < tau <= 1


def test_little_to_learn_from():
    assert Surrogate([], LAST).predict(np.zeros(4)).error == WIDE
    some = networks(LEAST - 1, seed=0)
    found = Surrogate(some, LAST).predict(np.zeros(4))
    assert found.error == WIDE
    assert found.value == pytest.approx(np.mean([max(one.rungs.values()) for one in some]))
    assert Surrogate(some, LAST).held_out() is None
    same = [TrainedNetwork(str(i), np.zeros(4), {LAST: 50.0}) for i in range(4)]
    assert Surrogate(same, LAST).predict(np.zeros(4)).value == pytest.approx(50)
    assert Surrogate(same, LAST).held_out() == (pytest.approx(0, abs=1e-6), None), "JSON has no NaN"


def test_features_tell_published_networks_apart():
    rows = {}
    for name in list_models():
        arch = get_arch(name)
        found = describe(arch, counts_of(arch))
        assert np.isfinite(found).all()
        rows[name] = tuple(found)
    equal = {name for name, row in rows.items() if list(rows.values()).count(row) > 1}
    assert all("keep" in name for name in equal), "fused and dropped tokens are the same network but for the fusing"


def of_kind(kind: Kind, name: str, size: float, rungs: dict[int, float]) -> TrainedNetwork:
    described = np.zeros(DESCRIBED + len(FAMILIES))
    described[0] = size
    return TrainedNetwork(name, np.append(described, [float(kind == each) for each in KINDS]), rungs)


def test_each_kind_gains_what_its_own_trainings_show():
    """Ready networks gain 2 from the probe to the end, derived ones 10; a figure of 50 promises so much."""
    some = [of_kind(Kind.READY, f"r{i}", i, {0: 44.0 + i, LAST: 46.0 + i}) for i in range(6)]
    some += [of_kind(Kind.DERIVED, f"d{i}", i, {0: 36.0 + i, LAST: 46.0 + i}) for i in range(6)]
    for kind, gain in ((Kind.READY, 2), (Kind.DERIVED, 10)):
        one = of_kind(kind, "new", 5.5, {0: 50.0})
        found = Surrogate([*some, one], LAST).predict(one.features, one.key)
        assert found.value == pytest.approx(50 + gain, abs=2.5)


def test_rung_0_tells_alike_networks_apart():
    """A figure at rung 0 promises half of itself, which the size does not tell."""
    rng = np.random.default_rng(0)
    starts = rng.uniform(30, 50, 20)
    some = [of_kind(Kind.READY, str(i), i / 100, {0: top1, LAST: top1 / 2 + 40}) for i, top1 in enumerate(starts)]
    high, low = (of_kind(Kind.READY, name, size, {0: top1}) for name, size, top1 in (("a", 0.5, 48), ("b", 0.51, 32)))
    surrogate = Surrogate([*some, high, low], LAST)
    assert surrogate.predict(high.features, high.key).value > surrogate.predict(low.features, low.key).value + 4
    unseen = of_kind(Kind.READY, "", 0.5, {}).features  # as one that was trained, cut from another parent
    assert surrogate.predict(unseen).value == pytest.approx(np.mean(starts) / 2 + 40, abs=1.5), "the mean stands in"


def test_networks_that_an_older_vitnas_described_count():
    """They lack the kind: they were from scratch."""
    new = [of_kind(Kind.SCRATCH, str(i), i, {LAST: 40.0 + i}) for i in range(8)]
    old = [TrainedNetwork(each.key, each.features[: -len(KINDS)], each.rungs) for each in new[:4]]
    mixed, alone = Surrogate([*old, *new[4:]], LAST), Surrogate(old, LAST)
    assert mixed.predict(new[5].features).value == pytest.approx(Surrogate(new, LAST).predict(new[5].features).value)
    assert alone.predict(new[2].features).value == pytest.approx(alone.predict(old[2].features).value)
    assert kind_of(old[0].features) == Kind.SCRATCH
    assert kind_of(of_kind(Kind.DERIVED, "", 1, {}).features) == Kind.DERIVED


def test_a_network_of_timm_is_described_without_its_shape():
    network = TimmNetwork("lcnet_050", 64, 10)
    found = describe_candidate(Candidate(network, Kind.READY), counts_of(network))
    arch = get_arch("efficientvit_m0")
    assert np.isfinite(found).all()
    assert found.shape == describe_candidate(Candidate(arch), counts_of(arch)).shape
    assert not found[DESCRIBED : DESCRIBED + len(FAMILIES)].any(), "of none of the families"
    assert kind_of(found) == Kind.READY


def test_the_parent_is_told_apart():
    """A network that has nearly all of its parent is another candidate than one that has a third of a larger one."""
    arch = get_arch("efficientvit_m0")
    found = [
        describe_candidate(Candidate(arch, Kind.DERIVED, name), counts_of(arch))
        for name in ("efficientvit_m1", "efficientvit_m2")
    ]
    shares = [counts_of(arch).macs / counts_of(get_arch(f"efficientvit_m{i}")).macs for i in (1, 2)]
    assert np.exp2([each[-1] for each in found]) == pytest.approx(shares)
    assert describe_candidate(Candidate(arch, Kind.READY), counts_of(arch))[-1] == 0
    assert kind_of(found[0]) == Kind.DERIVED
