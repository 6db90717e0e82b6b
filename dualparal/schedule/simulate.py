"""The time and memory of a schedule: a replay with costs in seconds, summed up per stage. No torch.

The replay itself (``schedule.replay``) walks ``Schedule.actions`` of every stage, as the executor does; with costs of
one tick it is the base of ``validate``. The origin of costs is not known here (``planning.cost``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dualparal.schedule.actions import Features, Op
from dualparal.schedule.replay import Costs, Event, Ready, replay
from dualparal.schedule.schedule import Schedule


class StageTime(NamedTuple):
    """The time of a stage by its use, seconds.

    Attributes:
        busy: in units; of a place that only decodes: in its parts.
        waiting: for a message, for a buffer, or for the decoder.
        other: sampler updates, and the time before the stage's first action and after its last one.
    """

    busy: float
    waiting: float
    other: float


class Sizes(NamedTuple):
    """Bytes on one rank.

    Attributes:
        fixed: held from start to end (weights, text, workspace, message buffers).
        slot: by side: features in all layers of the stage, for one branch.
        block: latents and sampler state of a block in flight (stage 0).
        decode: held while a block is decoded here.
    """

    fixed: int
    slot: Mapping[str, int]
    block: int = 0
    decode: int = 0


class Usage(NamedTuple):
    """Bytes in use from ``time`` (seconds) on, by their use."""

    time: float
    fixed: int
    features: int
    latents: int
    decode: int

    @property
    def total(self) -> int:
        return self.fixed + self.features + self.latents + self.decode


@dataclass(frozen=True)
class Simulation:
    """A schedule replayed with costs.

    Attributes:
        schedule, costs: the arguments of ``simulate``.
        events: every stage's actions in order, with their times in seconds, and after the stages those of the places
            that only decode.
        ready: (video, block) -> the second at which its frames are there (without decoding: its latents).
        decoding: of each of ``Schedule.decoders``: its work on each block, beside the actions of a stage.
    """

    schedule: Schedule
    costs: Costs
    events: tuple[tuple[Event, ...], ...]
    ready: Ready
    decoding: tuple[tuple[Event, ...], ...]

    @cached_property
    def seconds(self) -> float:
        """From the first unit to the last frame (the makespan)."""
        return max([*self.ready.values(), *(events[-1].end for events in self.events if events)])

    @property
    def first_frame(self) -> float:
        """Seconds until the first block can be watched."""
        return min(self.ready.values())

    @cached_property
    def stages(self) -> tuple[StageTime, ...]:
        """The time of each stage by its use."""
        return tuple(self._stage(stage) for stage in range(self.schedule.num_stages))

    @cached_property
    def decoders(self) -> tuple[StageTime, ...]:
        """The time of each place that only decodes."""
        return tuple(self._stage(place) for place in range(self.schedule.num_stages, len(self.events)))

    @property
    def bubble(self) -> float:
        """Share of the time in which a stage computes no unit, averaged over stages (``trace.RunStats.bubble``)."""
        return 1 - sum(stage.busy for stage in self.stages) / (self.seconds * self.schedule.num_stages)

    def _stage(self, stage: int) -> StageTime:
        busy = waiting = 0.0
        for start, end, action in self.events[stage]:
            if action.op is Op.RUN:
                busy += self.costs.run(stage, action.unit)
            elif stage >= self.schedule.num_stages:
                part = self.costs.decode(action.unit.block)
                busy, waiting = busy + part, waiting + end - start - part
            elif action.op is not Op.UPDATE:
                waiting += end - start
        return StageTime(busy, waiting, self.seconds - busy - waiting)

    def memory(self, stage: int, sizes: Sizes) -> list[Usage]:
        """The bytes in use on the rank of a stage, or of a place that only decodes, over time: a row per change.

        Feature slots count from the unit that fills them to the last one that reads them; the engine allocates all
        of them at the start, so it holds the schedule's number of slots times ``sizes.slot``.
        """
        changes: list[tuple[float, int, int]] = []  # time, column, bytes
        filled: dict[tuple[str, int, int], tuple[float, float]] = {}  # slot -> written, last read

        def close(slot: tuple[str, int, int]) -> None:
            start, end = filled.pop(slot)
            changes.extend([(start, 0, sizes.slot[slot[0]]), (end, 0, -sizes.slot[slot[0]])])

        entered: set[tuple[int, int]] = set()
        for start, end, (op, _, unit) in self.events[stage]:
            if op is Op.RUN:
                for read in self.schedule.reads(unit):
                    filled[_slot(read)] = filled[_slot(read)][0], end
                for made in self.schedule.writes(unit):
                    if _slot(made) in filled:  # a unit may read what it overwrites
                        filled[_slot(made)] = filled[_slot(made)][0], min(filled[_slot(made)][1], start)
                        close(_slot(made))
                    filled[_slot(made)] = start, end
                if stage == 0 and (unit.video, unit.block) not in entered:
                    entered.add((unit.video, unit.block))
                    changes.append((start, 1, sizes.block))
            elif op is Op.EMIT:
                changes.append((end, 1, -sizes.block))
        if stage in self.schedule.decoders:
            for start, end, _ in self.decoding[self.schedule.decoders.index(stage)]:
                changes.extend([(start, 2, sizes.decode), (end, 2, -sizes.decode)])
        for slot in list(filled):
            close(slot)
        rows = [Usage(0.0, sizes.fixed, 0, 0, 0)]
        columns = [0, 0, 0]
        for time, column, change in sorted(changes):  # what is given back at a time comes first
            columns[column] += change
            row = Usage(time, sizes.fixed, *columns)
            if rows[-1].time == time:
                rows[-1] = row
            else:
                rows.append(row)
        return rows


def _slot(features: Features) -> tuple[str, int, int]:
    return features.side, features.slot, features.branch


def simulate(schedule: Schedule, costs: Costs, units: int | None = None) -> Simulation:
    """Replays ``schedule`` with ``costs``.

    Args:
        costs: durations in seconds.
        units: number of units after which the replay stops (needed for an endless schedule).

    Raises:
        ScheduleError: deadlock; the message has the action at which each stage waits, and the grid in ticks.
        ValueError: an endless schedule and no number of units.
    """
    found = replay(schedule, costs, units)
    places: list[list[Event]] = [[] for _ in range(schedule.num_stages + schedule.decode_ranks)]
    for event in found.events:
        places[event.action.stage].append(event)
    return Simulation(schedule, costs, tuple(map(tuple, places)), found.ready, tuple(map(tuple, found.decoding)))
