"""What tests of several folders need."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

# A run started in a shell's background inherits an ignored SIGINT; tests that send Ctrl-C to children need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """The module search_spaces/helpers.py: under --import-mode=importlib a test cannot import it by name."""
    path = Path(__file__).parent / "search_spaces" / "helpers.py"
    spec = importlib.util.spec_from_file_location("vitnas_test_helpers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny networks: on a busy machine, waiting for a second thread takes twenty times the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
