"""The words of a schedule: units of work, what they leave behind, and what a stage does with them."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Op(Enum):
    RECV = "recv"  # stage > 0: hidden states of a unit; stage 0: its velocity
    RUN = "run"
    SEND = "send"  # to the next stage; the last stage sends velocities to stage 0
    UPDATE = "update"  # one sampler step of a block, from the velocities of its branches
    EMIT = "emit"  # the final latents of a block leave
    DECODE = "decode"  # the VAE turns them into frames


class Unit(NamedTuple):
    """One forward: what travels through the stages. branch 0 is conditional, 1 unconditional."""

    block: int
    step: int
    branch: int
    video: int = 0

    def __str__(self) -> str:
        return f"{self.block_step}{'cu'[self.branch]}"

    @property
    def block_step(self) -> str:
        """A name without the branch."""
        return (f"v{self.video}" if self.video else "") + f"b{self.block}s{self.step}"


class Features(NamedTuple):
    """Keys and values that one unit left behind in every layer of a stage, and the slot they lie in.

    side "head": its first context frames, for the block before; "tail": its last ones, for the block after.
    """

    side: str
    block: int
    step: int
    branch: int
    slot: int
    video: int = 0
    refresh: bool = False  # made in a refresh


class Action(NamedTuple):
    op: Op
    stage: int
    unit: Unit  # UPDATE, EMIT, DECODE: branch is 0 and means the block

    def __str__(self) -> str:
        name = str(self.unit) if self.op in (Op.RUN, Op.SEND, Op.RECV) else self.unit.block_step
        return f"{self.op.value} {name}"
