"""Memory of freed tensors, given back to the system while a model is loaded.

glibc keeps freed blocks of up to 32 MiB in its heap once blocks of that size have been freed: the matrices that a layer
joins to one would stay as holes, a quarter of a rank's share in 8 bits.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache


def give_back() -> None:
    """Gives the pages of freed blocks back to the system, with glibc on Linux; elsewhere nothing happens."""
    if trim := _malloc_trim():
        trim(0)


@lru_cache(1)
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None where the C library has none."""
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
