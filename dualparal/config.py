"""What the user asks for, checked once: frozen dataclasses that import nothing of ours and no torch.

Derived numbers (blocks, latent frames, windows) are properties here, so that the schedule, the engine, the
reference and the command line cannot disagree about them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

ContextPolicy = Literal["cached", "prior", "paper"]
ContextVersion = Literal["matching", "newest"]
OutputType = Literal["np", "uint8", "pt", "pil", "latent"]

CONTEXT_POLICIES: tuple[str, ...] = get_args(ContextPolicy)
CONTEXT_VERSIONS: tuple[str, ...] = get_args(ContextVersion)
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)

BUILT_IN = "moving-shapes"  # the trained model that ships with the package
BUILT_IN_SIZE = (64, 64)  # height and width of its videos, pixels

# Caps against typing mistakes (a height of 10**6), far above what any known model can use.
MAX_SIDE = 16384
MAX_STEPS = 10_000
MAX_GUIDANCE = 1_000_000
MAX_FRAMES = 100_000_000


def _check_int(name: str, value: object, low: int, high: int, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: {rule}; use an integer from {low} to {high}")


@dataclass(frozen=True)
class BlockConfig:
    """How a video is cut into blocks, how many are under way, and what a block sees of its neighbours.

    ``max_blocks_in_flight`` K: blocks enter ``gap`` = ceil(T / K) iterations apart (None: one per iteration), and
    neighbours are that many steps apart. ``context_version``, for ``cached``: a block reads its predecessor's
    features of exactly its own step ("matching") or the last ones made ("newest", gap - 1 steps cleaner, less memory).

    ``refresh_every`` R: every R iterations (R > gap), for ``gap`` of them, a block reads nothing that an earlier
    iteration left behind: as with ``paper``, the end of its predecessor is fed through the layers in front of its own
    frames. What follows depends on latents alone, so that a run can be resumed there. None: never.

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    frames_per_block: int = 8  # B, Num_B in the paper
    context_frames: int = 4  # C, half of the paper's Num_C
    context: ContextPolicy = "cached"
    max_blocks_in_flight: int | None = None  # K
    context_version: ContextVersion = "matching"
    refresh_every: int | None = None  # R

    def __post_init__(self) -> None:
        _check_int("frames_per_block", self.frames_per_block, 1, 100_000, "a block holds at least one latent frame")
        _check_int("context_frames", self.context_frames, 0, 100_000, "a neighbour lends zero or more latent frames")
        if self.context_frames > self.frames_per_block:
            raise ValueError(
                f"context_frames={self.context_frames} exceeds frames_per_block={self.frames_per_block}: a block "
                f"lends at most its own frames; use {self.frames_per_block} or fewer, or larger blocks"
            )
        if self.context not in CONTEXT_POLICIES:
            raise ValueError(f"context={self.context!r} is not a context policy; use one of {CONTEXT_POLICIES}")
        if self.max_blocks_in_flight is not None:
            _check_int("max_blocks_in_flight", self.max_blocks_in_flight, 1, MAX_STEPS, "a block must be able to enter")
        if self.context_version not in CONTEXT_VERSIONS:
            raise ValueError(
                f"context_version={self.context_version!r} is not a version of features; use one of {CONTEXT_VERSIONS}"
            )
        if self.refresh_every is not None:
            _check_int("refresh_every", self.refresh_every, 1, MAX_STEPS, "iterations from one refresh to the next")
        if self.context_version != "matching" and self.context != "cached":
            raise ValueError(
                f"context_version={self.context_version!r} with context={self.context!r}: only 'cached' has a choice "
                "of versions; leave context_version out"
            )

    def gap(self, num_steps: int) -> int:
        """Iterations between the entries of two blocks, and steps between neighbours."""
        return admission_gap(num_steps, self.max_blocks_in_flight)


def admission_gap(num_steps: int, max_blocks_in_flight: int | None) -> int:
    """The smallest even spacing with which no more blocks are in flight: a block stays for T iterations, so ceil(T /
    gap) are. One spacing for the whole video, so that every block has its neighbours at the same distance."""
    return 1 if max_blocks_in_flight is None else -(-num_steps // max_blocks_in_flight)


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


@dataclass(frozen=True)
class VideoConfig:
    """One request: how large, how long, how many steps. Names are ``WanPipeline.__call__``'s.

    ``height`` and ``width`` in pixels, ``num_frames`` in pixel frames (None: until the consumer stops).

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    height: int = 480
    width: int = 832
    num_frames: int | None = 81
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    seed: int = 0
    output_type: OutputType = "np"
    max_sequence_length: int = 512

    def __post_init__(self) -> None:
        _check_int("height", self.height, 1, MAX_SIDE, "the height of a frame in pixels")
        _check_int("width", self.width, 1, MAX_SIDE, "the width of a frame in pixels")
        _check_int("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS, "denoising steps of a block")
        _check_int("max_sequence_length", self.max_sequence_length, 1, 4096, "text tokens of a prompt")
        _check_int("seed", self.seed, 0, 2**63 - 1, "a seed is a non-negative 63-bit integer")
        if self.num_frames is not None:
            _check_int("num_frames", self.num_frames, 1, MAX_FRAMES, "a video has at least one frame")
        for name in ("guidance_scale", "guidance_scale_2"):
            value = getattr(self, name)
            if value is None and name == "guidance_scale_2":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not -MAX_GUIDANCE <= value <= MAX_GUIDANCE:  # nor is NaN in between
                raise ValueError(
                    f"{name}={value!r} is not a number up to {MAX_GUIDANCE}; use a value such as 5.0 (1.0: no guidance)"
                )
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.output_type!r} is not supported; use one of {OUTPUT_TYPES}")

    @property
    def guidance(self) -> bool:
        """Whether an unconditional unit runs besides the conditional one (diffusers' rule: scale > 1)."""
        return self.guidance_scale > 1

    def num_latents(self, temporal_factor: int = 4) -> int | None:
        """Latent frames L of ``num_frames`` = factor * (L - 1) + 1 pixel frames.

        Raises:
            ValueError: no such L; names the two nearest legal lengths.
        """
        if self.num_frames is None:
            return None
        groups, rest = divmod(self.num_frames - 1, temporal_factor)
        if rest:
            lower = groups * temporal_factor + 1
            raise ValueError(
                f"num_frames={self.num_frames} cannot be decoded exactly: the VAE makes {temporal_factor}k + 1 "
                f"frames; use {lower} or {lower + temporal_factor}"
            )
        return groups + 1

    def check_size(self, multiple_height: int, multiple_width: int) -> None:
        """Raises ValueError when the frame size does not divide into latent patches."""
        for name, value, multiple in (
            ("height", self.height, multiple_height),
            ("width", self.width, multiple_width),
        ):
            if value % multiple:
                lower = max(multiple, value // multiple * multiple)
                raise ValueError(
                    f"{name}={value} is not divisible by {multiple} (VAE scale times patch size of this model); "
                    f"use {lower} or {value // multiple * multiple + multiple}"
                )


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
