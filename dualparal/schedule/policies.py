"""Context policies: what a block sees of its neighbours, and where what it sees is kept. No torch.

A policy is one class and one row of ``POLICIES`` (its name stands in ``config.blocks`` besides). The schedule, the
layout, the planner, the engine and the command line ask the policy and compare no names. Only the oracle
(``reference``) has rules of its own, so that the two can be held against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from dualparal.config.blocks import CONTEXT_VERSIONS, DEFAULT_VERSION, VERSIONED_POLICIES, BlockConfig
from dualparal.schedule.actions import Unit


class BlockQueue(NamedTuple):
    """The numbers of a schedule on which the slots of a policy depend.

    Attributes:
        num_steps: denoising steps of a block, T.
        num_blocks: blocks of a video, M; None: endless.
        gap: iterations between the entries of two blocks, and steps between neighbours; 1 to T.
        num_videos: videos that are made side by side, V.
        version: one of ``CONTEXT_VERSIONS``.
        stands_in: an unconditional unit may read the features of a neighbour's conditional one, after its own block's
            conditional unit has left some.
    """

    num_steps: int
    num_blocks: int | None
    gap: int
    num_videos: int
    version: str
    stands_in: bool = False


@dataclass(frozen=True)
class Policy:
    """A policy under which a block sees nothing of its neighbours; each subclass says what it sees.

    Two sides of a neighbour can be lent. Its "head", the features (keys and values) of its first context frames, is
    read by the block before in the iteration in which it was made. Its "tail", those of its last ones, is read by the
    block after: by its step that lies ``steps_ahead`` before, and the tail of the last step by all that are left.

    Attributes:
        name: the value of ``BlockConfig.context``.
        is_oldest_first: the blocks of an iteration run in the order of the video; otherwise the newest runs first.
            In a refresh the newest always runs first.
        feeds_latents: the last context frames of the predecessor's latents are fed through the layers in front of a
            block's own frames, in every iteration. Block 0, which has no predecessor, has as many more own frames.
        reads_next: a block reads the head of the block after it.
        reads_previous: a block reads the tail of the block before it. ``steps_ahead``, ``tail_slots`` and
            ``tail_slot`` are asked only then.
        is_lean: slots of tails do not grow with the number of steps. The planner turns to such policies, in the order
            of ``POLICIES``, when memory is short.
    """

    name: ClassVar[str]
    is_oldest_first: ClassVar[bool] = False
    feeds_latents: ClassVar[bool] = False
    reads_next: ClassVar[bool] = False
    reads_previous: ClassVar[bool] = False
    is_lean: ClassVar[bool] = True

    @property
    def versions(self) -> tuple[str, ...]:
        """The values of ``BlockConfig.context_version`` between which the policy has a choice."""
        return CONTEXT_VERSIONS if self.name in VERSIONED_POLICIES else (DEFAULT_VERSION,)

    @property
    def is_stateless(self) -> bool:
        """True when no iteration reads features of an earlier one: a run can then go on from latents alone."""
        return not self.reads_previous

    @property
    def neighbours_read(self) -> int:
        """Neighbours whose features a block in the middle of a video reads, 0 to 2."""
        return self.reads_next + self.reads_previous

    @property
    def blocks_awaited(self) -> int:
        """Blocks whose velocities must be back before the next step of a block: its own, and that of the block
        before, later in the iteration, where its latents are fed."""
        return 1 + self.feeds_latents

    def steps_ahead(self, queue: BlockQueue) -> int:
        """Steps by which the tail that a block reads is cleaner than the block, while its predecessor is not done."""
        raise NotImplementedError(f"context policy {self.name!r} reads tails: it must say of which step")

    def tail_slots(self, queue: BlockQueue) -> int:
        """Slots per layer and branch that a store of tails needs, for all videos, of two blocks or more each."""
        raise NotImplementedError(f"context policy {self.name!r} reads tails: it must say how many are kept")

    def tail_slot(self, queue: BlockQueue, unit: Unit) -> int:
        """The slot, from 0 to ``tail_slots`` - 1, in which ``unit`` leaves its tail.

        A unit reads before it writes, so that it may write where it has read.
        """
        raise NotImplementedError(f"context policy {self.name!r} reads tails: it must say where they lie")


@dataclass(frozen=True)
class Cached(Policy):
    """Features of both neighbours as they were made: of the block after, ``gap`` steps noisier, in this iteration; of
    the block before, in an earlier one, at the reader's own step ("matching") or the last ones made ("newest")."""

    name: ClassVar[str] = "cached"
    reads_next: ClassVar[bool] = True
    reads_previous: ClassVar[bool] = True
    is_lean: ClassVar[bool] = False

    def steps_ahead(self, queue: BlockQueue) -> int:
        return queue.gap - 1 if queue.version == "newest" else 0

    def tail_slots(self, queue: BlockQueue) -> int:
        return queue.num_videos * self._video_slots(queue)

    def tail_slot(self, queue: BlockQueue, unit: Unit) -> int:
        slots, copies = self._video_slots(queue), self._copies(queue)
        if queue.version == "newest" and queue.stands_in:  # as nothing is taken over
            slot = unit.block % slots
        elif slots < self._relay_slots(queue):  # few blocks: each keeps its own
            slot = unit.block * copies + unit.step % copies
        elif queue.version == "matching":
            slot = unit.step  # the only reader is the block after, at this step, which then writes there
        else:
            left = queue.num_steps - 1 - unit.step
            slot = -(-left // queue.gap)  # where the block after has just read when this one gets there
        return unit.video * slots + slot

    def _video_slots(self, queue: BlockQueue) -> int:
        """Slots of one video."""
        relay = self._relay_slots(queue)
        return relay if queue.num_blocks is None else min(relay, self._copies(queue) * (queue.num_blocks - 1))

    @staticmethod
    def _copies(queue: BlockQueue) -> int:
        """Tails of one block that are kept at once."""
        return 1 if queue.version == "newest" else queue.gap

    @staticmethod
    def _relay_slots(queue: BlockQueue) -> int:
        """Slots of a video with any number of blocks, where a block takes over its predecessor's: one per step
        ("matching") or per block in flight ("newest")."""
        if queue.version == "matching":
            return queue.num_steps
        return -(-queue.num_steps // queue.gap) + queue.stands_in


@dataclass(frozen=True)
class Prior(Policy):
    """Features of the block before alone, ``gap`` steps cleaner, made just before in this iteration."""

    name: ClassVar[str] = "prior"
    is_oldest_first: ClassVar[bool] = True
    reads_previous: ClassVar[bool] = True

    def steps_ahead(self, queue: BlockQueue) -> int:
        return queue.gap

    def tail_slots(self, queue: BlockQueue) -> int:
        """One per video for the tail that a finished block left, and one or two for all that are read at once."""
        return queue.num_videos + self._relay_slots(queue)

    def tail_slot(self, queue: BlockQueue, unit: Unit) -> int:
        if unit.step == queue.num_steps - 1:
            return unit.video
        shared = self._relay_slots(queue)
        return queue.num_videos + unit.block % shared if shared else queue.num_videos - 1

    @staticmethod
    def _relay_slots(queue: BlockQueue) -> int:
        """Slots through which a tail goes to the block that reads it next."""
        return (1 + queue.stands_in) * (queue.num_blocks != 2 and queue.gap + 1 < queue.num_steps)


@dataclass(frozen=True)
class Paper(Policy):
    """The latents of the block before, fed through the layers, and the features of the block after (DualParal,
    section 3)."""

    name: ClassVar[str] = "paper"
    feeds_latents: ClassVar[bool] = True
    reads_next: ClassVar[bool] = True


# In the order in which the planner prefers them.
POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in (Cached(), Prior(), Paper())}


def with_refreshes(blocks: BlockConfig, num_steps: int) -> BlockConfig:
    """Blocks with the refreshes that snapshots need where features outlive an iteration: unless given, every half of
    ``num_steps``."""
    stateless = POLICIES[blocks.context].is_stateless or blocks.context_frames == 0
    if blocks.refresh_every is not None or stateless:
        return blocks
    return replace(blocks, refresh_every=max(1, num_steps // 2))
