"""Ops of the VAE that torch is slow at on the CPU, done another way with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dualparal.models.wan import columns, norms


class CpuOps(TorchFunctionMode):
    """A context in which this thread's small convolutions are ``columns``', and its norms over channels ``norms``'.

    Those of float32 on the CPU that need no gradient, each where its module says so; all others are torch's.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv3d and not kwargs and len(args) == 7 and columns.is_slow(*args):
            return columns.by_columns(*args[:3])
        if func is F.normalize and len(args) == 1 and norms.is_slow(*args, kwargs["p"], kwargs["dim"], kwargs["out"]):
            return norms.normalized(*args, kwargs["eps"])
        return func(*args, **kwargs)
