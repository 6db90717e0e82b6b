"""What a consumer gets: finished blocks, and how far the run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Progress:
    """How far a run is, all of its videos together. Totals are None while it is endless."""

    blocks: int
    frames: int
    total_blocks: int | None
    total_frames: int | None
    seconds: float
    first: float  # seconds until the first chunk was ready
    bubble: float  # share of the time in which stage 0 ran no unit


@dataclass(frozen=True)
class Chunk:
    """One finished block.

    Attributes:
        video, block: their indices.
        start_frame: index of its first pixel frame in the video.
        frames: as ``output_type`` says, without a batch axis: "np" float32 [F, H, W, 3] in [0, 1], "uint8" the same
            in [0, 255], "pt" [F, 3, H, W] in [0, 1], "pil" a list; None for "latent".
        latents: [1, C, f, h, w] float32, on the engine's device.
    """

    block: int
    start_frame: int
    frames: Any
    latents: torch.Tensor
    progress: Progress
    video: int = 0
