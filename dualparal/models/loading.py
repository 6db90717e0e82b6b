"""Loading, one thread at a time: while libraries load they change what belongs to the whole process.

diffusers and transformers replace methods of torch's modules and the default dtype meanwhile, so that a module which
another thread builds comes out without its tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_LOADING = threading.RLock()
_Args = ParamSpec("_Args")
_Found = TypeVar("_Found")


def one_at_a_time(load: Callable[_Args, _Found]) -> Callable[_Args, _Found]:
    """A function that builds modules, made to wait until no other thread is in one like it."""

    @wraps(load)
    def locked(*args: _Args.args, **kwargs: _Args.kwargs) -> _Found:
        with _LOADING:
            return load(*args, **kwargs)

    return locked
