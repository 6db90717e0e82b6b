"""The places of blocks in a video, and the cut of a model's layers into stages. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dualparal.config.blocks import BlockConfig
from dualparal.config.decoding import row_ranges
from dualparal.config.video import VideoConfig
from dualparal.schedule.policies import POLICIES

TOKEN_TILE = 64  # rows of a matrix product from which on its bits do not depend on their number


@dataclass(frozen=True)
class Layout:
    """The place of each block in the video, in latent frames.

    Every block has B frames of its own. Under a policy that feeds latents, all but block 0 are fed C frames of their
    predecessor in front of them, and block 0 has B + C of its own. A video that fits into block 0 is one block of
    exactly its length, which is what the stock pipeline computes.

    Attributes:
        blocks: sizes of blocks and the context policy.
        num_latents: latent frames of the video, L; None: endless.
    """

    blocks: BlockConfig
    num_latents: int | None  # L

    @classmethod
    def of(cls, blocks: BlockConfig, video: VideoConfig, temporal_factor: int) -> Layout:
        """The layout of a request. A video that goes on from a clip has the clip's end for its block 0, a whole one.

        Raises:
            ValueError: a length that cannot be made.
        """
        latents = video.num_latents(temporal_factor)
        if latents is not None and video.continues:
            latents += cls(blocks, None).first_frames
        return cls(blocks, latents)

    @property
    def first_frames(self) -> int:
        """Own latent frames of block 0."""
        b = self.blocks
        full = b.frames_per_block + (b.context_frames if POLICIES[b.context].feeds_latents else 0)
        return full if self.num_latents is None else min(full, self.num_latents)

    @property
    def pool_frames(self) -> int:
        """Frames of the pool of noise (``sampling.noise``)."""
        return self.blocks.frames_per_block + self.blocks.context_frames

    @property
    def num_blocks(self) -> int | None:
        """Blocks of the video, M; None: endless."""
        if self.num_latents is None:
            return None
        return 1 + math.ceil((self.num_latents - self.first_frames) / self.blocks.frames_per_block)

    @property
    def padded_latents(self) -> int | None:
        """Latent frames that are computed; the surplus of the last block is trimmed on output. None: endless."""
        blocks = self.num_blocks
        return None if blocks is None else self.start(blocks)

    def frames(self, block: int) -> int:
        """Own latent frames of ``block``."""
        return self.first_frames if block == 0 else self.blocks.frames_per_block

    def start(self, block: int) -> int:
        """Absolute index of the first own latent frame of ``block``."""
        return 0 if block == 0 else self.first_frames + (block - 1) * self.blocks.frames_per_block

    def block_of(self, latent: int) -> int:
        """The block among whose own frames an absolute latent frame is."""
        return 0 if latent < self.first_frames else 1 + (latent - self.first_frames) // self.blocks.frames_per_block

    def fed_context(self, block: int, refresh: bool = False) -> int:
        """Latent frames of the previous block that are fed through the layers in front of the own ones: C under a
        policy that feeds latents and, with any policy, in a refresh; otherwise 0."""
        feeds = refresh or POLICIES[self.blocks.context].feeds_latents
        return self.blocks.context_frames if feeds and block > 0 else 0

    def window(self, block: int, refresh: bool = False) -> range:
        """Absolute indices of the latent frames that are fed to the model for ``block``."""
        start = self.start(block)
        return range(start - self.fed_context(block, refresh), start + self.frames(block))

    def anchor_shift(self, block: int) -> int:
        """Latent frames by which the anchor, the first frames of block 0, is moved for a reader: it then lies just
        before the frames that the block's predecessor lends, and the window is B + 2C + a frames long at any time."""
        return self.start(block) - self.blocks.context_frames - self.blocks.anchor_frames

    @property
    def max_window_frames(self) -> int:
        """Latent frames of the largest window that is fed to the model."""
        blocks = range(1 if self.num_blocks == 1 else 2)
        return max(len(self.window(block, self.blocks.refresh_every is not None)) for block in blocks)

    def check_places(self, tokens: int, places: int) -> None:
        """Checks that every window can be shared by the ``places`` of a stage.

        Args:
            tokens: of a latent frame.
            places: their number, P.

        Raises:
            ValueError: a window is too small.
        """
        for block in range(1 if self.num_blocks == 1 else 2) if places > 1 else ():
            token_ranges(len(self.window(block)), tokens, places)

    def kept_frames(self, block: int) -> int:
        """Own latent frames of ``block`` that belong to the video (the last block may have a surplus)."""
        if self.num_latents is None:
            return self.frames(block)
        return min(self.frames(block), self.num_latents - self.start(block))


def check_heads(heads: int, places: int) -> None:
    """Checks that a model has heads for all ``places`` of a stage. Raises ValueError."""
    if places > heads:
        raise ValueError(
            f"sequence_parallel={places} with a model of {heads} heads: every rank of a stage takes one at least; "
            f"use {heads} at most"
        )


def token_ranges(frames: int, tokens: int, places: int) -> list[range]:
    """The tokens of a window that each place of a stage has: whole frames, or rows of ``TOKEN_TILE`` where the frames
    do not divide; the last ones with what is left.

    Products of fewer rows than a tile have other last bits; with more they do not depend on the cut.

    Args:
        frames: latent frames of the window.
        tokens: tokens of a frame.
        places: their number, P.

    Raises:
        ValueError: a place would have less than a tile.
    """
    total = frames * tokens
    tile = tokens if frames % places == 0 and total // places >= TOKEN_TILE else TOKEN_TILE
    tiles = total // tile
    if tiles < places:
        raise ValueError(
            f"sequence_parallel={places} with windows of {total} tokens: every place takes {TOKEN_TILE} or more; use "
            f"{max(1, tiles)} at most, a larger picture or larger blocks"
        )
    ends = [range_.stop * tile for range_ in row_ranges(tiles, places)]
    ends[-1] = total
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def split_layers(num_layers: int, num_stages: int, layers_per_stage: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage, contiguous, as indices of the model's layers.

    Args:
        num_layers: layers of the model.
        num_stages: stages, N.
        layers_per_stage: number of layers of each stage. Default: an even split, where the first stages get one more
            when it does not divide.

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
