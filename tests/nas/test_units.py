"""Times as people type them."""

import pytest

from nas.errors import UserError
from nas.units import listed, parse_budget, parse_size


@pytest.mark.parametrize("text", ["2ms", "2000us", "2000µs", "2000 μs", "0.002s"])
def test_a_budget_in_every_unit(text: str) -> None:
    assert parse_budget(text) == pytest.approx(2.0)


def test_names_beyond_a_few_are_counted():
    assert listed("ab") == "a, b"
    assert listed(iter("abcde")) == "a, b, c and 2 more"
    assert listed("abc", 1) == "a and 2 more"


@pytest.mark.parametrize(("text", "mb"), [("64MB", 64.0), ("1.5 gb", 1500.0), ("800KB", 0.8), ("4MiB", 4.194304)])
def test_a_size_in_every_unit(text: str, mb: float) -> None:
    assert parse_size("--size-budget", text) == pytest.approx(mb)


@pytest.mark.parametrize("text", ["64", "MB", "0MB", "-1MB", "4 parsecs"])
def test_a_size_without_a_unit_is_none(text: str) -> None:
    with pytest.raises(UserError, match=rf"^--size-budget '{text}' is not a size: write it like 64MB, 1.5GB or 800KB$"):
        parse_size("--size-budget", text)
