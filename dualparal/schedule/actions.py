"""The words of a schedule: units of work, what they leave behind, and what a stage does with them."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

# Blocks that who decodes holds at once, waiting ones and the one in its hands. With that many, stage 0 waits.
DECODE_BOUND = 2


class Op(Enum):
    """The kinds of work of a stage."""

    RECV = "recv"  # stage > 0: hidden states of a unit; stage 0: its velocity
    RUN = "run"
    SEND = "send"  # to the next stage; the last stage sends velocities to stage 0
    UPDATE = "update"  # one sampler step of a block, from the velocities of its branches
    EMIT = "emit"  # the final latents of a block leave
    DECODE = "decode"  # the VAE turns them into frames; on stage 0: they are handed to who does that


class Unit(NamedTuple):
    """One forward of one block at one step, which travels through all stages. A step behind the last: see
    ``Schedule.makes_anchor``.

    Attributes:
        block, step, video: counted from 0.
        branch: of guidance: 0 conditional, 1 unconditional.
    """

    block: int
    step: int
    branch: int
    video: int = 0

    def __str__(self) -> str:
        return f"{self.block_step}{'cu'[self.branch]}"

    @property
    def block_step(self) -> str:
        """A name without the branch, such as "b3s2", or "v1b3s2" in the second video."""
        return (f"v{self.video}" if self.video else "") + f"b{self.block}s{self.step}"


class Features(NamedTuple):
    """Keys and values that one unit left behind in every layer of a stage, and the slot in which they lie.

    Attributes:
        side: "head": of its first context frames, for the block before; "tail": of its last ones, for the block after;
            "anchor": of the first anchor frames of block 0, for all blocks after it.
        block, step, branch, video: the unit's.
        slot: its place among the ``Schedule.slots`` of that side.
        refresh: made in a refresh.
    """

    side: str
    block: int
    step: int
    branch: int
    slot: int
    video: int = 0
    refresh: bool = False


class Action(NamedTuple):
    """One piece of work of one stage, or of a place that decodes. For UPDATE, EMIT and DECODE ``unit`` means its block,
    and its branch is 0."""

    op: Op
    stage: int
    unit: Unit

    def __str__(self) -> str:
        name = str(self.unit) if self.op in (Op.RUN, Op.SEND, Op.RECV) else self.unit.block_step
        return f"{self.op.value} {name}"
