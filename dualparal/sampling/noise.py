"""The initial noise of a block as a function of (seed, block) alone: the same on any rank, in any order, after resume.

So is the fresh noise of a sampler that takes some at every step, a function of (seed, block, step).

The paper's coordinated noise: a pool of B + C frames; for each new block the pool becomes [its last C, its first B
permuted], and the block takes the last B. Every window [C of the previous block, own B] then holds each pool frame
exactly once (DualParal, section 3.3; examples/DualParal_Wan.py of the authors' code).
"""

from __future__ import annotations

import torch

from dualparal.config.blocks import MAX_STEPS
from dualparal.schedule.layout import Layout

_MASK = 2**64 - 1
# torch's generator on the CPU (mt19937) is seeded with the lower 32 bits of what it is given.
_SEEDS = 2**32
_STRIDE = 0x9E3779B1  # odd, so that its multiples up to the 2**32nd are different seeds


def derive_seed(seed: int, block: int) -> int:
    """Mixes (seed, block) into a 63-bit seed: splitmix64 of both. Block -1 stands for the pool."""
    z = (seed * 0x9E3779B97F4A7C15 + (block + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


def step_seed(seed: int, block: int, step: int) -> int:
    """Mixes (seed, block, step) into a 32-bit seed: so many strides from that of the pool.

    Of one ``seed``, no two blocks and steps have the same, and none has the pool's, for the first 429,496 blocks.
    """
    place = (block * MAX_STEPS + step) % (_SEEDS - 1)
    return (derive_seed(seed, -1) + (place + 1) * _STRIDE) % _SEEDS


def step_generator(seed: int, block: int, step: int) -> torch.Generator:
    """The generator of the noise that a block takes at a step, on the CPU, so that it does not depend on the device."""
    return torch.Generator().manual_seed(step_seed(seed, block, step))


class BlockNoise:
    """Initial latents of every block, float32 on the CPU (so that they do not depend on the device).

    Args:
        layout: the places of blocks in the video.
        shape: (channels, height, width) of a latent frame.
        seed: of pool and permutations.
        latents: [1, channels, L or padded L, height, width] to use instead, as in diffusers. Where it is shorter than
            the latents that are computed (the surplus of the last block), the pool goes on.
        pool: [1, channels, f, height, width], the last frames of the pool in place of the seed's.
    """

    def __init__(
        self,
        layout: Layout,
        shape: tuple[int, int, int],
        seed: int,
        latents: torch.Tensor | None = None,
        pool: torch.Tensor | None = None,
    ) -> None:
        channels, height, width = shape
        self.layout = layout
        self.seed = seed
        self.latents = None if latents is None else latents.to("cpu", torch.float32)
        size = layout.pool_frames
        generator = torch.Generator().manual_seed(derive_seed(seed, -1))
        self.pool = torch.randn(size, channels, height, width, generator=generator)
        if pool is not None:
            self.pool[size - pool.shape[2] :] = pool[0].transpose(0, 1)
        self._state: tuple[int, list[int]] = (0, list(range(size)))

    def frames(self, block: int) -> list[int]:
        """Indices of the pool frames that ``block`` starts from, in order."""
        own, context = self.layout.blocks.frames_per_block, self.layout.blocks.context_frames
        at, order = self._state
        if block < at:
            at, order = 0, list(range(own + context))
        while at < block:
            at += 1
            generator = torch.Generator().manual_seed(derive_seed(self.seed, at))
            shuffle = torch.randperm(own, generator=generator).tolist()
            order = order[len(order) - context :] + [order[i] for i in shuffle]
        self._state = (at, order)
        return order[len(order) - self.layout.frames(block) :]

    def __call__(self, block: int) -> torch.Tensor:
        """Noise [1, channels, frames of the block, height, width], float32."""
        noise = self.pool[self.frames(block)].transpose(0, 1).unsqueeze(0).contiguous()
        if self.latents is not None:
            given = self.latents[:, :, self.layout.start(block) :][:, :, : noise.shape[2]]
            noise[:, :, : given.shape[2]] = given
        return noise
