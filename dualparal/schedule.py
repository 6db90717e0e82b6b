"""The order of work as a value: who runs, sends, receives and updates what, in which order. No torch.

A new block enters every ``gap`` iterations; block b is at step i - b * gap in iteration i (DualParal, section 3, has
a gap of one). A unit is one forward of one block at one step for one guidance branch. All stages run the same
sequence of units; stage 0 also owns latents and samplers, so it receives velocities, updates and emits. Every read
names the version it wants: nothing depends on what happened to arrive. ``validate`` replays a schedule and proves
that.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple, NoReturn

from dualparal.config import CONTEXT_POLICIES, CONTEXT_VERSIONS, BlockConfig, admission_gap


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


class Event(NamedTuple):
    """An action with the time (ticks, or the seconds of ``Costs``) in which its stage waited for it and ran it."""

    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Costs:
    """How long things take, for a replay. The defaults count ticks: a RUN takes one, everything else none.

    run: (stage, unit) -> seconds. transfer: (edge, unit) -> seconds in which the edge carries nothing else.
    latency: (edge) -> seconds from then until the message is there. update: seconds of a sampler step on stage 0.
    decode: (block) -> seconds. decode_shares: it takes them from stage 0's device.
    send_buffers: messages that a sender holds besides the receiver's ``depth`` (between processes: ``depth`` again;
    in one process both ends share theirs: 0).
    """

    run: Callable[[int, Unit], float] = lambda stage, unit: 1
    transfer: Callable[[int, Unit], float] = lambda edge, unit: 0
    latency: Callable[[int], float] = lambda edge: 0
    update: float = 0
    decode: Callable[[int], float] = lambda block: 0
    decode_shares: bool = False
    send_buffers: int = 0


TICKS = Costs()


class ScheduleError(Exception):
    """A schedule that reads what is not there, or hangs. The message carries the grid."""


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

    # Replay -------------------------------------------------------------------------------------------------

    def replay(self, units: int | None = None) -> list[Event]:
        """Runs all stages against each other with bounded buffers, a RUN taking one tick.

        Args:
            units: stop after so many units (needed for an endless schedule).

        Raises:
            ScheduleError: no stage can go on (deadlock), with the grid so far and what each stage waits for.
        """
        return replay(self, TICKS, units)[0]

    def grid(self, units: int | None = None) -> str:
        """The replay as text, a line per tick and a column per stage."""
        return format_grid(self.num_stages, self.replay(units))

    @cached_property
    def makespan(self) -> int:
        """Ticks of the whole schedule, a RUN taking one."""
        return round(max(event.end for event in self.replay()))

    @property
    def bubble(self) -> float:
        """Share of stage-ticks in which a stage does not run."""
        assert self.num_units is not None, "an endless schedule has no bubble"
        return 1 - self.num_units / self.makespan


Ready = dict[tuple[int, int], float]  # (video, block) -> when its frames (without decoding: its latents) are there


def replay(schedule: Schedule, costs: Costs, units: int | None = None) -> tuple[list[Event], Ready]:
    """As ``Schedule.replay``, with costs. Returns the events, each stage's in order, and when each block is ready.

    Raises:
        ScheduleError: deadlock, with the grid so far in ticks.
    """
    run = _Replay(schedule, units, costs)
    return run.run(), run.ready


class _Edge:
    """Messages of one directed edge: buffers of the sender, the wire, buffers of the receiver."""

    def __init__(self, depth: int, send_buffers: int) -> None:
        self.send_buffers = send_buffers
        self.free: deque[float] = deque([0] * send_buffers)  # when a buffer of the sender is free again
        self.posted: deque[float] = deque([0] * depth)  # when a buffer of the receiver is free again
        self.sent: deque[tuple[float, Unit]] = deque()  # what waits for the wire or a buffer of the receiver
        self.arrived: deque[tuple[float, Unit]] = deque()
        self.wire: float = 0  # when the wire is free

    def send(self, now: float, unit: Unit) -> float | None:
        """When the sender goes on; None: nobody can say yet."""
        if self.send_buffers:
            if not self.free:
                return None
            end = max(now, self.free.popleft())
        else:
            if not self.posted:
                return None
            end = max(now, self.posted[0])
        self.sent.append((end, unit))
        return end

    def move(self, transfer: Callable[[Unit], float], latency: float) -> None:
        """Everything that has been sent and finds a buffer."""
        while self.sent and self.posted:
            sent, unit = self.sent.popleft()
            self.wire = max(sent, self.posted.popleft(), self.wire) + transfer(unit)
            self.arrived.append((self.wire + latency, unit))
            if self.send_buffers:
                self.free.append(self.wire)


class _Lane:
    """Decoding beside stage 0, in order, at most ``BOUND`` blocks at once (``lane.DecodeLane``).

    shared: it takes its time from stage 0's device: while both work, each goes at half its speed.
    """

    BOUND = 2

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.now: float = 0
        self.blocks: deque[tuple[int, int]] = deque()
        self.left: deque[float] = deque()  # seconds still to do for each of them
        self.finished: Ready = {}

    def submit(self, now: float, block: tuple[int, int], seconds: float) -> float:
        """When stage 0 goes on."""
        self.advance(now, 1)
        while len(self.left) >= self.BOUND:
            now = self.now + self.left[0]
            self.advance(now, 1)
        self.blocks.append(block)
        self.left.append(seconds)
        self.advance(now, 1)
        return now

    def run(self, now: float, seconds: float) -> float:
        """Stage 0 runs a unit. Returns when it ends."""
        self.advance(now, 1)
        work = sum(self.left) if self.shared else 0
        if not work:
            return now + seconds
        end = now + seconds + min(work, seconds)
        self.advance(now + 2 * min(work, seconds), 0.5)
        return end

    def advance(self, until: float, rate: float) -> None:
        while self.left and self.now + self.left[0] / rate <= until:
            self.now += self.left.popleft() / rate
            self.finished[self.blocks.popleft()] = self.now
        if self.now < until:
            if self.left:
                self.left[0] -= (until - self.now) * rate
            self.now = until


class _Replay:
    """Event simulation. Edge k leads from stage k to stage (k + 1) mod N; its receiver holds ``depth`` messages."""

    def __init__(self, schedule: Schedule, units: int | None, costs: Costs) -> None:
        if schedule.num_blocks is None and units is None:
            raise ValueError("an endless schedule needs a number of units to replay")
        self.schedule = schedule
        self.costs = costs
        n = schedule.num_stages
        wanted = None if units is None else set(islice(schedule.units(), units))
        self.pending = [self._finite(schedule.actions(k), wanted, units) for k in range(n)]
        self.edges = [_Edge(schedule.depth, costs.send_buffers) for _ in range(n)]
        self.lane = _Lane(costs.decode_shares)
        self.clock: list[float] = [0] * n
        self.held: list[bool] = [False] * n  # a receive buffer in use until the unit has run
        self.events: list[Event] = []
        self.ready: Ready = {}

    @staticmethod
    def _finite(actions: Iterator[Action], wanted: set[Unit] | None, units: int | None) -> deque[Action]:
        if wanted is None:
            return deque(actions)
        found: deque[Action] = deque()
        runs = 0
        for action in actions:
            if action.op is Op.RUN and runs == units:
                break
            runs += action.op is Op.RUN
            found.append(action)
        return found

    def run(self) -> list[Event]:
        moved = True
        while moved:
            moved = False
            for stage, actions in enumerate(self.pending):
                while actions and self._try(stage, actions[0]):
                    actions.popleft()
                    moved = True
        if any(self.pending) and self.schedule.num_blocks is not None:
            self._deadlock()
        self.lane.advance(math.inf, 1)
        self.ready.update(self.lane.finished)
        return self.events

    def _deadlock(self) -> NoReturn:
        waits = ", ".join(f"stage {k} at '{a[0]}'" for k, a in enumerate(self.pending) if a)
        events = self.events
        if self.costs.run is not TICKS.run:  # who waits for whom does not depend on how long things take
            again = _Replay(self.schedule, None, replace(TICKS, send_buffers=self.costs.send_buffers))
            with contextlib.suppress(ScheduleError):
                again.run()
            events = again.events
        raise ScheduleError(f"deadlock: {waits}\n{format_grid(self.schedule.num_stages, events)}")

    def _try(self, stage: int, action: Action) -> bool:
        """Does the action if it can; how long the wait and the work take is known from what others did before."""
        op, unit, costs = action.op, action.unit, self.costs
        now = end = self.clock[stage]
        if op is Op.RUN:
            seconds = costs.run(stage, unit)
            end = now + seconds if stage else self.lane.run(now, seconds)
            if self.held[stage]:
                self.held[stage] = False
                self._release(stage, end)
        elif op is Op.SEND:
            sent = self.edges[stage].send(now, unit)
            if sent is None:
                return False
            end = sent
            self._move(stage)
        elif op is Op.RECV:
            arrived = self.edges[stage - 1].arrived
            if not arrived:
                return False
            at, found = arrived.popleft()
            if found != unit:
                raise ScheduleError(f"stage {stage} expects {unit} and is sent {found}")
            end = max(now, at)
            if stage == 0:
                self._release(stage, end)
            else:
                self.held[stage] = True
        elif op is Op.UPDATE:
            end = now + costs.update
        elif op is Op.EMIT:
            self.ready[unit.video, unit.block] = now
        else:
            end = self.lane.submit(now, (unit.video, unit.block), costs.decode(unit.block))
        self.events.append(Event(now, end, action))
        self.clock[stage] = end
        return True

    def _release(self, stage: int, now: float) -> None:
        """A receive buffer of the stage is free."""
        self.edges[stage - 1].posted.append(now)
        self._move((stage - 1) % self.schedule.num_stages)

    def _move(self, edge: int) -> None:
        self.edges[edge].move(partial(self.costs.transfer, edge), self.costs.latency(edge))


def format_grid(num_stages: int, events: list[Event]) -> str:
    """RUN events as a table, a line per tick."""
    cells: dict[tuple[int, int], str] = {
        (round(event.start), event.action.stage): str(event.action) for event in events if event.action.op is Op.RUN
    }
    width = max([8, *(len(text) for text in cells.values())]) + 2
    lines = [("tick  " + "".join(f"stage {k}".ljust(width) for k in range(num_stages))).rstrip()]
    for tick in range(max((start for start, _ in cells), default=-1) + 1):
        row = "".join(cells.get((tick, k), ".").ljust(width) for k in range(num_stages))
        lines.append(f"{tick:4d}  {row}".rstrip())
    return "\n".join(lines)


def validate(schedule: Schedule, units: int | None = None) -> list[Event]:
    """Proves that a schedule can run: no deadlock, and every read finds the version that it names.

    Returns the replayed events.

    Raises:
        ScheduleError: with the action at fault and the grid.
    """
    events = schedule.replay(units)
    try:
        for stage in range(schedule.num_stages):
            _check_features(schedule, [e.action for e in events if e.action.stage == stage])
        _check_latents(schedule, [e.action for e in events if e.action.stage == 0], complete=units is None)
    except ScheduleError as error:
        raise ScheduleError(f"{error}\n{format_grid(schedule.num_stages, events)}") from None
    return events


def _check_features(schedule: Schedule, actions: list[Action]) -> None:
    store: dict[tuple[str, int, int], Features] = {}
    for action in actions:
        if action.op is not Op.RUN:
            continue
        for wanted in schedule.reads(action.unit):
            found = store.get((wanted.side, wanted.slot, wanted.branch))
            if found != wanted:
                raise ScheduleError(f"{action} on stage {action.stage} <- reads {wanted} and would find {found}")
        for made in schedule.writes(action.unit):
            if made.slot >= schedule.slots(made.side):
                raise ScheduleError(f"{action} on stage {action.stage} <- writes {made}: no such slot")
            store[made.side, made.slot, made.branch] = made


def _check_latents(schedule: Schedule, actions: list[Action], complete: bool) -> None:
    for video in range(schedule.num_videos):
        _check_video(schedule, [action for action in actions if action.unit.video == video], complete)


def _check_video(schedule: Schedule, actions: list[Action], complete: bool) -> None:
    version: dict[int, int] = {}
    velocities: dict[tuple[int, int], set[int]] = {}
    emitted: list[int] = []
    for action in actions:
        unit = action.unit
        if action.op is Op.RUN:
            if version.setdefault(unit.block, schedule.steps_done(unit.block)) != unit.step:
                raise ScheduleError(f"{action} <- latents of block {unit.block} are at {version[unit.block]}")
            wanted = schedule.previous_latents(unit)
            before = version.get(unit.block - 1, schedule.steps_done(unit.block - 1))
            if wanted is not None and before != wanted:
                raise ScheduleError(
                    f"{action} <- reads latents of block {unit.block - 1} at {wanted}, which are at {before}"
                )
        if action.op is (Op.RECV if schedule.num_stages > 1 else Op.RUN):
            velocities.setdefault((unit.block, unit.step), set()).add(unit.branch)
        if action.op is Op.UPDATE:
            if velocities.pop((unit.block, unit.step), set()) != set(range(schedule.branches)):
                raise ScheduleError(f"{action} <- a branch is missing")
            version[unit.block] = unit.step + 1
        if action.op is Op.EMIT:
            if version[unit.block] != schedule.num_steps:
                raise ScheduleError(f"{action} <- block is at version {version[unit.block]}")
            emitted.append(unit.block)
    if complete and emitted != list(range(schedule.first_block, schedule.num_blocks or 0)):
        raise ScheduleError(f"blocks leave in the order {emitted}")
