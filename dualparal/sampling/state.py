"""What of a block outlives a run: its latents, and what its sampler remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class BlockState:
    """A block between two steps: latents [1, C, F, H, W] float32, and what its sampler remembers."""

    latents: torch.Tensor
    sampler: Mapping[str, Any]
