"""The surrogate learns from trainings of any length, knows its error, and helps on what it was not shown."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from nas.networks.counts import counts_of
from nas.quality.surrogate import LEAST, WIDE, Surrogate, TrainedNetwork, describe
from search_spaces import get_arch, list_models

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


def test_features_tell_published_networks_apart():
    rows = {}
    for name in list_models():
        arch = get_arch(name)
        found = describe(arch, counts_of(arch))
        assert np.isfinite(found).all()
        rows[name] = tuple(found)
    equal = {name for name, row in rows.items() if list(rows.values()).count(row) > 1}
    assert all("keep" in name for name in equal), "fused and dropped tokens are the same network but for the fusing"
