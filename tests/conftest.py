"""What tests of several folders need."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

# Where Python is told to keep no bytecode, each of some hundred processes would compile PyTorch anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Networks are tiny here: waiting for a second thread takes many times the work. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Networks are thousands of small objects: looking through them takes a seventh of the tests' time.
gc.set_threshold(100_000, 20, 20)
# Nothing is fetched, whatever this machine has: tests serve what they need themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("VITNAS_WEIGHTS", None)
os.environ.pop("VITNAS_STORAGE", None)
os.environ["VITNAS_CACHE"] = tempfile.mkdtemp(prefix="vitnas-tests-")  # of fixtures wider than a test
# A run started in a shell's background inherits an ignored SIGINT; tests that send Ctrl-C to children need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)


CACHES = itertools.count()
SEEDS = {"efficientvit": (0, 2), "shvit": (0, 2), "evit": (0, 2)}
"""By family the two random networks of a test that are run by default: those that have attention. Of other families
they are the first two, and three where a test has no family; the others are slow tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            params = item.callspec.params
            seed = params.get("seed")
            default = SEEDS.get(params.get("family"), range(2 if "family" in params else 3))
            if isinstance(seed, int) and seed not in default:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds latencies that another one, or the user, has measured."""
    monkeypatch.setenv("VITNAS_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / str(next(CACHES))))


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """The module search_spaces/helpers.py: under --import-mode=importlib a test cannot import it by name."""
    path = Path(__file__).parent / "search_spaces" / "helpers.py"
    spec = importlib.util.spec_from_file_location("vitnas_test_helpers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
