"""What a trained search tries next: promising, likely within the budget, never twice, the same for the same seed."""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nas.measure.budget import Limits
from nas.measure.runtime import Settings
from nas.networks import counts
from nas.quality.surrogate import Surrogate, TrainedNetwork, describe
from nas.search import propose
from nas.search.propose import Measured, Proposer
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS, random_params

FAMILY = "shvit"
BUDGET_MS = 1.0


def decode(params: dict):
    return FAMILIES[FAMILY].space.decode({k: v for k, v in params.items() if k != "family"}, 10, 64)


counts_of = functools.cache(counts.counts_of)


def latency(arch) -> float:
    return counts_of(arch).macs / 8e6


def skill(arch) -> float:
    return 50 + 6 * math.log2(counts_of(arch).params / 1e6)


def drawn(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {"family": FAMILY, **random_params(rng)}


def trial(number: int, params: dict) -> SimpleNamespace:
    arch = decode(params)
    features = describe(arch, counts_of(arch)).tolist()
    detail = {
        "digest": arch.digest(),
        "latency_ms": latency(arch),
        "quality_estimate": skill(arch),
        "training": {"features": features, "rungs": {"9": skill(arch)}},
    }
    return SimpleNamespace(
        number=number, params=params, user_attrs={"detail": detail, "feasible": int(latency(arch) <= BUDGET_MS)}
    )


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(propose, "POOL", 16)
    monkeypatch.setattr(propose, "counts_of", counts_of)


@pytest.fixture(scope="module")
def measured() -> list[SimpleNamespace]:
    return [trial(seed, drawn(seed)) for seed in range(16)]


def proposer(measured: list[SimpleNamespace], seed: int | None = 0) -> Proposer:
    def results() -> list[TrainedNetwork]:
        fitting = [t.user_attrs["detail"] for t in measured if t.user_attrs["feasible"]]
        return [
            TrainedNetwork(d["digest"], np.array(d["training"]["features"]), {9: d["quality_estimate"]})
            for d in fitting
        ]

    def review(networks: list) -> list:
        details = [t.user_attrs["detail"] for t in measured]
        skills = {one["digest"]: one["quality_estimate"] for one in details}
        return [SimpleNamespace(value=skills[key]) for key, _ in networks]

    tier = SimpleNamespace(review=review, surrogate=lambda: Surrogate(results(), 9))
    options = SimpleNamespace(
        families=(FAMILY,),
        num_classes=10,
        resolution=64,
        budget_ms=BUDGET_MS,
        seed=seed,
        limits=Limits(),
        settings=Settings(),
        precisions=("fp32",),
    )
    return Proposer(tier, options)


def ask(sampler: Proposer, measured: list[SimpleNamespace], number: int, fixed: bool = False) -> dict:
    study = SimpleNamespace(get_trials=lambda deepcopy: measured)
    asked = SimpleNamespace(number=number, system_attrs={"fixed_params": {}} if fixed else {})
    return sampler.sample_relative(study, asked, sampler.infer_relative_search_space(study, asked))


def test_it_proposes_good_networks_within_the_budget(measured):
    sampler = proposer(measured)
    found = [decode(ask(sampler, measured, number)) for number in range(100, 104)]
    chance = [decode(drawn(seed)) for seed in range(1000, 1030)]
    fitting = [skill(arch) for arch in chance if latency(arch) <= BUDGET_MS]
    assert sum(latency(arch) <= BUDGET_MS for arch in found) >= 3
    assert 0 < len(fitting) / len(chance) < 0.6, "chance alone would not do"
    ours = [skill(arch) for arch in found if latency(arch) <= BUDGET_MS]
    assert min(ours) > np.quantile(fitting, 0.6)


def test_the_same_seed_and_number_draw_the_same(measured):
    first = ask(proposer(measured), measured, 7)
    assert ask(proposer(measured), measured, 7) == first
    assert any(ask(proposer(measured), measured, number) != first for number in (8, 9))


def test_nothing_is_proposed_twice(measured):
    known = list(measured)
    sampler = proposer(known)
    first = ask(sampler, known, 7)
    known.append(trial(7, first))
    assert decode(ask(sampler, known, 7)).digest() != decode(first).digest()


def test_enqueued_networks_and_the_first_trials_need_no_thought(measured):
    assert ask(proposer(measured), measured, 1, fixed=True) == {}
    assert ask(proposer([]), measured[:2], 1) == {}


def test_variations_stay_near_and_within_range(measured):
    sampler = proposer(measured)
    rng = np.random.default_rng(0)
    params = drawn(0)
    for _ in range(50):
        varied = propose.varied(FAMILY, params, rng)
        changed = [name for name in PARAMETERS if varied[name] != params[name]]
        assert len(changed) <= 4
        assert all(abs(varied[name] - params[name]) <= 2 and 0 <= varied[name] < LEVELS for name in changed)
        assert set(changed) <= set(FAMILIES[FAMILY].space.options)
    found = sampler._pool([Measured.of(t) for t in measured], rng)
    assert len(found) == propose.POOL
    best = max(
        (t for t in measured if t.user_attrs["feasible"]), key=lambda t: t.user_attrs["detail"]["quality_estimate"]
    )

    def changes(params: dict) -> int:
        return sum(params[name] != best.params[name] for name in PARAMETERS)

    assert min(changes(each.levels) for each in found) <= 4, "the best is varied too"


def test_a_machine_that_becomes_slower_misleads_no_race(measured):
    """Latencies count relative to the reference network in the same rounds, the budget to what it takes now."""
    tier, options = proposer(measured)._tier, proposer(measured)._request

    def promises(speeds: list[float]) -> list[float]:
        ones = [
            replace(each, latency_ms=each.latency_ms * slower, reference_ms=slower)
            for each, slower in zip(map(Measured.of, measured), speeds, strict=True)
        ]
        promise = propose.Promise(ones, tier.surrogate(), options)
        return [promise.of(describe(arch, counts_of(arch))) for arch in map(decode, map(drawn, range(100, 108)))]

    steady = promises([2.0] * 16)
    assert promises([1.0] * 8 + [2.0] * 8) == pytest.approx(steady)
    assert promises([1.0] * 16) != pytest.approx(steady), "half as slow, more meets the budget"
