"""The part of a block that outlives a run: its latents, and its sampler's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class BlockState:
    """A block between two steps.

    Attributes:
        latents: [1, C, F, H, W] float32.
        sampler: the memory of its sampler (``BlockSampler.state``).
        velocities: those that later ones are extrapolated from (``StepPlan.known``), oldest first, as ``latents``: of
            the conditional branch, and the unconditional branch's less these.
    """

    latents: torch.Tensor
    sampler: Mapping[str, Any]
    velocities: Sequence[Sequence[torch.Tensor]] = ()
