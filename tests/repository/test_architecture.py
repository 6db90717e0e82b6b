"""Who may import whom: the table of docs/architecture.md as data, held against every import of the tree.

Imports inside functions and under TYPE_CHECKING count like all others, and so do names of our modules in strings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
MAX_FILE, MAX_FUNCTION = 400, 80  # lines; of a function without its signature, which is a list of names

# From the top down: a package imports itself and levels below its own.
LEVELS = [
    {"dualparal"},  # the public names, loaded late
    {"from_source"},  # where the rest is found
    {"cli"},
    {"hosts", "server"},
    {"workers"},
    {"engine"},
    {"planning"},
    {"runtime"},
    {"decoding"},
    {"reference"},
    {"checkpoint"},
    {"models"},
    {"sampling"},
    {"distributed"},
    {"trace"},
    {"kernels"},
    {"schedule"},
    {"launch"},
    {"config", "device", "io", "version", "_C"},
]
TORCH = ("torch", "diffusers", "transformers", "dualparal.kernels")  # what makes a start slow
FAMILY = r"models\.\w+(?=\.)"  # a folder inside models/
NEVER = {  # beside what lies above: by whom, and what
    "engine": ("dualparal.launch",),
    "planning": ("dualparal.runtime", "dualparal.distributed"),
    "planning(?!.measured)": TORCH,
    "reference": ("dualparal.distributed", "dualparal.runtime", "dualparal.schedule(?!.layout)"),
    "checkpoint": ("dualparal.models",),
    "decoding": ("dualparal.runtime",),
    r"models\.(family|registry|folder|defaults|sizes|headers|transformer_header|\w+\.sizes)": TORCH,
    "schedule": TORCH,
    "launch": (*TORCH, "dualparal.schedule"),
    "config": TORCH,
    "kernels": ("dualparal(?!.kernels|._C)",),
    "(?!kernels)": ("dualparal.kernels.accuracy", "pytest", "hypothesis", "tests", "bench", "tools"),
}


def modules(root: Path) -> dict[str, Path]:
    """All modules by name. kernels/ is dualparal.kernels."""
    found = {}
    for path in [*(root / "dualparal").rglob("*.py"), *(root / "kernels").rglob("*.py")]:
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts if parts[0] == "dualparal" else ("dualparal", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def level(module: str) -> int:
    name = package(module)
    return next((number for number, names in enumerate(LEVELS) if name in names), -1)


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, and of our modules that it names in a string."""
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(r"(dualparal(?:\.\w+)+)(?::\w+)?", node.value)
            names = [named[1]] if named else []
        for name in names:
            while name.startswith("dualparal.") and name not in known and name != "dualparal._C":
                name = name.rpartition(".")[0]  # a function or a class of that module
            if name != module:
                yield node.lineno, name  # type: ignore[attr-defined]


def wrong_arrows(root: Path) -> list[str]:
    known = modules(root)
    strangers = {path.stem for folder in ("tests", "bench", "tools") for path in (root / folder).rglob("*.py")}
    found = []
    for module, path in known.items():
        inside = module.partition(".")[2]
        for line, name in imports(module, path, known):
            banned = [what for who, targets in NEVER.items() if re.match(who, inside) for what in targets]
            family = re.match(rf"dualparal\.({FAMILY})", name)
            if (
                (
                    name.partition(".")[0] == "dualparal"
                    and package(name) != package(module)
                    and level(name) <= level(module)
                )
                or any(re.match(rf"{what}(\.|$)", name) for what in banned)
                or name in strangers
                or (family and module != "dualparal.models.registry" and not inside.startswith(family[1] + "."))
            ):
                found.append(f"{path.relative_to(root)}:{line}: {module} -> {name}")
    return found + [f"{module} is in no package of the table" for module in known if level(module) < 0]


