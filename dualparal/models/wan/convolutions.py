"""Convolutions of the VAE by one rule, whatever the process has set for its own."""

from __future__ import annotations

import threading
from typing import Any

import torch


class SteadyConvolutions:
    """A context in which float32 convolutions on a card run in TF32, by algorithms that cuDNN chooses without a race.

    These are torch's defaults, with which diffusers decodes: a process that touched no flag gets the same frames. One
    that switched TF32 off gets them too, as does one that switched ``benchmark`` on, where timings choose and the card
    is waited for. Flags are global to the process and read when a convolution is called: other threads see these while
    any thread is inside, and what a thread sets meanwhile is undone when the last one leaves. No stage is among those
    threads' victims, as the transformer has no convolution.

    Matrix products are left alone: the VAE has none, and stages run theirs while a block is decoded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[Any, bool] = (None, False)

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _get()
                _set(_TF32, benchmark=False)
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _set(*self._before)


# torch 2.9 has a flag per kind of op, and raises where the older one for all kinds is read after one of them was set.
_BY_OP: Any = getattr(torch.backends.cudnn, "conv", None)
_TF32: Any = True if _BY_OP is None else "tf32"


def _get() -> tuple[Any, bool]:
    tf32 = torch.backends.cudnn.allow_tf32 if _BY_OP is None else _BY_OP.fp32_precision
    return tf32, torch.backends.cudnn.benchmark


def _set(tf32: Any, benchmark: bool) -> None:
    if _BY_OP is None:
        torch.backends.cudnn.allow_tf32 = tf32
    else:
        _BY_OP.fp32_precision = tf32
    torch.backends.cudnn.benchmark = benchmark


STEADY = SteadyConvolutions()  # one for the process, as the flags are
