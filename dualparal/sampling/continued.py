"""A clip's end as the first block of the video that goes on from it: known from the start, at every noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clip:
    """The last latent frames of a clip.

    Attributes:
        before: [1, C, k, h, w] float32, those in front of block 0, which only the decoder sees; k may be 0.
        own: [1, C, F, h, w], those of block 0.
    """

    before: torch.Tensor
    own: torch.Tensor

    @classmethod
    def of(cls, latents: torch.Tensor, frames: int) -> Clip:
        """The clip of latents [1, C, L, h, w], of which the last ``frames`` are block 0."""
        first = latents.shape[2] - frames
        return cls(latents[:, :, :first], latents[:, :, first:])

    @property
    def latents(self) -> torch.Tensor:
        """All of them."""
        return torch.cat([self.before, self.own], dim=2)


class KnownBlock:
    """The latents of a block whose end is known, at each of its steps: the end, with the block's own noise.

    Flow matching's way from noise to a sample is a straight line, and this is the point of it at each noise level. So
    neighbours see at every step what they would see of a block that is denoised beside them.

    Args:
        end: [1, C, F, h, w] float32, on the CPU.
        noise: of the same shape.
        levels: noise levels of the sampler's steps.
    """

    def __init__(self, end: torch.Tensor, noise: torch.Tensor, levels: Sequence[float]) -> None:
        self._end, self._noise, self._levels = end, noise, levels

    def at(self, step: int) -> torch.Tensor:
        """The latents before the sampler's step ``step``, on the CPU; behind the last step the end itself."""
        level = self._levels[step] if step < len(self._levels) else 0.0
        return (1 - level) * self._end + level * self._noise
