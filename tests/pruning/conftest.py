"""Gives the tests of pruning the helpers of the tests of search_spaces."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

HELPERS = Path(__file__).parents[1] / "search_spaces" / "helpers.py"


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """The module tests/search_spaces/helpers.py."""
    spec = importlib.util.spec_from_file_location("vitnas_test_helpers", HELPERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are tiny: on a busy machine, waiting for a second thread takes twenty times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
