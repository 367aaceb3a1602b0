"""Times as people type them."""

import pytest

from nas.units import listed, parse_budget


@pytest.mark.parametrize("text", ["2ms", "2000us", "2000µs", "2000 μs", "0.002s"])
def test_a_budget_in_every_unit(text: str) -> None:
    assert parse_budget(text) == pytest.approx(2.0)


def test_names_beyond_a_few_are_counted():
    assert listed("ab") == "a, b"
    assert listed(iter("abcde")) == "a, b, c and 2 more"
    assert listed("abc", 1) == "a and 2 more"
