"""Times as people type them."""

import pytest

from nas.units import parse_budget


@pytest.mark.parametrize("text", ["2ms", "2000us", "2000µs", "2000 μs", "0.002s"])
def test_a_budget_in_every_unit(text: str) -> None:
    assert parse_budget(text) == pytest.approx(2.0)
