"""Protocols between the engine and what makes latents and tokens of images."""

from __future__ import annotations

from typing import Protocol

import torch


class Encoder(Protocol):
    """Frames to latents, a video at a time, never the whole of it. The VAE is only read."""

    @property
    def history(self) -> int:
        """Number of latent frames back that a latent can see."""
        ...

    def push(self, frames: torch.Tensor) -> torch.Tensor:
        """Encodes the next frames of the video. However the frames are cut, the latents are the same.

        Args:
            frames: [F, 3, H, W] in [-1, 1]: the frames of one or more latent frames.

        Returns:
            Latents [1, C, f, h, w], as the transformer takes them, float32.
        """
        ...

    def reset(self) -> None:
        """Forgets the video: the next frame is the first one of another."""
        ...
