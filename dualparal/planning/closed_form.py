"""Times of a run in closed form, without a replay. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dualparal.schedule.actions import DECODE_BOUND
from dualparal.schedule.schedule import Schedule


class Estimate(NamedTuple):
    """A run in closed form.

    Attributes:
        seconds: to the last frame; infinite for an endless video.
        first_frame: seconds to the first block's frames.
        block: seconds from one finished block to the next, once the pipe is full.
    """

    seconds: float
    first_frame: float
    block: float


def closed_form(schedule: Schedule, stages: Sequence[float], hop: float, decode: float = 0.0) -> Estimate:
    """Times of a run without a replay, for units that all cost the same.

    An iteration takes the slowest stage's time for all of its units, or a whole round of the pipe when there are too
    few of them: a block's next step needs its last one, and with ``paper`` that of the block before, which comes later
    in an iteration. From the T-th on blocks are decoded: in the time that stage 0 has to spare, in place in that which
    the slowest stage has, on places of their own all the time; and when ``DECODE_BOUND`` of them wait, everything
    waits.

    While the pipe is full all periods of ``gap`` iterations are alike. Those that change nothing but the clock, or add
    the same to what waits for the decoder, are not walked one by one: the work does not grow with the video.

    Args:
        schedule: the order of work.
        stages: seconds of a unit on each stage.
        hop: seconds of all edges together.
        decode: seconds of a block's part on each place that decodes.
    """
    slowest, around = max(stages), sum(stages) + hop
    units = schedule.units_per_block / schedule.num_steps  # of a step
    least = around + (units * schedule.policy.blocks_awaited - 1) * slowest
    beside = None if schedule.decode_ranks else slowest if schedule.decode_in_place else stages[0]
    clock = _Clock(schedule, (slowest, least), decode, beside)
    gap, blocks = schedule.gap, schedule.num_blocks
    full = -(-schedule.num_steps // gap) * gap  # from here on periods are alike, up to where no new block enters
    iteration, ramp_down = 0, math.inf if blocks is None else blocks * gap
    block = math.nan
    while blocks is None or iteration < (blocks - 1) * gap + schedule.num_steps:
        alike = iteration >= full and iteration % gap == 0 and iteration + gap <= ramp_down
        if not alike:
            clock.pass_iteration(iteration)
            iteration += 1
            continue
        left = math.inf if blocks is None else (ramp_down - iteration) // gap
        more, block = clock.pass_periods(iteration, left)
        if more == math.inf:
            return Estimate(math.inf, clock.first, block)
        iteration += int(more) * gap
    if math.isnan(block):  # a video too short to fill the pipe
        block = max(schedule.units_per_block * slowest, decode)
    return Estimate(clock.now + clock.backlog, clock.first, block)


class _Clock:
    """Time and the decoder's backlog, both in seconds, as iterations pass.

    Args:
        schedule: the order of work.
        units: seconds of a unit on the slowest stage, and the least that an iteration takes.
        decode: as in ``closed_form``.
        beside: seconds of a unit on the stage beside which is decoded; None: it has the card to itself.
    """

    def __init__(self, schedule: Schedule, units: tuple[float, float], decode: float, beside: float | None) -> None:
        self.schedule, self.decode, self.beside = schedule, decode, beside or 0.0
        self.slowest, self.least = units
        self.now = self.backlog = self.first = 0.0
        self._room = (math.inf, math.inf)  # how far the backlog stayed from 0 and from its bound

    def pass_iteration(self, iteration: int) -> None:
        """Passes an iteration of the schedule."""
        own = self.schedule
        blocks = own.in_flight(iteration)
        units = own.branches * len(blocks)
        if own.conditional_only:
            units = sum(own.branches_at(iteration - block * own.gap) for block in blocks)
        duration = max(units * self.slowest, self.least)
        left = self.backlog - (duration - units * self.beside)
        self.now, self.backlog = self.now + duration, max(0.0, left)
        low, high = min(self._room[0], left), self._room[1]
        done = iteration - self.schedule.num_steps + 1
        if done >= 0 and done % self.schedule.gap == 0:
            self.first = self.first or self.now + self.decode
            self.backlog += self.decode
            room = DECODE_BOUND * self.decode - self.backlog
            high = min(high, room)
            self.now, self.backlog = self.now + max(0.0, -room), self.backlog + min(0.0, room)
        self._room = low, high

    def pass_periods(self, iteration: int, left: float) -> tuple[float, float]:
        """Passes a period and as many of the ``left`` ones as are known to be like it.

        Returns (periods passed, seconds of the last one).
        """
        now, backlog = self.now, self.backlog
        self._room = math.inf, math.inf
        for each in range(iteration, iteration + self.schedule.gap):
            self.pass_iteration(each)
        spent, change = self.now - now, self.backlog - backlog
        left -= 1
        if abs(change) <= 1e-9 * self.decode:
            alike = left
        else:  # the same again, until the backlog comes to one of its ends
            room = self._room[1] if change > 0 else self._room[0]
            alike = min(left, max(0.0, room) // abs(change))
        if alike != math.inf:
            self.now, self.backlog = self.now + alike * spent, self.backlog + alike * change
        return 1 + alike, spent