def circle(root: Path) -> list[str]:
    known = modules(root)
    graph = {module: {name for _, name in imports(module, path, known)} for module, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def too_long(root: Path) -> list[str]:
    found = []
    for path in (root / "dualparal").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_FILE:
            found.append(f"{path.relative_to(root)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                if lines > MAX_FUNCTION:
                    found.append(f"{path.relative_to(root)}: {node.name} has {lines} lines")
    return found


def test_no_arrow_turns_upward() -> None:
    assert wrong_arrows(ROOT) == []


def test_no_circle() -> None:
    assert circle(ROOT) == []


def test_no_file_holds_two_jobs_and_no_function_is_long() -> None:
    assert too_long(ROOT) == []


GOOD = {
    "dualparal/__init__.py": "",
    "dualparal/cli/main.py": "def main():\n    from dualparal.engine.run import Run",
    "dualparal/engine/run.py": "from dualparal.schedule import actions\nfrom dualparal.models.registry import FAMILIES",
    "dualparal/planning/measured.py": "import torch",
    "dualparal/reference.py": "from dualparal.schedule.layout import Layout",
    "dualparal/models/registry.py": "FAMILIES = {'wan': 'dualparal.models.wan.transformer:Spec'}",
    "dualparal/models/wan/transformer.py": "import torch\nfrom dualparal.models.wan.text import encode",
    "dualparal/models/wan/text.py": "encode = print",
    "dualparal/schedule/actions.py": "",
    "dualparal/schedule/layout.py": "",
    "kernels/op/__init__.py": "from .. import backend",
    "kernels/backend.py": "from dualparal import _C",
    "bench/record.py": "",
}


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("dualparal/schedule/late.py", "def f():\n    from dualparal.engine.run import Run"),
        ("dualparal/schedule/typed.py", "if TYPE_CHECKING:\n    from dualparal.cli import main"),
        ("dualparal/schedule/slow.py", "import torch.nn as nn"),
        ("dualparal/schedule/indirect.py", "from dualparal.kernels.op import op"),
        ("dualparal/config/video.py", "from dualparal.io.files import whole_file"),
        ("dualparal/planning/cost.py", "def f():\n    import torch"),
        ("dualparal/planning/run.py", "import dualparal.distributed.mesh"),
        ("dualparal/engine/late.py", "from dualparal.launch import process"),
        ("dualparal/engine/family.py", "from dualparal.models.wan.transformer import Spec"),
        ("dualparal/engine/string.py", "import_module('dualparal.models.wan.text')"),
        ("dualparal/models/files.py", "from dualparal.models.wan import text"),
        ("dualparal/models/other/vae.py", "from dualparal.models.wan.text import encode"),
        ("dualparal/checkpoint/files.py", "from dualparal.models import registry"),
        ("dualparal/reference.py", "from dualparal.schedule.actions import Op"),
        ("dualparal/runtime/version.py", "from dualparal import __version__"),
        ("dualparal/runtime/checked.py", "from dualparal.kernels.accuracy import rms"),
        ("dualparal/cli/rows.py", "import record"),
        ("kernels/op/config.py", "from dualparal.config import blocks"),
        ("kernels/op/relative.py", "from ...config import blocks"),
        ("dualparal/loose.py", ""),
    ],
)
def test_a_planted_arrow_is_found(tmp_path: Path, file: str, code: str) -> None:
    for name, text in {**GOOD, "kernels/accuracy.py": "", "dualparal/config/blocks.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert wrong_arrows(tmp_path) == circle(tmp_path) == too_long(tmp_path) == []
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    (found,) = wrong_arrows(tmp_path)
    assert file in found or "dualparal.loose" in found


def test_a_planted_circle_and_a_long_function_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "dualparal" / "io"
    folder.mkdir(parents=True)
    (folder / "one.py").write_text("from dualparal.io.two import f")
    (folder / "two.py").write_text("def f():\n    from dualparal.io import one\n" + "    f()\n" * 400)
    assert wrong_arrows(tmp_path) == []
    assert set(circle(tmp_path)) == {"dualparal.io.one", "dualparal.io.two"}
    assert too_long(tmp_path) == ["dualparal/io/two.py: 402 lines", "dualparal/io/two.py: f has 401 lines"]
