"""Gives the tests of pruning the helpers of the tests of search_spaces."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HELPERS = Path(__file__).parents[1] / "search_spaces" / "helpers.py"


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """The module tests/search_spaces/helpers.py."""
    spec = importlib.util.spec_from_file_location("vitnas_test_helpers", HELPERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
