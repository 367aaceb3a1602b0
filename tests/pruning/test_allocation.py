"""Allocation: what a network costs at any settings, and which settings are chosen within a budget."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import search_spaces
from pruning.allocation import LARGEST, BudgetError, Costs, allocate, larger_size, movable, smaller_size
from pruning.units import KNOB_KINDS, Anatomy, Cut, Knob, Settings, anatomy, cut
from search_spaces import Arch
from search_spaces.registry import FAMILIES

SEEDS = range(6)
METRICS = ("macs", "params")
NORM = re.compile(r"(stages\.\d+\.)?blocks\.\d+\.norm\d?\.\w+")


def price(parts: Anatomy, costs: Costs, settings: Settings) -> float:
    """Cost at these settings, one knob after the other."""
    sizes, gone, total = dict(parts.sizes), set(), costs.base
    for knob in parts.knobs:
        change = settings.get(knob.name, knob.size) - knob.size
        if change == 0:
            continue
        total += costs.difference(knob, change, sizes, gone)
        if knob.kind == "blocks":
            gone.add(knob.width)
        else:
            for name in (knob.width, *knob.follows):
                sizes[name] += change
    return total


def left_norms(parts: Anatomy, done: Cut, metric: str) -> int:
    """Cost of the LayerNorms in front of removed branches, which `Costs` leaves in."""
    child = search_spaces.table(done.arch)
    names = {rename(done, entry.name) for entry in child.entries}
    left = [e for e in parts.table.entries if NORM.fullmatch(e.name) and e.name not in names]
    embeds = child.widths()
    times = [entry.positions if metric == "macs" else int(entry.trainable) for entry in left]
    return sum(embeds[entry.axes[0].name].size * n for entry, n in zip(left, times, strict=True))


def rename(done: Cut, name: str) -> str:
    """The larger network's name of a tensor."""
    for ours, theirs in done.blocks.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def check_costs(family: str, seed: int, helpers: ModuleType) -> None:
    """At random settings, grown, shrunk and removed, `Costs` counts what the table of the network counts."""
    arch = helpers.random_arch(family, seed)
    parts, rng = anatomy(arch), np.random.default_rng(seed)
    scores = {k.width: rng.random((k.rows, parts.sizes.get(k.width, 1))) for k in parts.knobs}
    for _ in range(2):
        settings = {}
        for knob in parts.knobs:
            if rng.random() < 0.6:
                largest = LARGEST * knob.size if knob.grows else knob.size
                settings[knob.name] = int(rng.integers(0, 2) if knob.kind == "blocks" else rng.integers(1, largest + 1))
        done = cut(parts, scores, settings)
        table = search_spaces.table(done.arch)
        for metric in METRICS:
            costs = Costs(parts, metric)
            assert costs.base == getattr(parts.table, metric)()
            left = left_norms(parts, done, metric)
            assert price(parts, costs, settings) == getattr(table, metric)() + left
            assert left == 0 or family in ("evit", "sepvit")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_costs_are_those_of_the_table(family: str, seed: int, helpers: ModuleType) -> None:
    check_costs(family, seed, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_of_very_many_networks(family: str, helpers: ModuleType) -> None:
    for seed in range(100, 300):
        check_costs(family, seed, helpers)


def test_cascade_heads_cost_all_that_goes_with_them(helpers: ModuleType) -> None:
    """A head's projections, its values' columns and its attention products, not just its bias table."""
    subjects = [helpers.subject("efficientvit", seed) for seed in SEEDS]
    knobs = [(s, knob) for s in subjects for knob in s.parts.knobs if knob.from_last and knob.size > 1]
    assert knobs
    for subject, knob in knobs:
        done = cut(subject.parts, subject.scores, {knob.name: 1})
        saved = subject.parts.table.macs() - search_spaces.table(done.arch).macs()
        costs = Costs(subject.parts, "macs")
        assert -costs.difference(knob, 1 - knob.size, subject.parts.sizes, set()) == saved > 0


def test_measured_rates_scale_the_differences(helpers: ModuleType) -> None:
    """A branch also takes what it takes at any width."""
    parts = helpers.subject("levit", 0).parts
    rates = {knob.name: 1e-6 * (i + 1) for i, knob in enumerate(parts.knobs)}
    fixed = {knob.name: 0.25 for knob in parts.knobs if knob.kind == "blocks"}
    assert fixed
    plain, measured = Costs(parts, "macs"), Costs(parts, "macs", rates, base=2.5, fixed=fixed)
    assert measured.base == 2.5
    narrow = {name: (size + 1) // 2 for name, size in parts.sizes.items()}
    for knob, sizes in itertools.product(parts.knobs, (parts.sizes, narrow)):
        wanted = plain.difference(knob, -1, sizes, set()) * rates[knob.name] - fixed.get(knob.name, 0.0)
        assert measured.difference(knob, -1, sizes, set()) == pytest.approx(wanted)
        assert wanted < 0


def test_a_branch_that_takes_time_at_any_width_is_removed(helpers: ModuleType) -> None:
    """By MACs alone the budget is out of reach: what is narrow would save next to nothing."""
    subjects = [helpers.subject("efficientvit", seed) for seed in SEEDS]
    found = max(subjects, key=lambda subject: sum(knob.kind == "blocks" for knob in subject.parts.knobs))
    parts, scores = found.parts, found.scores
    branches = [knob.name for knob in parts.knobs if knob.kind == "blocks"]
    rates = {knob.name: 1e-12 for knob in parts.knobs}
    fixed = dict.fromkeys(branches, 1 / len(branches))
    settings = allocate(parts, scores, Costs(parts, "macs", rates, 1.0, fixed), 0.5, list(KNOB_KINDS), 2)
    gone = [name for name in branches if settings.get(name) == 0]
    assert len(branches) / 2 - 1 <= len(gone) <= len(branches) / 2 + 1
    with pytest.raises(BudgetError):
        allocate(parts, scores, Costs(parts, "macs", rates, 1.0), 0.5, list(KNOB_KINDS), 2)


# Choosing


def true_cost(parts: Anatomy, scores: Mapping[str, np.ndarray], settings: Settings, metric: str) -> int:
    return getattr(search_spaces.table(cut(parts, scores, settings).arch), metric)()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reallocate", [False, True])
def test_the_target_is_met(family: str, reallocate: bool, helpers: ModuleType) -> None:
    """By the table of the network that comes out, in multiples, within the kinds."""
    for seed, metric, share, multiple in ((0, "macs", 0.7, 2), (3, "params", 0.5, 2), (5, "macs", 0.8, 4)):
        subject = helpers.subject(family, seed)
        parts, scores = subject.parts, subject.scores
        costs = Costs(parts, metric)
        floor = minimum(parts, costs, KNOB_KINDS, multiple)
        target = floor + share * (costs.base - floor)
        settings = allocate(parts, scores, costs, target, list(KNOB_KINDS), multiple, reallocate)
        assert true_cost(parts, scores, settings, metric) <= price(parts, costs, settings) <= target
        check_steps(parts, settings, multiple)
        if not reallocate:
            assert not any(settings[knob.name] > knob.size for knob in parts.knobs if knob.name in settings)
            leftover = target - price(parts, costs, settings)
            assert no_step_back_fits(parts, costs, settings, leftover, multiple)


def check_steps(parts: Anatomy, settings: Settings, multiple: int) -> None:
    """Every size that changed is a multiple, in each chunk of a stage's width too; heads and blocks go one by one."""
    knobs = {knob.name: knob for knob in parts.knobs}
    for name, size in settings.items():
        knob = knobs[name]
        assert size != knob.size
        assert size <= (LARGEST if knob.grows else 1) * knob.size
        if knob.kind == "blocks":
            assert size == 0
        elif knob.kind == "heads":
            assert size >= 1
        else:
            assert size % multiple == 0
            assert size > 0


def no_step_back_fits(parts: Anatomy, costs: Costs, settings: Settings, leftover: float, multiple: int) -> bool:
    """Whether what is left of the budget is too little for any one step back."""
    for knob in parts.knobs:
        size = settings.get(knob.name, knob.size)
        if size == knob.size:
            continue
        back = size + 1 if knob.kind in ("heads", "blocks") else min(size + multiple, knob.size)
        if knob.kind not in ("heads", "blocks") and back % multiple and others_changed(parts, settings, knob):
            continue
        if price(parts, costs, {**settings, knob.name: back}) - price(parts, costs, settings) <= leftover:
            return False
    return True


def others_changed(parts: Anatomy, settings: Settings, knob: Knob) -> bool:
    """Whether other chunks of its width have changed."""
    return any(other.width == knob.width and other is not knob and other.name in settings for other in parts.knobs)


def minimum(parts: Anatomy, costs: Costs, kinds: Any, multiple: int) -> float:
    """Cost with every knob of these kinds at its smallest."""
    return price(parts, costs, smallest(parts, kinds, multiple))


def smallest(parts: Anatomy, kinds: Any, multiple: int) -> dict[str, int]:
    settings = {}
    free = movable(parts, kinds, multiple)
    for knob in parts.knobs:
        size = knob.size
        while knob in free and (lower := smaller_size(knob, size, multiple)) is not None:
            size = lower
        settings[knob.name] = size
    return settings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_that_changes_becomes_a_multiple(family: str, helpers: ModuleType) -> None:
    """Of the network that comes out, whole widths as well as what heads divide them into; the others are as before."""
    changed = 0
    for seed, multiple, share in itertools.product((1, 4), (2, 4, 8), (0.6,)):
        parts = anatomy(helpers.random_arch(family, seed))
        scores = lognormal(parts, seed)
        costs = Costs(parts, "macs")
        target = share * costs.base + (1 - share) * minimum(parts, costs, KNOB_KINDS, multiple)
        done = cut(parts, scores, allocate(parts, scores, costs, target, list(KNOB_KINDS), multiple, reallocate=True))
        changed += check_multiples(parts, done, multiple)
    assert changed > 3


def test_a_width_of_odd_chunks_becomes_a_multiple_as_a_whole() -> None:
    """SHViT-S1's last stage has 320 channels, 68 with attention and 252 without: cutting the first alone left 316."""
    parts = anatomy(search_spaces.get_arch("shvit_s1"))
    scores = {k.width: np.ones((k.rows, parts.sizes.get(k.width, 1))) for k in parts.knobs}
    scores["stages.2.embed"][..., :68] = 1e-6
    costs = Costs(parts, "macs")
    done = cut(parts, scores, allocate(parts, scores, costs, 0.99 * costs.base, ["embed"], 8))
    assert check_multiples(parts, done, 8)
    assert search_spaces.table(done.arch).widths()["stages.2.embed"].size < 320
    assert search_spaces.table(done.arch).macs() <= 0.99 * costs.base


def lognormal(parts: Anatomy, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k.width: rng.lognormal(0, 1.5, (k.rows, parts.sizes.get(k.width, 1))) for k in parts.knobs}


def check_multiples(parts: Anatomy, done: Cut, multiple: int) -> int:
    """How many widths have changed, all of them to multiples."""
    before, changed = parts.sizes, 0
    whole = {knob.width for knob in parts.knobs if knob.kind not in ("heads", "blocks")}
    follow = {name for knob in parts.knobs for name in knob.follows}
    for name, width in search_spaces.table(done.arch).widths().items():
        was = rename(done, name)
        if was in whole | follow and width.size != before[was]:
            changed += 1
            assert width.size % multiple == 0, (name, before[was], width.size)
    return changed


@pytest.mark.parametrize("kinds", [["ffn"], ["qk", "v"], ["heads"], ["embed"], ["blocks"], ["ffn", "blocks"]])
def test_only_the_chosen_kinds_change(kinds: list[str], helpers: ModuleType) -> None:
    for family in FAMILIES:
        subject = helpers.subject(family, 6)
        costs = Costs(subject.parts, "params")
        floor = minimum(subject.parts, costs, kinds, 2)
        settings = allocate(subject.parts, subject.scores, costs, (costs.base + floor) / 2, kinds, 2)
        changed = {knob.kind for knob in subject.parts.knobs if knob.name in settings}
        assert changed <= {*kinds}
        assert changed or floor == costs.base


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_budget_that_cannot_be_reached_says_what_can(family: str, metric: str, helpers: ModuleType) -> None:
    subject = helpers.subject(family, 6)
    parts, scores = subject.parts, subject.scores
    costs = Costs(parts, metric)
    for kinds in (["ffn", "qk"], list(KNOB_KINDS)):
        with pytest.raises(BudgetError, match="smallest reachable cost is") as caught:
            allocate(parts, scores, costs, 1.0, kinds, 2)
        settings = smallest(parts, kinds, 2)
        done = cut(parts, scores, settings)
        table = getattr(search_spaces.table(done.arch), metric)()
        assert caught.value.reachable == table + left_norms(parts, done, metric)
        assert "\n" not in str(caught.value)
        assert allocate(parts, scores, costs, caught.value.reachable, kinds, 2)


def test_steps_of_heads_and_branches_are_ones() -> None:
    heads, branch = Knob("a.heads", "heads", 3), Knob("a.ffn", "blocks", 1)
    width, chunk = Knob("a.hidden", "ffn", 20, grows=True), Knob("a.embed", "embed", 6, start=8)
    assert [smaller_size(heads, n, 8) for n in (3, 2, 1)] == [2, 1, None]
    assert [smaller_size(branch, n, 8) for n in (1, 0)] == [0, None]
    assert [smaller_size(width, n, 8) for n in (20, 16, 8)] == [16, 8, None]
    assert smaller_size(chunk, 6, 8) is None
    assert [larger_size(width, n, 8) for n in (20, 24, 32, 40)] == [24, 32, 40, None]
    assert larger_size(heads, 3, 8) is None
    assert larger_size(chunk, 6, 8) is None


# Against the optimum, and with planted importance


def evit(helpers: ModuleType, hidden: tuple[int, int]) -> Arch:
    """Two blocks of one head, 16 q, k and v dims."""
    attn = {"heads": 1, "key_dim": 16, "value_dim": 16, "scale": 0.25}
    blocks = [{"attn": attn, "keep_rate": 1.0, "fuse": False, "ffn": {"hidden": n}} for n in hidden]
    return helpers.random_arch("evit", 0, resolution=32, patch_size=8, embed_dim=16, blocks=blocks)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_within_one_step_of_the_best(seed: int, helpers: ModuleType) -> None:
    """All settings of two FFNs, two q, k and two v widths in steps of four: 4^6 of them."""
    parts, rng = anatomy(evit(helpers, hidden=(16, 16))), np.random.default_rng(seed)
    knobs = [knob for knob in parts.knobs if knob.kind in ("ffn", "qk", "v")]
    assert len(knobs) == 6
    scores = {knob.width: rng.lognormal(0, 1.5, knob.size) for knob in parts.knobs}
    costs = Costs(parts, "macs")
    target = costs.base * rng.uniform(0.75, 0.95)
    settings = allocate(parts, scores, costs, target, ["ffn", "qk", "v"], 4)
    assert price(parts, costs, settings) <= target

    def lost(knob: Knob, size: int) -> float:
        return float(np.sort(scores[knob.width])[: knob.size - size].sum())

    sizes = (4, 8, 12, 16)
    saved = {(k.name, n): -costs.difference(k, n - k.size, parts.sizes, set()) for k in knobs for n in sizes}
    best = min(
        sum(lost(knob, size) for knob, size in zip(knobs, choice, strict=True))
        for choice in itertools.product(sizes, repeat=len(knobs))
        if costs.base - sum(saved[k.name, n] for k, n in zip(knobs, choice, strict=True)) <= target
    )
    ours = {knob.name: settings.get(knob.name, 16) for knob in knobs}
    found = sum(lost(knob, ours[knob.name]) for knob in knobs)
    step = max(lost(k, ours[k.name]) - lost(k, ours[k.name] + 4) for k in knobs if ours[k.name] < 16)
    assert best <= found + 1e-12
    assert found <= best + step + 1e-12


def equal_densities(parts: Anatomy, costs: Costs) -> dict[str, np.ndarray]:
    """Scores by which every unit of every knob is worth its cost."""
    scores = {}
    for knob in parts.knobs:
        saved = -costs.difference(knob, -1, parts.sizes, set())
        size = parts.sizes.get(knob.width, 1)
        scores[knob.width] = np.full((knob.rows, size) if knob.rows > 1 else size, saved / knob.rows, dtype=float)
    return scores


def test_at_the_present_cost_reallocation_moves_what_is_planted(helpers: ModuleType) -> None:
    """From q and k of block 0 and values of block 1, which matter little, to the FFN of block 1, which matters much."""
    parts = anatomy(evit(helpers, hidden=(32, 32)))
    costs, kinds = Costs(parts, "macs"), ["ffn", "qk", "v"]
    scores = equal_densities(parts, costs)
    for poor in ("blocks.0.attn.qk", "blocks.1.attn.v"):
        scores[poor] = scores[poor] * 0.01
    scores["blocks.1.ffn.hidden"] = scores["blocks.1.ffn.hidden"] * 3
    settings = allocate(parts, scores, costs, costs.base, kinds, 4, reallocate=True)
    assert settings["blocks.1.ffn.hidden"] > 32
    assert settings["blocks.0.attn.qk"] < 16
    assert settings["blocks.1.attn.v"] < 16
    assert settings.keys() == {"blocks.1.ffn.hidden", "blocks.0.attn.qk", "blocks.1.attn.v"}
    assert true_cost(parts, scores, settings, "macs") <= costs.base
    assert allocate(parts, scores, costs, costs.base, kinds, 4, reallocate=False) == {}


@pytest.mark.parametrize("metric", METRICS)
def test_equal_densities_move_nothing(metric: str, helpers: ModuleType) -> None:
    parts = anatomy(evit(helpers, hidden=(32, 32)))
    costs = Costs(parts, metric)
    scores = equal_densities(parts, costs)
    assert allocate(parts, scores, costs, costs.base, ["ffn", "qk", "v"], 4, reallocate=True) == {}


def test_growth_that_cannot_be_paid_for_is_taken_back(helpers: ModuleType) -> None:
    """The first FFN would grow from 18 to 24, but the second can give one unit only: both stay."""
    parts = anatomy(evit(helpers, hidden=(18, 9)))
    costs = Costs(parts, "macs")
    scores = equal_densities(parts, costs)
    scores["blocks.1.ffn.hidden"] = scores["blocks.1.ffn.hidden"] * 1e-6
    assert allocate(parts, scores, costs, costs.base, ["ffn"], 8, reallocate=True) == {}
    grown = allocate(parts, scores, costs, costs.base, ["ffn"], 1, reallocate=True)
    assert grown["blocks.0.ffn.hidden"] > 18
    assert grown["blocks.1.ffn.hidden"] < 9


def test_what_a_large_step_leaves_over_is_given_back(helpers: ModuleType) -> None:
    """A branch goes last and saves far more than was missing: the smaller steps before it are undone."""
    parts = anatomy(evit(helpers, hidden=(32, 32)))
    costs = Costs(parts, "macs")
    scores = {knob.width: np.full(parts.sizes.get(knob.width, 1), 1e6) for knob in parts.knobs}
    scores["blocks.0.attn.qk"] = np.full(16, 1e-6)
    scores["blocks.1.ffn"] = np.array(1e-1)
    branch = next(knob for knob in parts.knobs if knob.width == "blocks.1.ffn")
    saved = -costs.difference(branch, -1, parts.sizes, set())
    settings = allocate(parts, scores, costs, costs.base - saved, ["qk", "blocks"], 4)
    assert settings == {"blocks.1.ffn": 0}
