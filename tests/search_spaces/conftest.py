"""Every test of this folder runs on one thread."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """Ask for the fixture of tests/conftest.py."""
