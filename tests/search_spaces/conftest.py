"""Gives the tests their helpers: under --import-mode=importlib a test cannot import its neighbours by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """The module helpers.py beside this file."""
    spec = importlib.util.spec_from_file_location("vitnas_test_helpers", Path(__file__).with_name("helpers.py"))
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
