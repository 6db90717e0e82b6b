"""Runs a schedule against the clock without doing its work: stages, bounded edges, and who decodes."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple, NoReturn

from dualparal.schedule.actions import DECODE_BOUND, Action, Op, Unit
from dualparal.schedule.schedule import Schedule


class Event(NamedTuple):
    """An action with the time (ticks, or the seconds of ``Costs``) in which its stage waited for it and ran it."""

    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Costs:
    """Durations for a replay, in seconds. The defaults count ticks: a RUN takes one, everything else none.

    Attributes:
        run: (stage, unit) -> seconds.
        transfer: (edge, unit) -> seconds in which the edge carries nothing else.
        latency: (edge) -> seconds from the end of the transfer until the message is there.
        update: seconds of a sampler step on stage 0.
        decode: (block) -> seconds of the part that each of ``Schedule.decoders`` decodes.
        decode_shares: decoding takes its seconds from the device of the stage beside which it runs.
        hand_over: (block) -> seconds until a finished block's latents are at other places that decode.
    """

    run: Callable[[int, Unit], float] = lambda stage, unit: 1
    transfer: Callable[[int, Unit], float] = lambda edge, unit: 0
    latency: Callable[[int], float] = lambda edge: 0
    update: float = 0
    decode: Callable[[int], float] = lambda block: 0
    decode_shares: bool = False
    hand_over: Callable[[int], float] = lambda block: 0


TICKS = Costs()


class ScheduleError(Exception):
    """A schedule that reads what is not there, or hangs. The message carries the grid."""


Ready = dict[tuple[int, int], float]  # (video, block) -> when its frames (without decoding: its latents) are there


class Replayed(NamedTuple):
    """The findings of a replay.

    Attributes:
        events: each place's in order, first those of the stages.
        ready: when each block's frames are there.
        decoding: of each of ``Schedule.decoders`` in order: the times of its work on each block.
    """

    events: list[Event]
    ready: Ready
    decoding: list[list[Event]]


def replay(schedule: Schedule, costs: Costs = TICKS, units: int | None = None) -> Replayed:
    """Runs all stages against each other with bounded buffers, and who decodes beside them.

    Places that only decode go in step, each block as one, and share nothing with the stages. In place every stage
    decodes its part at its own pace, its device shared with its units: what parts wait for each other's rows within a
    block is not counted. A block that comes while a later stage's clock is beyond that time starts at its clock.

    Args:
        costs: durations. Default: a RUN takes one tick, everything else none.
        units: number of units after which the replay stops (needed for an endless schedule).

    Raises:
        ScheduleError: no stage can go on (deadlock); with the grid so far in ticks, and the action at which each
            stage waits.
        ValueError: an endless schedule and no number of units.
    """
    return _Replay(schedule, units, costs).run()


def grid(schedule: Schedule, units: int | None = None) -> str:
    """The replay in ticks as text: a line per tick, a column per stage and per place that only decodes."""
    return format_grid(schedule.num_stages, replay(schedule, units=units).events)


def makespan(schedule: Schedule) -> int:
    """Ticks of a whole schedule, a RUN taking one."""
    return round(max(event.end for event in replay(schedule).events))


def bubble(schedule: Schedule) -> float:
    """Share of stage-ticks in which a stage does not run. The schedule has an end."""
    assert schedule.num_units is not None, "an endless schedule has no bubble"
    return 1 - schedule.num_units / makespan(schedule)


class _Edge:
    """Messages of one directed edge: the wire, and buffers of the receiver, without which nobody sends."""

    def __init__(self, depth: int) -> None:
        self.free: deque[float] = deque([0] * depth)  # when a buffer of the receiver is free again
        self.sent: deque[tuple[float, Unit]] = deque()  # what waits for the wire or a buffer of the receiver
        self.arrived: deque[tuple[float, Unit]] = deque()
        self.wire: float = 0  # when the wire is free

    def send(self, now: float, unit: Unit) -> float | None:
        """Puts a message on the edge. Returns the time at which the sender goes on; None: not known yet, try again."""
        if not self.free:
            return None
        end = max(now, self.free[0])
        self.sent.append((end, unit))
        return end

    def move(self, transfer: Callable[[Unit], float], latency: float) -> None:
        """Carries every message that has been sent and finds a buffer of the receiver."""
        while self.sent and self.free:
            sent, unit = self.sent.popleft()
            self.wire = max(sent, self.free.popleft(), self.wire) + transfer(unit)
            self.arrived.append((self.wire + latency, unit))


class _Job:
    """A block in a decoder's hands."""

    def __init__(self, action: Action, arrival: float, left: float) -> None:
        self.action = action
        self.arrival = arrival
        self.left = left  # seconds of work
        self.begin: float | None = None


