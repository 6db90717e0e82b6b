"""The layout of the tests: names that docs can cite, no test that needs another, no folder of ours in the way."""

from __future__ import annotations

import ast
import sys
from collections import Counter

from places import TESTS


def test_names_are_unique_and_no_test_imports_another() -> None:
    paths = sorted(TESTS.rglob("*.py"))
    tests = Counter(path.stem for path in paths if path.stem.startswith("test_"))
    assert len(tests) > 40 and set(tests.values()) == {1}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {*tests, "conftest", "tests"}, path


def test_the_folder_kernels_is_out_of_reach() -> None:
    """A bare ``import kernels`` would find tests/kernels in place of the package that diffusers looks for."""
    assert not list(TESTS.rglob("__init__.py"))
    assert str(TESTS) not in sys.path
