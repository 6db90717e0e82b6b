"""The order of work as a value: who runs, sends, receives and updates what, in which order. No torch.

A new block enters every ``gap`` iterations; block b is at step i - b * gap in iteration i (DualParal, section 3, has
a gap of one). A unit is one forward of one block at one step for one guidance branch. All stages run the same
sequence of units; stage 0 also owns latents and samplers, so it receives velocities, updates and emits. Every read
names the version it wants: nothing depends on what happened to arrive. ``validate`` replays a schedule and proves
that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dualparal.config.blocks import CONTEXT_POLICIES, CONTEXT_VERSIONS, BlockConfig, admission_gap
from dualparal.schedule.actions import Action, Features, Op, Unit


@dataclass(frozen=True)
class Schedule:
    """All numbers that decide the order of work. Equal schedules give equal actions.

    depth: messages that fit between two neighbouring stages (buffers of one directed edge).
    max_blocks_in_flight, context_version: see ``config.BlockConfig``.
    num_videos: independent videos of the same length. In each iteration they follow each other, so that one keeps the
        stages busy while the velocities of another travel.
    num_blocks None: endless; ``actions`` and ``units`` are then endless iterators.
    key_means: whether 8-bit attention keeps a mean of its keys from one step of a block to the next.
    start: the iteration to begin with, for a run that goes on from latents alone: see ``stands_alone``.
    """

    num_stages: int  # N
    num_steps: int  # T
    num_blocks: int | None  # M
    context: str = "cached"
    context_frames: int = 4  # C; 0: no reads between blocks
    guidance: bool = True
    decode: bool = True
    depth: int = 2
    max_blocks_in_flight: int | None = None  # K
    context_version: str = "matching"
    num_videos: int = 1  # V
    refresh_every: int | None = None  # R
    key_means: bool = False
    start: int = 0

    def __post_init__(self) -> None:
        for name, low in (("num_stages", 1), ("num_steps", 1), ("context_frames", 0), ("depth", 1), ("num_videos", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: must be {low} or more")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks}: a video has at least one block (None: endless)")
        if self.context not in CONTEXT_POLICIES:
            raise ValueError(f"context={self.context!r} is not a context policy; use one of {CONTEXT_POLICIES}")
        if self.max_blocks_in_flight is not None and self.max_blocks_in_flight < 1:
            raise ValueError(f"max_blocks_in_flight={self.max_blocks_in_flight}: must be 1 or more (None: no limit)")
        if self.context_version not in CONTEXT_VERSIONS:
            raise ValueError(
                f"context_version={self.context_version!r} is not a version of features; use one of {CONTEXT_VERSIONS}"
            )
        if self.refresh_every is not None and self.refresh_every < 1:
            raise ValueError(f"refresh_every={self.refresh_every}: must be 1 or more (None: never)")
        if self.start < 0 or not self.stands_alone(self.start):
            raise ValueError(f"start={self.start}: needs what an earlier iteration left behind; use a refresh")
        if self.num_blocks is not None and self.start and not self.in_flight(self.start):
            raise ValueError(f"start={self.start}: the last block is finished by then; there is nothing to do")

    @classmethod
    def of(
        cls,
        blocks: BlockConfig,
        *,
        num_stages: int,
        num_steps: int,
        num_blocks: int | None,
        guidance: bool,
        decode: bool,
        depth: int,
        num_videos: int,
        key_means: bool,
        start: int = 0,
    ) -> Schedule:
        """The schedule of a run. The engine walks it and the cost model counts it, so both make it here.

        All numbers that a caller could forget are required; the fields say what they mean.
        """
        return cls(
            num_stages=num_stages,
            num_steps=num_steps,
            num_blocks=num_blocks,
            context=blocks.context,
            context_frames=blocks.context_frames,
            guidance=guidance,
            decode=decode,
            depth=depth,
            max_blocks_in_flight=blocks.max_blocks_in_flight,
            context_version=blocks.context_version,
            num_videos=num_videos,
            refresh_every=blocks.refresh_every,
            key_means=key_means,
            start=start,
        )

    @property
    def branches(self) -> int:
        return 2 if self.guidance else 1

    @property
    def gap(self) -> int:
        """Iterations between the entries of two blocks, and steps between neighbours; 1 to T."""
        return admission_gap(self.num_steps, self.max_blocks_in_flight)

    # The order of units -------------------------------------------------------------------------------------

    def in_flight(self, iteration: int) -> range:
        """Blocks of an iteration, in each video, oldest first."""
        newest = iteration // self.gap
        if self.num_blocks is not None:
            newest = min(newest, self.num_blocks - 1)
        return range(max(0, (iteration - self.num_steps) // self.gap + 1), newest + 1)

    def units(self) -> Iterator[Unit]:
        """All units in the order in which every stage runs them."""
        iteration = self.start
        while blocks := self.in_flight(iteration):
            for video in range(self.num_videos):
                for block in blocks if self._oldest_first(iteration) else reversed(blocks):
                    for branch in range(self.branches):
                        yield Unit(block, iteration - block * self.gap, branch, video)
            iteration += 1

    @property
    def num_units(self) -> int | None:
        if self.num_blocks is None:
            return None
        done = sum(self.steps_done(block) for block in range(min(self.num_blocks, self.start // self.gap + 1)))
        return self.num_videos * (self.num_blocks * self.num_steps - done) * self.branches

    def iteration(self, unit: Unit) -> int:
        return unit.block * self.gap + unit.step

    def ends_iteration(self, unit: Unit) -> bool:
        """Whether the unit's block is the last one of its iteration."""
        iteration = self.iteration(unit)
        blocks = self.in_flight(iteration)
        last = blocks[-1] if self._oldest_first(iteration) else blocks[0]
        return unit.block == last and unit.video == self.num_videos - 1

    def _oldest_first(self, iteration: int) -> bool:
        return self.context == "prior" and not self._refreshes(iteration)

    def steps_done(self, block: int) -> int:
        """Steps that a block has behind it when the schedule starts."""
        return min(max(0, self.start - block * self.gap), self.num_steps)

    @property
    def first_block(self) -> int:
        """The first block that is not finished when the schedule starts."""
        return self.in_flight(self.start).start

    # Refreshes ----------------------------------------------------------------------------------------------

    def refreshes(self, unit: Unit) -> bool:
        """Whether the unit reads nothing that an earlier iteration left behind, by ``refresh_every``."""
        return self._refreshes(self.iteration(unit))

    def _refreshes(self, iteration: int) -> bool:
        every = self.refresh_every
        return every is not None and iteration >= every and iteration % every < self.gap

    def stands_alone(self, iteration: int) -> bool:
        """Whether a schedule can start with an iteration: all that it and later ones read of earlier ones are latents
        and sampler states. Features are read for up to ``gap`` iterations, and so many refresh."""
        stateless = self.context == "paper" or self.context_frames == 0
        if iteration == 0 or (stateless and not self.key_means):
            return True
        return self.refresh_every is not None and iteration % self.refresh_every == 0

    @property
    def max_in_flight(self) -> int:
        """Blocks of a video that are on their way at once."""
        most = -(-self.num_steps // self.gap)
        return most if self.num_blocks is None else min(most, self.num_blocks)

    @property
    def places(self) -> int:
        """Blocks of all videos that are on their way at once."""
        return self.max_in_flight * self.num_videos

    def place(self, unit: Unit) -> int:
        """A number below ``places`` that no other block in flight has: those of a video are consecutive blocks."""
        return unit.block % self.max_in_flight * self.num_videos + unit.video

    # What a unit reads and leaves ---------------------------------------------------------------------------

    def previous_latents(self, unit: Unit) -> int | None:
        """The version of block b-1's latents that are fed in front; None: nothing is fed."""
        if not (self.context == "paper" or self.refreshes(unit)) or unit.block == 0 or self.context_frames == 0:
            return None
        return min(self.num_steps, unit.step + self.gap)

    def previous_features(self, unit: Unit) -> Features | None:
        """Features of block b-1 that the unit reads. ``cached``: of the same step ("matching"), or of its step in the
        iteration before ("newest"); ``prior``: of the one before it in this iteration. Of its last step once it is
        done."""
        if self.context == "paper" or unit.block == 0 or self.context_frames == 0 or self.refreshes(unit):
            return None
        step = min(unit.step + self._ahead, self.num_steps - 1)
        return self._tail(unit._replace(block=unit.block - 1, step=step))

    def next_features(self, unit: Unit) -> Features | None:
        """Features of block b+1 that the unit reads: ``gap`` steps noisier, made just before in this iteration."""
        if self.context == "prior" or self.context_frames == 0 or unit.step < self.gap:
            return None
        if self.num_blocks is not None and unit.block + 1 >= self.num_blocks:
            return None
        return self._head(unit._replace(block=unit.block + 1, step=unit.step - self.gap))

    def reads(self, unit: Unit) -> tuple[Features, ...]:
        """In the order in which their keys follow the unit's own ones: next, previous."""
        return tuple(f for f in (self.next_features(unit), self.previous_features(unit)) if f)

    def writes(self, unit: Unit) -> tuple[Features, ...]:
        """Features that somebody will read."""
        found = []
        if self.slots("head") and unit.block > 0 and unit.step + self.gap < self.num_steps:
            found.append(self._head(unit))
        last = self.num_blocks is not None and unit.block + 1 >= self.num_blocks
        if self.slots("tail") and not last and self._tail_is_read(unit):
            found.append(self._tail(unit))
        return tuple(found)

    def _tail_is_read(self, unit: Unit) -> bool:
        """By one step of the next block; what the last step leaves, by all that are left when it is done."""
        first = unit.step - self._ahead
        steps = range(first, self.num_steps) if unit.step == self.num_steps - 1 else [first]
        after = unit._replace(block=unit.block + 1)
        return any(step >= 0 and not self.refreshes(after._replace(step=step)) for step in steps)

    @property
    def _ahead(self) -> int:
        """So many steps cleaner than its own are the features that a block reads of its predecessor."""
        if self.context == "prior":
            return self.gap
        return self.gap - 1 if self.context_version == "newest" else 0

    def slots(self, side: str) -> int:
        """Slots per layer and branch that a feature store needs for "head" or "tail": as few as will do.

        What a unit overwrites it may read first. Hence "head" needs one, since it is read at once, and with ``cached``
        a block takes over its predecessor's slots.
        """
        if self.context_frames == 0 or self.num_blocks == 1:
            return 0
        if side == "head":
            return 0 if self.context == "prior" or self.gap >= self.num_steps else 1
        if self.context == "paper":
            return 0
        if self.context == "prior":
            # What the block before left at its last step, and besides what is read at once.
            return self.num_videos + (self.num_blocks != 2 and self.gap + 1 < self.num_steps)
        return self.num_videos * self._video_slots

    @property
    def _video_slots(self) -> int:
        """``cached``: slots of a video."""
        needed = self._relay_slots
        return needed if self.num_blocks is None else min(needed, self._copies * (self.num_blocks - 1))

    @property
    def _copies(self) -> int:
        """``cached``: features of one block that are kept at once."""
        return 1 if self.context_version == "newest" else self.gap

    @property
    def _relay_slots(self) -> int:
        """``cached``: slots for any number of blocks, one per step ("matching") or per block in flight ("newest")."""
        return self.num_steps if self.context_version == "matching" else -(-self.num_steps // self.gap)

    def _head(self, unit: Unit) -> Features:
        return Features("head", unit.block, unit.step, unit.branch, 0, unit.video, self.refreshes(unit))

    def _tail(self, unit: Unit) -> Features:
        left = self.num_steps - 1 - unit.step
        if self.context == "prior":
            slot = unit.video if left == 0 else self.slots("tail") - 1
        elif self._video_slots < self._relay_slots:  # few blocks: each keeps its own
            slot = unit.block * self._copies + unit.step % self._copies
        elif self.context_version == "matching":
            slot = unit.step  # the only reader is the block after, at this step, which then writes there
        else:
            slot = -(-left // self.gap)  # where the block after has just read when this one gets there
        if self.context == "cached":
            slot += unit.video * self._video_slots
        return Features("tail", unit.block, unit.step, unit.branch, slot, unit.video, self.refreshes(unit))

    # What every stage does ----------------------------------------------------------------------------------

    def actions(self, stage: int) -> Iterator[Action]:
        """The actions of one stage, in order."""
        return self._first_stage() if stage == 0 else self._later_stage(stage)

    def _later_stage(self, stage: int) -> Iterator[Action]:
        for unit in self.units():
            for op in (Op.RECV, Op.RUN, Op.SEND):
                yield Action(op, stage, unit)

    def _first_stage(self) -> Iterator[Action]:
        """Stage 0 takes a velocity when a unit needs it, and at the latest when the pipe would fill up.

        A velocity is back after N ticks; asking for it sooner would make stage 0 wait, much later would fill the
        buffers between the stages. ``depth - 1`` ticks of slack absorb jitter.
        """
        lag = self.num_stages + self.depth - 1
        out: deque[Unit] = deque()  # units on their way through the stages, oldest first

        def receive() -> Iterator[Action]:
            unit = out.popleft()
            if self.num_stages > 1:
                yield Action(Op.RECV, 0, unit)
            if unit.branch == self.branches - 1:
                block = unit._replace(branch=0)
                yield Action(Op.UPDATE, 0, block)
                if unit.step == self.num_steps - 1:
                    yield Action(Op.EMIT, 0, block)
                    if self.decode:
                        yield Action(Op.DECODE, 0, block)

        for unit in self.units():
            needs = self._needs(unit)
            while out and (len(out) >= lag or any(u._replace(branch=0) in needs for u in out)):
                yield from receive()
            yield Action(Op.RUN, 0, unit)
            if self.num_stages > 1:
                yield Action(Op.SEND, 0, unit)
            out.append(unit)
            if self.num_stages == 1 and unit.branch == self.branches - 1:
                while out:  # nothing travels: the velocities are there at once
                    yield from receive()
        while out:
            yield from receive()

    def _needs(self, unit: Unit) -> set[Unit]:
        """Updates that must be done before the unit can run; branch is 0 and means the block."""
        needs = {unit._replace(step=unit.step - 1, branch=0)}
        version = self.previous_latents(unit)
        if version is not None:
            needs.add(unit._replace(block=unit.block - 1, step=version - 1, branch=0))
        return needs
