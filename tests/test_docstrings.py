"""Docstrings: the examples in them run, and public functions and classes have one."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grounded_sam"
MODULES = sorted(
    ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    if name.startswith("grounded_sam.serve."):
        pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_public_names_are_documented():
    bare = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scopes = [(path.stem, tree.body)]
        scopes += [(node.name, node.body) for node in tree.body if isinstance(node, ast.ClassDef)]
        for scope, body in scopes:
            for node in body:
                named = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
                overload = named and any("overload" in ast.unparse(d) for d in node.decorator_list)
                if named and not overload and not scope.startswith("_") and ast.get_docstring(node) is None:
                    bare.append(f"{path.relative_to(PACKAGE)}: {scope}.{node.name}")
    assert not bare, bare
