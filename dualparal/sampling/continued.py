"""A clip's end as the first block of the video that goes on from it, known from the start at every noise level; and
the way back from it to noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dualparal.sampling.sampler import Sampler


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


class Inversion(Sampler):
    """The steps of a sampler backwards: from finished latents to the noise that they come from.

    They are Euler's steps of flow matching's equation up the sampler's noise levels. The model is told the timestep of
    the level at which a step begins; of finished latents that of the sampler's last step.
    """

    def __init__(self, sampler: Sampler) -> None:
        last = len(sampler) - 1
        self.timesteps = sampler.timesteps[[last, *range(last, 0, -1)]]
        self.num_train_timesteps = sampler.num_train_timesteps
        self.levels = (0.0, *sampler.levels[:0:-1])
        self._fresh = _Euler(self.timesteps, (*self.levels, sampler.levels[0]))
        self._seed = 0


class _Euler:
    """Euler's steps along levels, of which there is one more than timesteps, as diffusers' samplers are called."""

    def __init__(self, timesteps: torch.Tensor, levels: Sequence[float]) -> None:
        self.timesteps, self.levels, self.taken = timesteps, levels, 0

    def step(
        self, velocity: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        """Latents [1, C, F, H, W] after the next step."""
        level, self.taken = self.levels[self.taken], self.taken + 1
        return (latents + (self.levels[self.taken] - level) * velocity.float(),)


def unit_noise(end: torch.Tensor, noisy: torch.Tensor, level: float) -> torch.Tensor:
    """The noise in ``noisy`` = (1 - level) * end + level * noise, [1, C, F, h, w] float32 on the CPU, with the mean and
    deviation of noise in every channel: those of inverted latents are off."""
    noise = (noisy - (1 - level) * end).double().numpy() / level
    axes = 2, 3, 4  # numpy's sums, unlike torch's, do not depend on the number of threads
    mean, deviation = noise.mean(axes, keepdims=True), noise.std(axes, keepdims=True)
    return torch.from_numpy((noise - mean) / np.maximum(deviation, 1e-6)).float()
