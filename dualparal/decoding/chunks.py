"""The values that a consumer gets: finished blocks and the progress of the run; and an error for broken blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class NonFiniteError(ArithmeticError):
    """NaN or infinity in latents or frames; names the block, and the place in which it first appeared."""


@dataclass(frozen=True)
class Progress:
    """The progress of a run, all of its videos together.

    Attributes:
        blocks, frames: given out so far, those before a resumed run among them; frames are pixel frames.
        total_blocks, total_frames: at the end; None: endless.
        seconds: time since the run began to work.
        first: seconds until the first chunk was ready.
        bubble: share of the time in which stage 0 ran no unit, 0 to 1.
    """

    blocks: int
    frames: int
    total_blocks: int | None
    total_frames: int | None
    seconds: float
    first: float
    bubble: float


@dataclass(frozen=True)
class Chunk:
    """One finished block.

    Attributes:
        block, video: their indices, from 0 on; a block's is that in its video.
        start_frame: index of its first pixel frame in the video.
        frames: as ``output_type`` says, without a batch axis: "np" float32 [F, H, W, 3] in [0, 1], "uint8" bytes of
            that shape, 0 to 255, "pt" [F, 3, H, W] in [0, 1], "pil" a list of F images; None for "latent".
        latents: [1, C, f, h, w] float32, on the engine's device; those beyond the end of the video are cut off.
        progress: the run's, with this block.
    """

    block: int
    start_frame: int
    frames: Any
    latents: torch.Tensor
    progress: Progress
    video: int = 0
