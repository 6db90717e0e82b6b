"""Docstrings that can be read alone: each begins with a noun or a verb, and none asks a question."""

from __future__ import annotations

import ast
import re

import pytest

from places import ROOT

# First words of clauses without a head ("What is ...", "Of each ...").
WORDS = {"What", "How", "Whether", "Where", "Which", "Who", "When", "So", "Of", "As"}
QUOTED = re.compile(r"(`+).*?\1", re.DOTALL)


def faults(source: str, file: str) -> list[str]:
    """The docstrings of a module that break the rule, each as "file:line name: first line"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        if re.split(r"\W", text, maxsplit=1)[0].capitalize() in WORDS or "?" in QUOTED.sub("", text):
            name = "module" if isinstance(node, ast.Module) else node.name
            found.append(f"{file}:{node.body[0].lineno} {name}: {text.splitlines()[0]}")
    return found


def test_docstrings_begin_with_a_head_and_ask_nothing() -> None:
    found, files = [], 0
    for folder in ("dualparal", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT)
            found += faults(path.read_text(encoding="utf-8"), str(file))
            files += 1
    assert files > 120, "the folders have moved"
    assert not found, "begin with a noun or a verb, and ask nothing:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""What is kept."""\n', ["a.py:1 module: What is kept."]),
        ('def f():\n    """Whether it fits.\n\n    More.\n    """\n', ["a.py:2 f: Whether it fits."]),
        (
            'class A:\n    """Of a video."""\n\n    async def g(self):\n        """so many."""\n',
            ["a.py:2 A: Of a video.", "a.py:5 g: so many."],
        ),
        ('def f():\n    """A sum. Is it large?"""\n', ["a.py:2 f: A sum. Is it large?"]),
        ('def f():\n    """Matches ``a?`` and `b?`."""\n', []),
        ('def f():\n    """Whatever is left, as a list. What is not stays."""\n', []),
        ('def f():\n    """Asks for more."""\n    return "What?"\n', []),
    ],
)
def test_the_rule_on_planted_docstrings(source: str, found: list[str]) -> None:
    assert faults(source, "a.py") == found
