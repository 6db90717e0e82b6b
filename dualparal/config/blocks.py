"""The cut of a video into blocks: a checked, frozen value. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

ContextPolicy = Literal["cached", "prior", "paper"]
ContextVersion = Literal["matching", "newest"]

CONTEXT_POLICIES: tuple[str, ...] = get_args(ContextPolicy)
CONTEXT_VERSIONS: tuple[str, ...] = get_args(ContextVersion)
DEFAULT_VERSION: ContextVersion = "matching"
VERSIONED_POLICIES: tuple[str, ...] = ("cached",)  # those with a choice of versions
OF_MODEL = ("max_blocks_in_flight", "context_version")  # a model may bring its own
MAX_STEPS = 10_000
MAX_WEIGHT = 100  # of logits: e ** 100 is all there is


def check_int(name: str, value: object, low: int, high: int, rule: str) -> None:
    """Checks that ``value`` is an int (no bool) from ``low`` to ``high``.

    Raises:
        ValueError: it is not. The message has ``name``, the value, ``rule`` (the reason for the limits) and the limits.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: {rule}; use an integer from {low} to {high}")


@dataclass(frozen=True)
class BlockConfig:
    """The size of blocks, the number under way, and a block's view of its neighbours.

    Attributes:
        frames_per_block: latent frames of a block, B (the paper's Num_B).
        context_frames: latent frames that a neighbour lends, C (half of the paper's Num_C); 0 to B.
        context: the name of the context policy (``schedule.policies``).
        max_blocks_in_flight: K. Blocks enter ``gap`` = ceil(T / K) iterations apart (None: one per iteration), and
            neighbours are that many steps apart.
        context_version: for ``VERSIONED_POLICIES``: a block reads its predecessor's features of exactly its own step
            ("matching") or the last ones made ("newest", gap - 1 steps cleaner, less memory).
        refresh_every: R. Every R iterations (R > gap), for ``gap`` of them, a block reads nothing that an earlier
            iteration left behind: the end of its predecessor's latents is fed through the layers in front of its own
            frames. What follows depends on latents alone, so that a run can be resumed there. None: never.
        anchor_frames: a. The features of the first a frames of block 0 are read by every later block, in the newest
            version that there is, as if they lay just before what its predecessor lends; 0 to B, 0: none.
        anchor_weight: added to the logits of the anchor's keys (a natural logarithm of their weight).

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    frames_per_block: int = 8  # B
    context_frames: int = 4  # C
    context: ContextPolicy = "cached"
    max_blocks_in_flight: int | None = None  # K
    context_version: ContextVersion = DEFAULT_VERSION
    refresh_every: int | None = None  # R
    anchor_frames: int = 0
    anchor_weight: float = 0.0

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
        if self.context_version != DEFAULT_VERSION and self.context not in VERSIONED_POLICIES:
            raise ValueError(
                f"context_version={self.context_version!r} with context={self.context!r}: only "
                f"{', '.join(map(repr, VERSIONED_POLICIES))} has a choice of versions; leave context_version out"
            )

        check_int("anchor_frames", self.anchor_frames, 0, self.frames_per_block, "frames of block 0 that all later see")
        weight = self.anchor_weight
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not -MAX_WEIGHT <= weight <= MAX_WEIGHT:  # nor is NaN in between
            raise ValueError(
                f"anchor_weight={weight!r}: added to logits of the anchor; use a number from -{MAX_WEIGHT} to "
                f"{MAX_WEIGHT}"
            )
        if weight and not self.anchor_frames:
            raise ValueError(f"anchor_weight={weight} with anchor_frames=0: there is no anchor; give anchor_frames too")

    @classmethod
    def of(cls, own: BlockConfig | None = None, **fields: Any) -> BlockConfig:
        """The blocks of some fields.

        Args:
            own: whose max_blocks_in_flight and, with a policy that has a choice, context_version are taken where
                ``fields`` lacks them; None: those of the class.

        Raises:
            ValueError: as the class raises it.
        """
        if own is not None:
            own_fields = {name: getattr(own, name) for name in OF_MODEL}
            if fields.get("context", cls.context) not in VERSIONED_POLICIES:
                del own_fields["context_version"]
            fields = own_fields | fields
        return cls(**fields)

    def gap(self, num_steps: int) -> int:
        """Iterations between the entries of two blocks, and steps between neighbours: 1 to ``num_steps``."""
        return admission_gap(num_steps, self.max_blocks_in_flight)


def admission_gap(num_steps: int, max_blocks_in_flight: int | None) -> int:
    """Iterations between the entries of two blocks, 1 to ``num_steps``.

    The smallest even spacing with which no more than ``max_blocks_in_flight`` are in flight: a block stays for T
    iterations, so ceil(T / gap) are. One spacing for the whole video, so that every block has its neighbours at the
    same distance.
    """
    return 1 if max_blocks_in_flight is None else -(-num_steps // max_blocks_in_flight)
