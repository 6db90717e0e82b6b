"""The order of work as a value: every stage's runs, sends, receives and updates, in order. No torch.

A new block enters every ``gap`` iterations; block b is at step i - b * gap in iteration i (DualParal, section 3, has
a gap of one). A unit is one forward of one block at one step for one guidance branch. All stages run the same
sequence of units; stage 0 also owns latents and samplers, so it receives velocities, updates and emits. Every read
names the version it wants: nothing depends on what happened to arrive. ``validate`` replays a schedule and proves
that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dualparal.config.blocks import admission_gap
from dualparal.config.engine import EngineConfig
from dualparal.config.reuse import StepPlan
from dualparal.config.video import VideoConfig
from dualparal.schedule.actions import Action, Features, Op, Unit
from dualparal.schedule.first_stage import first_stage
from dualparal.schedule.numbers import ScheduleNumbers
from dualparal.schedule.policies import POLICIES, BlockQueue, Policy


@dataclass(frozen=True)
class Schedule(ScheduleNumbers):
    """The order of work that follows from its numbers. Equal schedules give equal actions.

    Raises:
        ValueError: a number is out of range, or the schedule cannot start at ``start``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or not self.is_restartable(self.start):
            raise ValueError(f"start={self.start}: needs what an earlier iteration left behind; use a refresh")
        if self.num_blocks is not None and self.start and not self.in_flight(self.start):
            raise ValueError(f"start={self.start}: the last block is finished by then; there is nothing to do")

    @classmethod
    def of(
        cls,
        engine: EngineConfig,
        video: VideoConfig,
        *,
        num_stages: int,
        steps: StepPlan,
        num_blocks: int | None,
        num_videos: int,
        start: int = 0,
    ) -> Schedule:
        """The schedule of a run. The engine walks it and the cost model counts it, so both make it here.

        Args:
            engine: how the model is run. video: what is made.
            steps: those at which the model runs.
        """
        blocks, decode = engine.blocks, video.output_type != "latent"
        return cls(
            num_stages=num_stages,
            num_steps=len(steps.runs),
            num_blocks=num_blocks,
            context=blocks.context,
            context_frames=blocks.context_frames,
            guidance=video.guidance,
            conditional_only=steps.conditional_only,
            decode=decode,
            depth=engine.depth,
            max_blocks_in_flight=blocks.max_blocks_in_flight,
            context_version=blocks.context_version,
            num_videos=num_videos,
            refresh_every=blocks.refresh_every,
            key_means=engine.attention_8bit.on,
            start=start,
            decode_ranks=engine.decode_ranks if decode else 0,
            decode_in_place=engine.decode_in_place and decode,
            anchor_frames=blocks.anchor_frames,
        )

    @property
    def branches(self) -> int:
        """Units of a block per step, at most: 2 with guidance, otherwise 1."""
        return 2 if self.guidance else 1

    def branches_at(self, step: int) -> int:
        """Units of a block at ``step``."""
        return 1 if step in self._conditional_only else self.branches

    @cached_property
    def _conditional_only(self) -> frozenset[int]:
        return frozenset(self.conditional_only)

    def completes(self, unit: Unit) -> bool:
        """True when the unit is the last one of its block's step."""
        return unit.branch == self.branches_at(unit.step) - 1

    @cached_property
    def units_per_block(self) -> int:
        """Units of a block in all of its steps."""
        return self.num_steps * self.branches - len(self.conditional_only)

    @cached_property
    def gap(self) -> int:
        """Iterations between the entries of two blocks, and steps between neighbours; 1 to T."""
        return admission_gap(self.num_steps, self.max_blocks_in_flight)

    @cached_property
    def policy(self) -> Policy:
        """The context policy, by its name."""
        return POLICIES[self.context]

    @cached_property
    def _queue(self) -> BlockQueue:
        stands_in = bool(self.conditional_only)
        return BlockQueue(self.num_steps, self.num_blocks, self.gap, self.num_videos, self.context_version, stands_in)

    # The order of units -------------------------------------------------------------------------------------

    def in_flight(self, iteration: int) -> range:
        """Blocks of an iteration, in each video, oldest first. Empty after the last iteration."""
        newest = iteration // self.gap
        if self.num_blocks is not None:
            newest = min(newest, self.num_blocks - 1)
        return range(max(0, (iteration - self.num_steps) // self.gap + 1), newest + 1)

    def units(self) -> Iterator[Unit]:
        """All units in the order in which every stage runs them."""
        iteration = self.start
        while blocks := self.in_flight(iteration):
            for video in range(self.num_videos):
                if self.is_anchored and iteration == max(self.start, self.num_steps):
                    yield from (Unit(0, self.num_steps, branch, video) for branch in range(self.branches))
                for block in blocks if self._oldest_first(iteration) else reversed(blocks):
                    step = iteration - block * self.gap
                    for branch in range(self.branches_at(step)):
                        yield Unit(block, step, branch, video)
            iteration += 1

    @property
    def num_units(self) -> int | None:
        """Units of the whole schedule, from ``start`` on; None: endless."""
        if self.num_blocks is None:
            return None
        begun = range(min(self.num_blocks, self.start // self.gap + 1))
        done = sum(self.branches_at(step) for block in begun for step in range(self.steps_done(block)))
        units = self.num_blocks * self.units_per_block - done + self.is_anchored * self.branches
        return self.num_videos * units

    def iteration(self, unit: Unit) -> int:
        """The iteration in which a unit runs, from 0 on."""
        return unit.block * self.gap + unit.step

    def ends_iteration(self, unit: Unit) -> bool:
        """True when the unit's block is the last one of its iteration, of all videos."""
        iteration = self.iteration(unit)
        blocks = self.in_flight(iteration)
        last = blocks[-1] if self._oldest_first(iteration) else blocks[0]
        return unit.block == last and unit.video == self.num_videos - 1

    def _oldest_first(self, iteration: int) -> bool:
        return self.policy.is_oldest_first and not self._refreshes(iteration)

    def steps_done(self, block: int) -> int:
        """Steps that a block has behind it when the schedule starts, 0 to T."""
        return min(max(0, self.start - block * self.gap), self.num_steps)

    @property
    def first_block(self) -> int:
        """The first block that is not finished when the schedule starts."""
        return self.in_flight(self.start).start

    # Refreshes ----------------------------------------------------------------------------------------------

    def refreshes(self, unit: Unit) -> bool:
        """True when the unit reads nothing that an earlier iteration left behind, by ``refresh_every``."""
        return self._refreshes(self.iteration(unit))

    def _refreshes(self, iteration: int) -> bool:
        every = self.refresh_every
        return every is not None and iteration >= every and iteration % every < self.gap

    def is_restartable(self, iteration: int) -> bool:
        """True when a schedule can start with ``iteration``: it and all later ones read nothing of earlier ones but
        latents and sampler states. Features are read for up to ``gap`` iterations, and that many are refreshes. The
        anchor is made anew from block 0's latents once these are final."""
        stateless = self.policy.is_stateless or self.context_frames == 0
        if iteration and self.is_anchored and iteration < self.num_steps:
            return False
        if iteration == 0 or (stateless and not self.key_means):
            return True
        return self.refresh_every is not None and iteration % self.refresh_every == 0

    @property
    def max_in_flight(self) -> int:
        """Blocks of a video that are on their way at once."""
        most = -(-self.num_steps // self.gap)
        return most if self.num_blocks is None else min(most, self.num_blocks)

    @property
    def windows(self) -> int:
        """Windows of a video's blocks that are on their way at once: a refresh feeds more than the other steps."""
        return self.max_in_flight * (1 if self.refresh_every is None else 2)

    @property
    def places(self) -> int:
        """Blocks of all videos that are on their way at once."""
        return self.max_in_flight * self.num_videos

    def place(self, unit: Unit) -> int:
        """A number from 0 to ``places`` - 1 that no other block in flight has: those of a video are consecutive."""
        return unit.block % self.max_in_flight * self.num_videos + unit.video

    # What a unit reads and leaves ---------------------------------------------------------------------------

    def previous_latents(self, unit: Unit) -> int | None:
        """The version of block b-1's latents that are fed in front: the steps behind them, 1 to T. None: nothing is
        fed."""
        if not (self.policy.feeds_latents or self.refreshes(unit)) or unit.block == 0 or self.context_frames == 0:
            return None
        return min(self.num_steps, unit.step + self.gap)

    def previous_features(self, unit: Unit) -> Features | None:
        """Features of block b-1 that the unit reads: of the policy's ``steps_ahead`` later than its own step, or of
        the last step once that block is done. None: it reads none."""
        if not self.policy.reads_previous or unit.block == 0 or self.context_frames == 0 or self.refreshes(unit):
            return None
        step = min(unit.step + self.policy.steps_ahead(self._queue), self.num_steps - 1)
        return self._tail(self._lender(unit._replace(block=unit.block - 1, step=step)))

    def next_features(self, unit: Unit) -> Features | None:
        """Features of block b+1 that the unit reads: ``gap`` steps noisier, made just before in this iteration.
        None: it reads none."""
        if not self.policy.reads_next or self.context_frames == 0 or unit.step < self.gap:
            return None
        if self.num_blocks is not None and unit.block + 1 >= self.num_blocks:
            return None
        return self._head(self._lender(unit._replace(block=unit.block + 1, step=unit.step - self.gap)))

    def reads(self, unit: Unit) -> tuple[Features, ...]:
        """Features that the unit reads, in the order in which keys follow its own ones: next, previous, anchor."""
        if self.makes_anchor(unit):
            return ()
        found = self.next_features(unit), self.previous_features(unit), self.anchor_features(unit)
        return tuple(features for features in found if features)

    def writes(self, unit: Unit) -> tuple[Features, ...]:
        """Features that the unit leaves behind, because a later one reads them: head, tail, anchor."""
        if self.makes_anchor(unit):
            return (self._anchor(unit),)
        found = []
        if self.slots("head") and unit.block > 0 and self._is_run(unit._replace(step=unit.step + self.gap)):
            found.append(self._head(unit))
        last = self.num_blocks is not None and unit.block + 1 >= self.num_blocks
        if self.slots("tail") and not last and self._tail_is_read(unit):
            found.append(self._tail(unit))
        if self._anchor_is_read(unit):
            found.append(self._anchor(unit))
        return tuple(found)

    def _tail_is_read(self, unit: Unit) -> bool:
        """True when the next block reads the unit's tail: one step of it does, or, of the tail of the last step, any
        that is left. A refresh reads none."""
        first = unit.step - self.policy.steps_ahead(self._queue)
        steps = range(first, self.num_steps) if unit.step == self.num_steps - 1 else [first]
        after = unit._replace(block=unit.block + 1)
        readers = (after._replace(step=step) for step in steps)
        return any(reader.step >= 0 and self._is_run(reader) and not self.refreshes(reader) for reader in readers)

    def _is_run(self, unit: Unit) -> bool:
        """True when a step has this branch."""
        return unit.step < self.num_steps and unit.branch < self.branches_at(unit.step)

    def _lender(self, unit: Unit) -> Unit:
        """The unit whose features are read where those of ``unit`` are wanted: itself, or the conditional one."""
        return unit if self._is_run(unit) else unit._replace(branch=0)

    def before(self, unit: Unit) -> int | None:
        """The step of the block's last unit of this branch, if no refresh lies between or is that unit; else None."""
        for step in reversed(range(unit.step)):
            earlier = unit._replace(step=step)
            if self.refreshes(earlier):
                return None
            if self._is_run(earlier):
                return step
        return None

    def slots(self, side: str) -> int:
        """Slots per layer and branch that a store of features needs for ``side``: as few as will do.

        What a unit overwrites it may read first. Hence "head" needs one, since it is read at once; two, where the
        unconditional unit may read what the conditional one before it would overwrite.
        """
        if side == "anchor":
            return self.num_videos * self.is_anchored
        if self.context_frames == 0 or self.num_blocks == 1:
            return 0
        if side == "head":
            return (1 + self._queue.stands_in) * (self.policy.reads_next and self.gap < self.num_steps)
        return self.policy.tail_slots(self._queue) if self.policy.reads_previous else 0

    def _head(self, unit: Unit) -> Features:
        slot = unit.block % 2 if self._queue.stands_in else 0
        return Features("head", unit.block, unit.step, unit.branch, slot, unit.video, self.refreshes(unit))

    def _tail(self, unit: Unit) -> Features:
        slot = self.policy.tail_slot(self._queue, unit)
        return Features("tail", unit.block, unit.step, unit.branch, slot, unit.video, self.refreshes(unit))

    # The anchor ---------------------------------------------------------------------------------------------

    @property
    def is_anchored(self) -> bool:
        """True when later blocks read features of the first frames of block 0."""
        return self.anchor_frames > 0 and self.num_blocks != 1

    def makes_anchor(self, unit: Unit) -> bool:
        """True for units that run once block 0 is finished, on its final latents: they read nothing and move nothing,
        they leave the anchor of all iterations to come. Their step is T, one behind the last."""
        return unit.step == self.num_steps

    def anchor_features(self, unit: Unit) -> Features | None:
        """The newest features of block 0's first frames, by the order of work. None: it reads none."""
        if not self.is_anchored or unit.block == 0:
            return None
        iteration = self.iteration(unit)
        if iteration >= self.num_steps:
            return self._anchor(unit._replace(block=0, step=self.num_steps))
        made = iteration if self._oldest_first(iteration) else iteration - 1
        return self._anchor(self._lender(unit._replace(block=0, step=made)))

    def _anchor_is_read(self, unit: Unit) -> bool:
        """True when the unit is the newest of block 0 in an iteration in which later blocks have this branch."""
        if not self.is_anchored or unit.block != 0:
            return False
        readers = [i for i in (unit.step, unit.step + 1) if (i == unit.step) == self._oldest_first(i)]
        steps = [i - block * self.gap for i in readers if i < self.num_steps for block in self.in_flight(i) if block]
        return any(unit.branch < self.branches_at(step) for step in steps)

    def _anchor(self, unit: Unit) -> Features:
        return Features("anchor", 0, unit.step, unit.branch, unit.video, unit.video, self.refreshes(unit))

    # What every place does ----------------------------------------------------------------------------------

    @property
    def decoders(self) -> range:
        """The places that decode, all of them every block, each a part of it; a place is the number of a rank when
        every stage has its own. Empty when nothing is decoded."""
        n = self.num_stages
        if not self.decode:
            return range(0)
        return range(n) if self.decode_in_place else range(n, n + self.decode_ranks) if self.decode_ranks else range(1)

    def actions(self, place: int) -> Iterator[Action]:
        """The actions of one place, in order; of an endless schedule an endless iterator.

        Those of a stage; from ``num_stages`` on those of a place that only decodes. A stage that also decodes does so
        beside its actions (``decodes``).
        """
        if place >= self.num_stages:
            return self.decodes(place)
        return self._first_stage() if place == 0 else self._later_stage(place)

    def decodes(self, place: int) -> Iterator[Action]:
        """The DECODE actions of one of the ``decoders``, in the order in which stage 0 emits the blocks.

        Stage 0 has actions of that name in every case: there they hand over a block that was just emitted, and may wait
        while ``DECODE_BOUND`` others are not decoded.
        """
        for unit in self.units():
            if unit.step == self.num_steps - 1 and self.completes(unit):
                yield Action(Op.DECODE, place, unit._replace(branch=0))

    def _later_stage(self, stage: int) -> Iterator[Action]:
        for unit in self.units():
            for op in (Op.RECV, Op.RUN, Op.SEND):
                yield Action(op, stage, unit)

    def _first_stage(self) -> Iterator[Action]:
        return first_stage(self)

    def needs(self, unit: Unit) -> set[Unit]:
        """Updates that must be done before the unit can run; branch is 0 and means the block."""
        needs = {unit._replace(step=unit.step - 1, branch=0)}
        version = self.previous_latents(unit)
        if version is not None:
            needs.add(unit._replace(block=unit.block - 1, step=version - 1, branch=0))
        return needs
