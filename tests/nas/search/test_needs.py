"""Memory and file size foretold from parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nas.measure.budget import Limits
from nas.search.needs import Need, Needs

SIZES = (0.6, 2.0, 5.0, 17.0, 30.0)
"""Millions of parameters."""
FITTING = math.log(0.5)


def chances(needs: Needs, *params_m: float) -> list[float]:
    return [float(each) for each in needs.chances(np.array(params_m))]


def test_without_limits_everything_fits() -> None:
    assert chances(Needs(Limits(), "fp32"), 1.0, 1e6) == [0.0, 0.0]


@pytest.mark.parametrize(("precision", "most"), [("fp32", 4.0), ("fp16", 8.0), ("int8", 16.0)])
def test_a_file_s_size_is_guessed_by_its_precision(precision: str, most: float) -> None:
    below, above = chances(Needs(Limits(file_mb=16.0), precision), 0.9 * most, 1.1 * most)
    assert below > FITTING > above


def test_what_is_measured_makes_it_sure() -> None:
    measured = [Need(size, 1.5 + 11 * size, 4 * size + 0.3) for size in SIZES]
    for limits in (Limits(memory_mb=1.5 + 11 * 8.0), Limits(file_mb=4 * 8.0 + 0.3)):
        sure = chances(Needs(limits, "fp32", measured), 7.0, 9.0)
        assert sure[0] > math.log(0.99)
        assert sure[1] < math.log(0.01)
        few = chances(Needs(limits, "fp32", measured[:2]), 7.0, 9.0)
        assert few[0] > FITTING > few[1] > sure[1]


def test_both_limits_count_and_figures_that_were_not_read_do_not() -> None:
    one = chances(Needs(Limits(memory_mb=40.0), "fp32"), 2.0)[0]
    other = chances(Needs(Limits(file_mb=9.0), "fp32"), 2.0)[0]
    unread = [Need(2.0, None, None)] * 9
    assert chances(Needs(Limits(40.0, 9.0), "fp32", unread), 2.0)[0] == pytest.approx(one + other)


def test_networks_that_are_all_alike_tell_a_share() -> None:
    needs = Needs(Limits(file_mb=10.0), "fp32", [Need(2.0, None, 8.0)] * 5)
    below, above = chances(needs, 2.4, 2.6)
    assert below > FITTING > above
