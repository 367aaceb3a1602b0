"""Gives the tests their helpers: under --import-mode=importlib a test cannot import its neighbours by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """The module helpers.py beside this file."""
    spec = importlib.util.spec_from_file_location("vitnas_test_helpers", Path(__file__).with_name("helpers.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
