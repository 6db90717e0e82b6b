"""Checks of what is pushed into a decoder: one video, of one size, and nothing after a push that failed."""

from __future__ import annotations

import torch


def check_pushed(latents: torch.Tensor, channels: int, size: torch.Size | None, torn: bool, history: int) -> None:
    """Checks the next latents of a video.

    Args:
        latents: to be [1, C, f, H, W].
        channels: C.
        size: [H, W] of the latents before; None: these are the first.
        torn: the push before failed half way.
        history: latents that a fresh decoder has to see before it goes on.

    Raises:
        ValueError: a wrong shape.
        RuntimeError: an earlier push failed half way, and ``reset`` was not called since.
    """
    if torn:
        raise RuntimeError(
            "the last push failed half way and left the decoder between two frames: call reset(), then "
            f"push again the {history} latents before the next one"
        )
    shape = tuple(latents.shape)
    if len(shape) != 5 or shape[0] != 1 or shape[1] != channels or 0 in shape:
        raise ValueError(
            f"latents of shape {list(shape)}: a decoder takes one video, [1, {channels}, frames, height, "
            "width] with at least one frame; use one decoder for each video of a batch"
        )
    if size is not None and latents.shape[3:] != size:
        raise ValueError(
            f"latents of {list(shape[3:])} after latents of {list(size)}: a video keeps its size; "
            "call reset() to start another video"
        )