class _Decoder:
    """Decodes blocks in order, beside a stage's units or on its own (``decoding``).

    Attributes:
        shared: it takes its time from the stage's device: while both work, each goes at half its speed.
        finished: when each block was, by (video, block).
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.now: float = 0
        self.jobs: deque[_Job] = deque()
        self.finished: Ready = {}
        self.events: list[Event] = []

    def submit(self, action: Action, arrival: float, seconds: float) -> None:
        """Takes a block that is there at the time ``arrival``."""
        self.jobs.append(_Job(action, arrival, seconds))

    def run(self, now: float, seconds: float) -> float:
        """Lets the stage run a unit. Returns the time at which it ends."""
        self.advance(now)
        while self.shared and self.jobs and self.jobs[0].arrival < now + seconds:
            job = self.jobs[0]
            alone = max(0, job.arrival - now)
            both = min(job.left, seconds - alone)
            self.now = max(self.now, now + alone)
            now, seconds = now + alone + 2 * both, seconds - alone - both
            self._work(both, now)
            if not seconds:
                break
        if self.shared:  # what comes late starts here
            self.now = max(self.now, now + seconds)
        return now + seconds

    def advance(self, until: float) -> None:
        """Decodes up to the time ``until``, with the device to itself."""
        while self.jobs:
            job = self.jobs[0]
            start = max(self.now, job.arrival)
            if start > until:
                break
            self.now = start
            if start + job.left > until:
                self._work(until - start, until)
                break
            self._work(job.left, start + job.left)
        if until != math.inf:
            self.now = max(self.now, until)

    def finish(self, block: tuple[int, int]) -> float:
        """Decodes until a block is finished, with the device to itself. Returns the time at which it was."""
        while block not in self.finished:
            job = self.jobs[0]
            self.advance(max(self.now, job.arrival) + job.left)
        return self.finished[block]

    def _work(self, seconds: float, until: float) -> None:
        """Does some work on the first block, from ``now`` on; it is done at the time ``until``."""
        job = self.jobs[0]
        job.begin = self.now if job.begin is None else job.begin
        job.left, self.now = job.left - seconds, until
        if job.left <= 0:
            self.jobs.popleft()
            unit = job.action.unit
            self.finished[unit.video, unit.block] = until
            self.events.append(Event(job.begin, until, job.action))


class _Replay:
    """An event simulation. Edge k leads from stage k to stage (k + 1) mod N; its receiver holds ``depth`` messages."""

    def __init__(self, schedule: Schedule, units: int | None, costs: Costs) -> None:
        if schedule.num_blocks is None and units is None:
            raise ValueError("an endless schedule needs a number of units to replay")
        self.schedule = schedule
        self.costs = costs
        n = schedule.num_stages
        wanted = None if units is None else set(islice(schedule.units(), units))
        self.pending = [self._finite(schedule.actions(k), wanted, units) for k in range(n)]
        self.edges = [_Edge(schedule.depth) for _ in range(n)]
        self.wires = [(partial(costs.transfer, edge), costs.latency(edge)) for edge in range(n)]
        count, shares = len(schedule.decoders), costs.decode_shares and not schedule.decode_ranks
        self.decoders = [_Decoder(shares) for _ in range(1 if schedule.decode_ranks else count)]
        self.beside = [self.decoders[k] if k in schedule.decoders else None for k in range(n)]
        self.handed: list[tuple[int, int]] = []  # blocks, in order
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

    def run(self) -> Replayed:
        """Runs all of it."""
        moved = True
        while moved:
            moved = False
            for stage, actions in enumerate(self.pending):
                while actions and self._try(stage, actions[0]):
                    actions.popleft()
                    moved = True
            if not moved and self.pending[0] and self.pending[0][0].op is Op.DECODE:
                # All the others wait for stage 0, which waits for their decoders: these have the devices.
                for decoder in self.decoders:
                    decoder.finish(self.handed[-DECODE_BOUND])
                moved = True
        if any(self.pending) and self.schedule.num_blocks is not None:
            self._deadlock()
        for decoder in self.decoders:
            decoder.advance(math.inf)
        for block in self.handed:
            self.ready[block] = max(decoder.finished[block] for decoder in self.decoders)
        return Replayed(self.events + self._of_ranks(), self.ready, self._decoding())

    def _decoding(self) -> list[list[Event]]:
        """The work of every place that decodes."""
        return [
            [event._replace(action=event.action._replace(stage=place)) for event in decoder.events]
            for place, decoder in zip(self.schedule.decoders, cycle(self.decoders), strict=False)
        ]

    def _of_ranks(self) -> list[Event]:
        """The events of places that only decode, with their waits."""
        return [
            Event(before, end, action)
            for events in (self._decoding() if self.schedule.decode_ranks else [])
            for before, (_, end, action) in zip([0.0, *(event.end for event in events)], events, strict=False)
        ]

    def _deadlock(self) -> NoReturn:
        waits = ", ".join(f"stage {k} at '{a[0]}'" for k, a in enumerate(self.pending) if a)
        events = self.events
        if self.costs.run is not TICKS.run:  # who waits for whom does not depend on how long things take
            again = _Replay(self.schedule, None, TICKS)
            with contextlib.suppress(ScheduleError):
                again.run()
            events = again.events
        raise ScheduleError(f"deadlock: {waits}\n{format_grid(self.schedule.num_stages, events)}")

    def _try(self, stage: int, action: Action) -> bool:
        """Replays the action and returns True, if the actions of others so far tell how long it waits and works."""
        op, unit, costs = action.op, action.unit, self.costs
        now = end = self.clock[stage]
        if op is Op.RUN:
            seconds = costs.run(stage, unit)
            beside = self.beside[stage]
            end = now + seconds if beside is None else beside.run(now, seconds)
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
            room = self._room(now)
            if room is None:
                return False
            end = room
            self._hand_over(end, action)
        self.events.append(Event(now, end, action))
        self.clock[stage] = end
        return True

    def _room(self, now: float) -> float | None:
        """The time at which stage 0 can hand over a block; None: not known yet, try again."""
        if len(self.handed) < DECODE_BOUND:
            return now
        oldest = self.handed[-DECODE_BOUND]
        for stage, decoder in enumerate(self.decoders):
            if stage == 0:
                decoder.advance(now)  # stage 0 is idle while it waits, and places that only decode always are
                now = max(now, decoder.finish(oldest))
            elif oldest not in decoder.finished:
                return None
        return max(now, *(decoder.finished[oldest] for decoder in self.decoders))

    def _hand_over(self, now: float, action: Action) -> None:
        """Gives a block to all that decode: to stage 0's decoder at once, to others when it has come there."""
        block = action.unit.block
        self.handed.append((action.unit.video, block))
        for place, decoder in zip(self.schedule.decoders, self.decoders, strict=False):  # in step: the first for all
            there = now + self.costs.hand_over(block) if place else now
            decoder.submit(action, there, self.costs.decode(block))

    def _release(self, stage: int, now: float) -> None:
        """Gives back a receive buffer of the stage at the time ``now``."""
        self.edges[stage - 1].free.append(now)
        self._move((stage - 1) % self.schedule.num_stages)

    def _move(self, edge: int) -> None:
        self.edges[edge].move(*self.wires[edge])


def format_grid(num_stages: int, events: list[Event]) -> str:
    """RUN events of the stages and DECODE events of places that only decode, as a table, a line per tick."""
    cells: dict[tuple[int, int], str] = {}
    for start, end, action in events:
        if action.op is Op.RUN:
            cells[round(start), action.stage] = str(action)
        elif action.stage >= num_stages:  # takes no ticks: several may share a line
            at = round(end), action.stage
            cells[at] = f"{cells[at]}+{action.unit.block_step}" if at in cells else str(action)
    width = max([8, *(len(text) for text in cells.values())]) + 2
    places = max([num_stages, *(1 + place for _, place in cells)])
    names = [f"{'stage' if k < num_stages else 'place'} {k}" for k in range(places)]
    lines = [("tick  " + "".join(name.ljust(width) for name in names)).rstrip()]
    for tick in range(max((tick for tick, _ in cells), default=-1) + 1):
        row = "".join(cells.get((tick, k), ".").ljust(width) for k in range(places))
        lines.append(f"{tick:4d}  {row}".rstrip())
    return "\n".join(lines)
