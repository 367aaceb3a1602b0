"""Paired comparisons against worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from nas.evaluate.pairs import compare, holm, mcnemar


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two networks' answers with these counts."""
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


def test_mcnemar_by_hand() -> None:
    """Of 10 images that one alone gets right, 2 are the first's: twice (1 + 10 + 45) of 1,024 splits."""
    assert mcnemar(*answers(50, 2, 8, 40)) == pytest.approx(112 / 1024)


def test_mcnemar_of_a_textbook() -> None:
    """Agresti, Categorical Data Analysis, approval of a prime minister: 794, 150, 86, 570; z = -4.17, p < 0.0001."""
    found = mcnemar(*answers(794, 150, 86, 570))
    assert 2e-5 < found < 5e-5


def test_networks_that_never_differ() -> None:
    assert mcnemar(*answers(5, 0, 0, 5)) == 1


def test_the_interval_of_a_textbooks_difference() -> None:
    """The same: -0.039 with Wald's interval -0.057 to -0.021; Newcombe's lies within a thousandth."""
    first, second = answers(794, 150, 86, 570)
    (pair,) = compare({"first": first, "second": second})
    assert (pair.both, pair.only_first, pair.only_second, pair.neither) == (794, 150, 86, 570)
    assert pair.difference == pytest.approx(-4.0)
    assert pair.difference_ci == pytest.approx((-5.8, -2.2), abs=0.1)
    assert not pair.tie


def test_a_difference_that_chance_makes_is_a_tie() -> None:
    first, second = answers(50, 2, 8, 40)
    (pair,) = compare({"first": first, "second": second})
    assert pair.tie
    assert pair.difference == pytest.approx(6)
    assert pair.difference_ci[0] < 6 < pair.difference_ci[1]


def test_a_pair_in_the_other_order() -> None:
    first, second = answers(50, 2, 9, 40)
    (pair,), (other,) = compare({"a": first, "b": second}), compare({"b": second, "a": first})
    turned = pair.turned()
    assert (turned.first, turned.only_first, turned.difference) == (other.first, other.only_first, other.difference)
    assert turned.difference_ci == pytest.approx(other.difference_ci)


def test_many_pairs_are_corrected() -> None:
    """Holm 1979: the least of three counts thrice, the next twice, and none less than the one before."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []


def test_each_pair_is_compared() -> None:
    first, second = answers(50, 2, 9, 40)
    pairs = compare({"a": first, "b": second, "c": first})
    assert [(each.first, each.second) for each in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs[0].p_adjusted > pairs[0].p
