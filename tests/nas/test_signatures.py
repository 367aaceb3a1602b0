"""Public signatures of the search, of pruning and of quality name records, not untyped documents."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nas

UNTYPED = re.compile(r"\b(dict|Dict|Mapping|MutableMapping)\[str, Any\]")
OVERRIDES = {"infer_relative_search_space", "sample_relative"}
"""Methods of the samplers (`nas.search.sampling`) whose signatures are Optuna's."""


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.expr]]:
    """Annotations of what a module or a public class offers, and its aliases of types, with their names."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            given = [each.annotation for each in every if each is not None]
            yield from ((owner + node.name, each) for each in (*given, node.returns) if each is not None)
        elif isinstance(node, ast.AnnAssign):
            yield owner + ast.unparse(node.target), node.annotation
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            yield owner + ast.unparse(node.targets[0]), node.value


def untyped(source: str) -> list[str]:
    found = public(ast.parse(source).body)
    return [
        name for name, each in found if not name.split(".")[-1].startswith("_") and UNTYPED.search(ast.unparse(each))
    ]


@pytest.mark.parametrize("package", ["search", "prune", "quality"])
def test_public_signatures_hold_no_untyped_document(package: str) -> None:
    files = sorted((Path(nas.__file__).parent / package).glob("**/*.py"))
    assert files
    found = [f"{file.name}: {name}" for file in files for name in untyped(file.read_text())]
    assert [each for each in found if each.split(".")[-1] not in OVERRIDES] == []


def test_the_walk_sees_functions_methods_fields_and_aliases() -> None:
    source = """
from typing import Any
Document = dict[str, Any]
def told(found: Mapping[str, Any]) -> None: ...
def listed() -> list[dict[str, Any]]: ...
def _private(found: dict[str, Any]) -> None: ...
class Row:
    values: dict[str, Any]
    def __init__(self, **options: dict[str, Any]) -> None: ...
    def sized(self, *, by: "int | None" = None) -> dict[str, float]: ...
class _Inner:
    values: dict[str, Any]
"""
    assert untyped(source) == ["Document", "told", "listed", "Row.values"]
