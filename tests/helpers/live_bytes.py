"""Bytes of the tensors that live at once, counted op by op on the CPU."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context that counts the storages that ops make, from the first that holds a tensor to the last.

    Attributes:
        now: bytes that live.
        peak: the most of them after an op; set it back to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                name, size = storage._cdata, storage.nbytes()
                self.now += 0 if self._holders[name] else size
                self._holders[name] += 1
                weakref.finalize(tensor, self._drop, name, size)
        self.peak = max(self.peak, self.now)
        return made

    def _drop(self, name: int, size: int) -> None:
        self._holders[name] -= 1
        self.now -= 0 if self._holders[name] else size
