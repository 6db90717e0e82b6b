"""The environment variables of dualparal.kernels, for debugging and for machines without a home: read here only.

| variable | meaning |
|---|---|
| DUALPARAL_ATTENTION_BACKEND | what ``backend="auto"`` of attention means in this process |
| DUALPARAL_CACHE_ROOT | folder of what is measured once per machine; default: the user's cache folder |
"""

import os
import sys
from pathlib import Path

ATTENTION_BACKEND = "DUALPARAL_ATTENTION_BACKEND"
CACHE_ROOT = "DUALPARAL_CACHE_ROOT"


def attention_backend() -> str:
    """The name asked for, or an empty string."""
    return os.environ.get(ATTENTION_BACKEND, "").strip()


def cache_root() -> Path:
    """The folder, which may not exist yet.

    Raises:
        ValueError: there is neither the variable nor a home directory.
    """
    if root := os.environ.get(CACHE_ROOT, "").strip():
        return Path(root)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise ValueError(f"there is no home directory for a cache: set {CACHE_ROOT} to a folder") from None
    return base / "dualparal"
