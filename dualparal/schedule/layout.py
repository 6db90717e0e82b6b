"""Where the blocks of a video lie in it, and how the layers of a model are cut into stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dualparal.config.blocks import BlockConfig


@dataclass(frozen=True)
class Layout:
    """Where each block lies in the video, in latent frames. ``num_latents`` None: endless.

    ``paper``: block 0 has B + C frames and every other block is fed C frames of its predecessor in front of its
    own B. ``cached`` and ``prior``: B frames each, nothing fed twice. A video that fits into block 0 is one block
    of exactly its length, which is what the stock pipeline computes.
    """

    blocks: BlockConfig
    num_latents: int | None  # L

    @property
    def first_frames(self) -> int:
        """Frames of block 0."""
        b = self.blocks
        full = b.frames_per_block + (b.context_frames if b.context == "paper" else 0)
        return full if self.num_latents is None else min(full, self.num_latents)

    @property
    def num_blocks(self) -> int | None:  # M
        if self.num_latents is None:
            return None
        return 1 + math.ceil((self.num_latents - self.first_frames) / self.blocks.frames_per_block)

    @property
    def padded_latents(self) -> int | None:
        """Latent frames that are computed; the surplus of the last block is trimmed on output."""
        blocks = self.num_blocks
        return None if blocks is None else self.start(blocks)

    def frames(self, block: int) -> int:
        """Own latent frames of ``block``."""
        return self.first_frames if block == 0 else self.blocks.frames_per_block

    def start(self, block: int) -> int:
        """Absolute index of the first own latent frame of ``block``."""
        return 0 if block == 0 else self.first_frames + (block - 1) * self.blocks.frames_per_block

    def fed_context(self, block: int, refresh: bool = False) -> int:
        """Frames of the previous block that are fed through the layers in front of the own ones (``paper``, and any
        policy in a refresh)."""
        return self.blocks.context_frames if (self.blocks.context == "paper" or refresh) and block > 0 else 0

    def window(self, block: int, refresh: bool = False) -> range:
        """The frames fed to the model for ``block``: absolute indices."""
        start = self.start(block)
        return range(start - self.fed_context(block, refresh), start + self.frames(block))

    @property
    def max_window_frames(self) -> int:
        """Frames of the largest window that is fed to the model."""
        blocks = range(1 if self.num_blocks == 1 else 2)
        return max(len(self.window(block, self.blocks.refresh_every is not None)) for block in blocks)

    def kept_frames(self, block: int) -> int:
        """Own frames of ``block`` that belong to the video (the last block may have a surplus)."""
        if self.num_latents is None:
            return self.frames(block)
        return min(self.frames(block), self.num_latents - self.start(block))


def split_layers(num_layers: int, num_stages: int, layers_per_stage: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage, contiguous.

    layers_per_stage: how many each stage owns. Default: an even split, where the first stages get one more when it
    does not divide.

    Raises:
        ValueError: more stages than layers, no stage at all, or numbers that are not a split of this model.
    """
    if num_stages < 1 or num_stages > num_layers:
        raise ValueError(
            f"stages={num_stages} with a model of {num_layers} layers: every stage owns at least one layer; "
            f"use 1 to {num_layers} stages"
        )
    if layers_per_stage is None:
        base, extra = divmod(num_layers, num_stages)
        layers_per_stage = [base + (k < extra) for k in range(num_stages)]
    given = f"layers_per_stage={','.join(map(str, layers_per_stage))}"
    if len(layers_per_stage) != num_stages:
        raise ValueError(f"{given}: {len(layers_per_stage)} numbers with stages={num_stages}; give one for each stage")
    if not all(isinstance(count, int) and count > 0 for count in layers_per_stage):
        raise ValueError(f"{given}: every stage owns at least one layer; use integers from 1 on")
    if sum(layers_per_stage) != num_layers:
        raise ValueError(f"{given}: {sum(layers_per_stage)} layers, and the model has {num_layers}; use all of them")
    ends = list(accumulate(layers_per_stage))
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
