"""Whole videos, joined from the chunks of a stream, as WanPipeline returns them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dualparal.config.video import OutputType
from dualparal.decoding.chunks import Chunk
from dualparal.trace.stats import RunStats


@dataclass(frozen=True)
class EngineOutput:
    """The result of a call of an engine.

    Attributes:
        frames: as WanPipeline's, with an axis of videos in front (``join_chunks``); None on ranks that do not lead.
        stats: cost of the run; None there too.
    """

    frames: Any
    stats: RunStats | None


class Streams(Protocol):
    """An engine, by its calls and its attributes."""

    stats: RunStats | None

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Chunk]:
        """Yields chunks as they are finished."""
        ...


def whole_videos(engine: Streams, prompt: Any, kwargs: dict[str, Any]) -> EngineOutput:
    """The result of a call of an engine, see ``engine.engine.Engine.__call__``.

    Args:
        kwargs: the other arguments of ``stream``, and ``return_dict``.

    Raises:
        ValueError: as ``stream`` raises it, or an endless video.
    """
    return_dict = kwargs.pop("return_dict", True)
    if kwargs.get("num_frames", 81) is None:
        raise ValueError("num_frames=None is an endless video: use engine.stream(...)")
    kwargs.setdefault("result_kind", "latents" if kwargs.get("output_type") == "latent" else "frames")
    chunks = list(engine.stream(prompt, **kwargs))
    frames = join_chunks(chunks, kwargs.get("output_type", "np")) if chunks else None
    return EngineOutput(frames, engine.stats) if return_dict else (frames,)  # type: ignore[return-value]


def join_chunks(chunks: list[Chunk], kind: OutputType) -> Any:
    """Joins all videos of a run into one object.

    Args:
        chunks: one at least, those of each video in order.
        kind: their output type.

    Returns:
        "np" and "uint8": an array [V, F, H, W, 3]; "pt": a tensor [V, F, 3, H, W]; "pil": V lists of images;
        "latent": a tensor [V, C, L, h, w]. In arrays and tensors, videos that an interruption left longer than others
        are cut to the length that all of them have.
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
