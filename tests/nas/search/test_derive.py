"""Networks cut from a parent: within it, and of the size that is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from nas.quality.parents import covers
from nas.quality.trainer import Parent
from nas.search import derive
from nas.search.derive import Cutter, levels_of, reduced, within
from pruning.units import anatomy, equal_scores
from search_spaces import get_arch, table


def parent(name: str, px: int) -> Parent:
    arch = get_arch(name).replace(num_classes=5).at(px)
    rng = np.random.default_rng(0)
    scores = {width: rng.random(values.shape) for width, values in equal_scores(anatomy(arch)).items()}
    return Parent(name, arch, {}, scores)


@pytest.mark.parametrize(("name", "px"), [("efficientvit_m1", 64), ("levit_128s", 64)])
def test_cuts_leave_what_is_asked_for_and_stay_within_the_parent(name: str, px: int, monkeypatch) -> None:
    monkeypatch.setattr(derive, "SHARES", (0.8, 0.5))
    whole = parent(name, px)
    cuts = Cutter(whole).cuts(0.4, 0.9)
    shares = [table(arch).macs() / table(whole.arch).macs() for arch in cuts]
    assert len({arch.digest() for arch in cuts}) >= 4, "what a cut may take makes a difference"
    assert shares == sorted(shares, reverse=True) or max(shares[3:]) < min(shares[:3])
    assert all(share <= wanted for share, wanted in zip(shares, [0.8] * 3 + [0.5] * 3, strict=True))
    assert min(shares) > 0.4
    assert all(covers(whole.arch, arch) and arch.resolution == px and arch.num_classes == 5 for arch in cuts)


def test_a_parent_that_cannot_be_cut_so_far_gives_fewer(monkeypatch) -> None:
    monkeypatch.setattr(derive, "SHARES", (0.8, 0.001))
    assert len(Cutter(parent("levit_128s", 64)).cuts(0, 1)) == len(derive.CUTS)


@pytest.mark.parametrize(
    "name", ["efficientvit_m1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("shvit_s1", "levit_128s"))]
)
def test_variations_stay_within_the_parent(name: str) -> None:
    whole, own, rng = parent(name, 64).arch, levels_of(name), np.random.default_rng(0)
    made = [each for each in (within(whole, [own], rng) for _ in range(60)) if each is not None]
    assert len({arch.digest() for arch, _ in made}) > 15
    assert all(covers(whole, arch) and arch != whole for arch, _ in made)
    assert all(levels["form"] == own["form"] for _, levels in made)
    small = next(levels for arch, levels in made if table(arch).macs() < 0.9 * table(whole).macs())
    again = [each for each in (within(whole, [own, small], rng) for _ in range(60)) if each is not None]
    near = [sum(levels[axis] != small[axis] for axis in small) for _, levels in again]
    assert min(near) <= derive.CHANGES, "a child is varied, too"


def test_a_network_with_fewer_tokens_keeps_all_weights() -> None:
    whole, own, rng = parent("deit_tiny", 64).arch, levels_of("deit_tiny"), np.random.default_rng(0)
    made = [each for each in (reduced(whole, own, rng) for _ in range(30)) if each is not None]
    assert len({arch.digest() for arch, _ in made}) > 15
    assert {table(arch).params() for arch, _ in made} == {table(whole).params()}
    macs = [table(arch).macs() for arch, _ in made]
    assert max(macs) <= table(whole).macs()
    assert min(macs) < 0.8 * table(whole).macs()
