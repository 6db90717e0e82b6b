"""How a video is cut into blocks: a checked, frozen value. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ContextPolicy = Literal["cached", "prior", "paper"]
ContextVersion = Literal["matching", "newest"]

CONTEXT_POLICIES: tuple[str, ...] = get_args(ContextPolicy)
CONTEXT_VERSIONS: tuple[str, ...] = get_args(ContextVersion)
MAX_STEPS = 10_000


def check_int(name: str, value: object, low: int, high: int, rule: str) -> None:
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
        check_int("frames_per_block", self.frames_per_block, 1, 100_000, "a block holds at least one latent frame")
        check_int("context_frames", self.context_frames, 0, 100_000, "a neighbour lends zero or more latent frames")
        if self.context_frames > self.frames_per_block:
            raise ValueError(
                f"context_frames={self.context_frames} exceeds frames_per_block={self.frames_per_block}: a block "
                f"lends at most its own frames; use {self.frames_per_block} or fewer, or larger blocks"
            )
        if self.context not in CONTEXT_POLICIES:
            raise ValueError(f"context={self.context!r} is not a context policy; use one of {CONTEXT_POLICIES}")
        if self.max_blocks_in_flight is not None:
            check_int("max_blocks_in_flight", self.max_blocks_in_flight, 1, MAX_STEPS, "a block must be able to enter")
        if self.context_version not in CONTEXT_VERSIONS:
            raise ValueError(
                f"context_version={self.context_version!r} is not a version of features; use one of {CONTEXT_VERSIONS}"
            )
        if self.refresh_every is not None:
            check_int("refresh_every", self.refresh_every, 1, MAX_STEPS, "iterations from one refresh to the next")
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
