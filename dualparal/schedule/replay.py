"""Runs a schedule against the clock without doing its work: stages, bounded edges, the decoder beside stage 0."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
        decode: (block) -> seconds.
        decode_shares: decoding takes its seconds from stage 0's device.
    """

    run: Callable[[int, Unit], float] = lambda stage, unit: 1
    transfer: Callable[[int, Unit], float] = lambda edge, unit: 0
    latency: Callable[[int], float] = lambda edge: 0
    update: float = 0
    decode: Callable[[int], float] = lambda block: 0
    decode_shares: bool = False


TICKS = Costs()


class ScheduleError(Exception):
    """A schedule that reads what is not there, or hangs. The message carries the grid."""


Ready = dict[tuple[int, int], float]  # (video, block) -> when its frames (without decoding: its latents) are there


def replay(schedule: Schedule, costs: Costs = TICKS, units: int | None = None) -> tuple[list[Event], Ready]:
    """Runs all stages against each other with bounded buffers.

    Args:
        costs: durations. Default: a RUN takes one tick, everything else none.
        units: number of units after which the replay stops (needed for an endless schedule).

    Returns:
        The events, each stage's in order, and the time at which each block is ready.

    Raises:
        ScheduleError: no stage can go on (deadlock); with the grid so far in ticks, and the action at which each
            stage waits.
        ValueError: an endless schedule and no number of units.
    """
    run = _Replay(schedule, units, costs)
    return run.run(), run.ready


def grid(schedule: Schedule, units: int | None = None) -> str:
    """The replay in ticks as text: a line per tick, a column per stage."""
    return format_grid(schedule.num_stages, replay(schedule, units=units)[0])


def makespan(schedule: Schedule) -> int:
    """Ticks of a whole schedule, a RUN taking one."""
    return round(max(event.end for event in replay(schedule)[0]))


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


class _Decoder:
    """Decoding beside stage 0, in order, at most ``DECODE_BOUND`` blocks at once (``decoding.local``).

    shared: it takes its time from stage 0's device: while both work, each goes at half its speed.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.now: float = 0
        self.blocks: deque[tuple[int, int]] = deque()
        self.left: deque[float] = deque()  # seconds still to do for each of them
        self.finished: Ready = {}

    def submit(self, now: float, block: tuple[int, int], seconds: float) -> float:
        """Hands over a finished block. Returns the time at which stage 0 goes on."""
        self.advance(now, 1)
        while len(self.left) >= DECODE_BOUND:
            now = self.now + self.left[0]
            self.advance(now, 1)
        self.blocks.append(block)
        self.left.append(seconds)
        self.advance(now, 1)
        return now

    def run(self, now: float, seconds: float) -> float:
        """Lets stage 0 run a unit. Returns the time at which it ends."""
        self.advance(now, 1)
        work = sum(self.left) if self.shared else 0
        if not work:
            return now + seconds
        end = now + seconds + min(work, seconds)
        self.advance(now + 2 * min(work, seconds), 0.5)
        return end

    def advance(self, until: float, rate: float) -> None:
        """Decodes up to the time ``until``, doing ``rate`` seconds of work per second."""
        while self.left and self.now + self.left[0] / rate <= until:
            self.now += self.left.popleft() / rate
            self.finished[self.blocks.popleft()] = self.now
        if self.now < until:
            if self.left:
                self.left[0] -= (until - self.now) * rate
            self.now = until


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
        self.decoder = _Decoder(costs.decode_shares)
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
        self.decoder.advance(math.inf, 1)
        self.ready.update(self.decoder.finished)
        return self.events

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
            end = now + seconds if stage else self.decoder.run(now, seconds)
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
            end = self.decoder.submit(now, (unit.video, unit.block), costs.decode(unit.block))
        self.events.append(Event(now, end, action))
        self.clock[stage] = end
        return True

    def _release(self, stage: int, now: float) -> None:
        """Gives back a receive buffer of the stage at the time ``now``."""
        self.edges[stage - 1].free.append(now)
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
