"""The way to dualparal.kernels and dualparal._C when the package is imported from a source tree.

In the source tree dualparal.kernels lies beside the package, in kernels/, and dualparal._C is there only if it was
built in place (``pip install -e .``). Python meets this when the clone is the current folder after a plain
``pip install .``: the folder ./dualparal comes before the installed package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_KERNELS = _PACKAGE.parent / "kernels"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name == "dualparal.kernels":
            return spec_from_file_location(name, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)])
        if name == "dualparal._C":  # of this tree, or else of the installed copy that ./dualparal hides
            return PathFinder.find_spec(name, [str(_PACKAGE), *(str(Path(entry, "dualparal")) for entry in sys.path)])
        return None


def register() -> None:
    """Makes both importable, before any other way to find them. Does nothing in an installed package."""
    if not (_PACKAGE / "kernels").exists() and (_KERNELS / "__init__.py").exists():
        sys.meta_path.insert(0, _Finder)
