"""Whole videos, joined from the chunks of a stream, as WanPipeline returns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dualparal.config.video import OutputType
from dualparal.decoding.chunks import Chunk
from dualparal.trace.stats import RunStats


@dataclass(frozen=True)
class EngineOutput:
    """What a call returns.

    frames: as WanPipeline's, with an axis of videos in front; None on ranks that do not lead.
    """

    frames: Any
    stats: RunStats | None


def join_chunks(chunks: list[Chunk], kind: OutputType) -> Any:
    """All videos of a run as one object.

    Args:
        chunks: one at least, those of each video in order.
        kind: their output type: "np" gives [V, F, H, W, 3], "pt" [V, F, 3, H, W], "pil" V lists, "latent"
            [V, C, L, h, w].

    Videos that an interruption left longer than others are cut to the length that all of them have.
    """
    videos = [[c for c in chunks if c.video == video] for video in range(1 + max(c.video for c in chunks))]
    if kind == "pil":
        return [[image for chunk in own for image in chunk.frames] for own in videos]
    if kind == "latent":
        latents = [torch.cat([chunk.latents for chunk in own], dim=2) for own in videos]
        shortest = min(part.shape[2] for part in latents)
        return latents[0] if len(latents) == 1 else torch.cat([part[:, :, :shortest] for part in latents])
    join: Any = torch.cat if kind == "pt" else np.concatenate
    frames = [join([chunk.frames for chunk in own]) for own in videos]
    shortest = min(map(len, frames))
    return frames[0][None] if len(frames) == 1 else join([part[None, :shortest] for part in frames])
