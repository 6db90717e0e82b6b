"""The actions of stage 0, which besides its layers owns latents and samplers: velocities come back to it. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from dualparal.schedule.actions import Action, Op, Unit


class Order(Protocol):
    """The part of a schedule that stage 0 asks. Attributes and methods are those of ``Schedule``."""

    @property
    def num_stages(self) -> int: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def decode(self) -> bool: ...

    def units(self) -> Iterator[Unit]: ...

    def completes(self, unit: Unit) -> bool: ...

    def needs(self, unit: Unit) -> set[Unit]: ...


def first_stage(order: Order) -> Iterator[Action]:
    """Yields the actions of stage 0, which takes a velocity when a unit needs it, at the latest when the pipe is full.

    A velocity is back after N ticks; asking for it sooner would make stage 0 wait, much later would fill the
    buffers between the stages. ``depth - 1`` ticks of slack absorb jitter.
    """
    lag = order.num_stages + order.depth - 1
    out: deque[Unit] = deque()  # units on their way through the stages, oldest first

    def receive() -> Iterator[Action]:
        unit = out.popleft()
        if order.num_stages > 1:
            yield Action(Op.RECV, 0, unit)
        if order.completes(unit) and unit.step < order.num_steps:
            block = unit._replace(branch=0)
            yield Action(Op.UPDATE, 0, block)
            if unit.step == order.num_steps - 1:
                yield Action(Op.EMIT, 0, block)
                if order.decode:
                    yield Action(Op.DECODE, 0, block)

    for unit in order.units():
        needs = order.needs(unit)
        while out and (len(out) >= lag or any(u._replace(branch=0) in needs for u in out)):
            yield from receive()
        yield Action(Op.RUN, 0, unit)
        if order.num_stages > 1:
            yield Action(Op.SEND, 0, unit)
        out.append(unit)
        if order.num_stages == 1 and order.completes(unit):
            while out:  # nothing travels: the velocities are there at once
                yield from receive()
    while out:
        yield from receive()
