"""Imports between packages run one way, without circles: the contracts of import-linter in pyproject.toml."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports


def test_imports_keep_their_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)  # it silences vitnas's loggers in later tests
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0
