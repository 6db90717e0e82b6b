"""The numbers that decide an order of work, and their limits. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from dualparal.config.blocks import CONTEXT_VERSIONS
from dualparal.schedule.policies import POLICIES


@dataclass(frozen=True)
class ScheduleNumbers:
    """All numbers that decide the order of work (``schedule.Schedule``).

    Attributes:
        num_stages, num_steps: N stages, and the denoising steps of a block that are run: all T, unless the velocities
            of some are extrapolated (``config.reuse``), which is stage 0's own affair. Steps are counted among these.
        num_blocks: blocks of a video, M; None: endless, and then ``actions`` and ``units`` are endless iterators.
        context, max_blocks_in_flight, context_version, refresh_every: see ``config.blocks.BlockConfig``.
        context_frames: latent frames that a neighbour lends, C; 0: no reads between blocks.
        guidance: a block has a conditional and an unconditional unit per step, and not the conditional one alone.
        decode: finished blocks are turned into frames.
        depth: messages that fit between two neighbouring stages (buffers of one directed edge).
        num_videos: independent videos of the same length, V. In each iteration they follow each other, so that one
            keeps the stages busy while the velocities of another travel.
        key_means: 8-bit attention keeps a mean of its keys from one step of a block to the next.
        start: the iteration to begin with, for a run that goes on from latents alone: see ``is_restartable``.
        decode_ranks: places that decode and do nothing else, D, after those of the stages; each decodes a part of the
            picture's rows. 0: stage 0's place decodes, beside its units.
        decode_in_place: the place of every stage decodes a part of the picture's rows beside its units.
        conditional_only: steps at which a block has its conditional unit alone, increasing; with guidance only. Where
            a neighbour's unconditional features would be read, its conditional ones of that step stand in for them.
        anchor_frames: latent frames at the start of block 0 whose features all later blocks read, a; 0: none.

    Raises:
        ValueError: a number is out of range.
    """

    num_stages: int  # N
    num_steps: int  # T
    num_blocks: int | None  # M
    context: str = "cached"
    context_frames: int = 4  # C
    guidance: bool = True
    decode: bool = True
    depth: int = 2
    max_blocks_in_flight: int | None = None  # K
    context_version: str = "matching"
    num_videos: int = 1  # V
    refresh_every: int | None = None  # R
    key_means: bool = False
    start: int = 0
    decode_ranks: int = 0  # D
    decode_in_place: bool = False
    conditional_only: tuple[int, ...] = ()
    anchor_frames: int = 0  # a

    def __post_init__(self) -> None:
        for name, low in (
            ("num_stages", 1), ("num_steps", 1), ("context_frames", 0), ("decode_ranks", 0), ("depth", 1),
            ("num_videos", 1), ("anchor_frames", 0),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: must be {low} or more")
        for name, none in (("num_blocks", "endless"), ("max_blocks_in_flight", "no limit"), ("refresh_every", "never")):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more (None: {none})")
        if self.context not in POLICIES:
            raise ValueError(f"context={self.context!r} is not a context policy; use one of {tuple(POLICIES)}")
        if self.context_version not in CONTEXT_VERSIONS:
            raise ValueError(
                f"context_version={self.context_version!r} is not a version of features; use one of {CONTEXT_VERSIONS}"
            )
        only = self.conditional_only
        if only and (not self.guidance or sorted({s for s in only if 0 <= s < self.num_steps}) != list(only)):
            raise ValueError(
                f"conditional_only={only}: steps without their unconditional unit; use increasing ones from 0 to "
                f"{self.num_steps - 1}, with guidance"
            )
        if self.decode_ranks and self.decode_in_place:
            raise ValueError(f"decode_ranks={self.decode_ranks} with decode_in_place=True: one of them decodes")
        if not self.decode and (self.decode_ranks or self.decode_in_place):
            raise ValueError("decode=False with places that decode; leave out decode_ranks and decode_in_place")
