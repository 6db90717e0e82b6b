"""Executor of one stage: walks its actions, a short branch per action, no cleverness about ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dualparal.decoding.chunks import NonFiniteError
from dualparal.distributed.edges import Inbound, Outbound
from dualparal.distributed.messages import Header, Kind, TransportError
from dualparal.distributed.prompts import PromptChannel
from dualparal.distributed.teams import STOP, Team
from dualparal.runtime.latents import LatentQueue
from dualparal.runtime.nonfinite import FirstMark, mark
from dualparal.runtime.places import FirstPlaces
from dualparal.runtime.stage import Stage, UnitPlan
from dualparal.runtime.threads import ThreadedStage
from dualparal.schedule.actions import Action, Op, Unit
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule
from dualparal.trace.clock import BusyClock

logger = logging.getLogger("dualparal")

Report = Callable[[str, Unit], None]


class Stopped(Exception):
    """The stage before has stopped."""


@dataclass(frozen=True)
class Links:
    """Connections of a stage: edges from the stage before and to the one after, and the channel of prompts.

    The edges are None with a single stage. ``team`` has the ranks of stage 0, where these are several.
    """

    prompts: PromptChannel
    inbound: Inbound | None = None
    outbound: Outbound | None = None
    team: Team | None = None


@dataclass(frozen=True)
class FirstStage:
    """The part of an executor that only stage 0 has: latents, and callbacks for them.

    Attributes:
        queues: the latents of every video.
        on_emit: called with (video, block, final latents [1, C, F, H, W]).
        on_decode: called with (video, block) after ``on_emit``; None when latents are the result.
        on_snapshot_point: called with an iteration that can be restarted, when the latents are those at its start.
        allow_nonfinite: give out blocks with NaN or infinity, with a warning.
    """

    queues: Sequence[LatentQueue]
    on_emit: Callable[[int, int, torch.Tensor], None]
    on_decode: Callable[[int, int], None] | None = None
    on_snapshot_point: Callable[[int], None] | None = None
    allow_nonfinite: bool = False


class StageExecutor:
    """Executor of one stage of a schedule.

    Args:
        schedule: the order of work of all stages.
        layout: the places of blocks in the video.
        index: number of the stage, from 0.
        stage: its layers.
        links: its connections to the other stages.
        clock: adds up the time spent in units, and times actions for the timeline.
        leading: for stage 0, and only for it; of several ranks of it, for the first.
        report: called with a phase (the value of an ``Op``) and the unit before every action.
    """

    def __init__(
        self,
        schedule: Schedule,
        layout: Layout,
        index: int,
        stage: Stage | ThreadedStage,
        links: Links,
        clock: BusyClock,
        leading: FirstStage | None = None,
        report: Report | None = None,
    ) -> None:
        self.schedule = schedule
        self.layout = layout
        self.index = index
        self.stage = stage
        self.inbound, self.outbound, self.prompts = links.inbound, links.outbound, links.prompts
        self.leading = leading
        self.places = None if links.team is None else _first_places(links.team, stage)
        self.report = report or (lambda phase, unit: None)
        self.clock = clock
        self.under_way = 0  # stage 0: units sent and not yet back
        self._hidden: torch.Tensor | None = None
        self._mark: torch.Tensor | None = None  # of the unit under way
        self._first_mark = FirstMark(leading.queues[0].device) if leading else None
        self._prompt = 0
        self._units_left = schedule.num_units  # None: no end
        self._unsent: Unit | None = None  # has run here
        self._prompt_of: dict[tuple[int, int], int] = {}  # by video and block
        self._handlers: dict[Op, Callable[[Unit], None]] = {
            Op.RECV: self._receive_velocity if leading else self._receive_hidden,
            Op.RUN: self._run_first if leading else self._run_later,
            Op.SEND: self._send,
            Op.UPDATE: self._update,
            Op.EMIT: self._emit,
            Op.DECODE: self._decode,
        }
        if self.places is not None and not leading:
            self._handlers |= {Op.RECV: self._pass_velocity, Op.RUN: self._run_beside}
            self._handlers |= dict.fromkeys((Op.UPDATE, Op.EMIT, Op.DECODE), lambda unit: None)

    @property
    def _leading(self) -> FirstStage:
        assert self.leading is not None, "only stage 0 owns latents"
        return self.leading

    def steps(self) -> Iterator[bool]:
        """Performs the actions one by one. Yields True after each, False while the next one has to wait.

        Raises:
            NonFiniteError: a block with NaN or infinity is about to be given out, and ``allow_nonfinite`` is off.
            TransportError: a message arrives that is not the one that the schedule expects.
        """
        for action in self.schedule.actions(self.index):
            while not self._ready(action):
                yield False
            self.report(action.op.value, action.unit)
            try:
                with self.clock.on(action, self.waited):
                    self._handlers[action.op](action.unit)
            except Stopped:
                return
            yield True
        self._finish()

    def stop(self) -> None:
        """Ends a distributed run early on all ranks; called on stage 0. Units under way are thrown away."""
        if self.places is not None:
            if self._unsent is not None and self.outbound is not None:
                self._send(self._unsent)  # other places have sent their part of it
            if self.places.team.leads and self._units_left != 0:
                self.places.team.tell(STOP)
        while self.under_way:
            assert self.inbound is not None
            header, tensor = self.inbound.receive()
            if self.places is not None:
                self._join(header.unit, tensor)
            self.inbound.release()
            self.under_way -= 1
        for edge in (self.outbound, self.inbound):
            if edge is not None:
                edge.stop()
        self._finish()

    def _finish(self) -> None:
        for edge in (self.outbound, self.inbound):
            if edge is not None:
                edge.finish()
        self.prompts.finish()
        if self.places is not None:
            self.places.team.finish()

    def close(self) -> None:
        """Ends what runs beside the stage."""
        self.stage.close()

    def waited(self) -> float:
        """Seconds that the host was blocked by other stages, so far."""
        return sum(edge.waited for edge in (self.inbound, self.outbound) if edge is not None)

    def _ready(self, action: Action) -> bool:
        if action.op is Op.RECV:
            assert self.inbound is not None
            return self.inbound.can_receive()
        if action.op is Op.SEND:
            assert self.outbound is not None
            return self.outbound.can_send()
        return True

    def _receive(self, unit: Unit) -> tuple[Header, torch.Tensor]:
        assert self.inbound is not None
        header, tensor = self.inbound.receive()
        if header.kind is Kind.STOP:
            self.inbound.stop()
            if self.outbound is not None:
                self.outbound.stop()
            self._finish()
            raise Stopped
        if header.unit != unit:
            raise TransportError(f"{self.inbound.name}: {header} arrives where the schedule says {unit}")
        return header, tensor

    def _receive_hidden(self, unit: Unit) -> None:
        header, tensor = self._receive(unit)
        self._hidden, self._mark = tensor[:-1].view(-1, self.stage.inner_dim), tensor[-1:]
        self._prompt = header.prompt
        if not self.stage.knows_prompt(header.prompt):
            self.stage.add_prompt(header.prompt, self.prompts.fetch(header.prompt))

    def _receive_velocity(self, unit: Unit) -> None:
        assert self.inbound is not None
        _, tensor = self._receive(unit)
        queue = self._leading.queues[unit.video]
        velocity, found = (tensor[:-1], tensor[-1:]) if self.places is None else self._join(unit, tensor)
        queue.take(unit, velocity.view(queue.velocity_shape(unit)))
        self._take_mark(unit, found)
        self.inbound.release()
        self.under_way -= 1

    def _join(self, unit: Unit, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity and mark of a unit from the message of every place of stage 0; on others its own part."""
        assert self.places is not None
        velocity, found = tensor[:-1], tensor[-1:]
        if self.leading is not None:
            return self.places.collect(velocity, found, self.plan(unit))
        self.places.give(velocity, found)
        return velocity, found

    def _pass_velocity(self, unit: Unit) -> None:
        assert self.inbound is not None
        self._join(unit, self._receive(unit)[1])
        self.inbound.release()
        self.under_way -= 1

    def _run_first(self, unit: Unit) -> None:
        queue = self._leading.queues[unit.video]
        self._prompt = queue.prompt(unit)
        if not self.stage.knows_prompt(self._prompt):
            embeds = queue.embeds_of(self._prompt)
            self.stage.add_prompt(self._prompt, embeds)
            if self.schedule.num_stages > 1 or self.places is not None:
                self.prompts.publish(self._prompt, embeds)
        hidden = queue.window(unit)
        self._mark = mark(hidden, None, None)
        if self.places is not None:
            self.places.team.tell(self._prompt)
            hidden = self.places.spread(hidden, self._mark, self.plan(unit))
        result = self._run(hidden, unit)
        if self.schedule.num_stages > 1:
            self._hidden, self._unsent = result, unit
            return
        assert self._mark is not None
        if self.places is not None:
            result, self._mark = self.places.collect(result, self._mark, self.plan(unit))
        queue.take(unit, result)
        self._take_mark(unit, self._mark)

    def _run_beside(self, unit: Unit) -> None:
        """Runs this place's part of a unit of stage 0, if the first place says that there is one."""
        assert self.places is not None
        self._prompt = self.places.team.hear()
        if self._prompt == STOP:
            self.stop()
            raise Stopped
        if not self.stage.knows_prompt(self._prompt):
            self.stage.add_prompt(self._prompt, self.prompts.fetch(self._prompt))
        hidden, self._mark = self.places.take(self.plan(unit))
        result = self._run(hidden, unit)
        if self.schedule.num_stages > 1:
            self._hidden, self._unsent = result, unit
        else:
            assert self._mark is not None
            self.places.give(result, self._mark)

    def _run_later(self, unit: Unit) -> None:
        assert self._hidden is not None and self.inbound is not None
        self._hidden = self._run(self._hidden, unit)
        self.inbound.release()

    def _run(self, hidden: torch.Tensor, unit: Unit) -> torch.Tensor:
        if (unit.video, unit.block) not in self._prompt_of:
            self._admit(unit)
        if self._units_left is not None:
            self._units_left -= 1
        with self.clock:
            result = self.stage.run(hidden, self.plan(unit))
        assert self._mark is not None
        self._mark = mark(result, self._mark.to(result.dtype), self.index)
        return result

    def plan(self, unit: Unit) -> UnitPlan:
        """All that schedule and layout say about a unit."""
        refresh = self.schedule.refreshes(unit)
        return UnitPlan(
            unit,
            self._prompt,
            place=self.schedule.place(unit),
            window=self.layout.window(unit.block, refresh),
            fed_context=self.layout.fed_context(unit.block, refresh),
            refresh=refresh,
            before=self.schedule.before(unit),
            reads=self.schedule.reads(unit),
            writes=self.schedule.writes(unit),
            fed_step=min(unit.step + self.schedule.gap, self.schedule.num_steps),
            anchor_shift=self.layout.anchor_shift(unit.block),
        )

    def _admit(self, unit: Unit) -> None:
        """Registers a block that enters, and forgets prompts that only blocks long gone have used."""
        self._prompt_of[unit.video, unit.block] = self._prompt
        self._prompt_of.pop((unit.video, unit.block - self.schedule.max_in_flight), None)
        self.stage.keep_prompts(set(self._prompt_of.values()))

    def _send(self, unit: Unit) -> None:
        assert self._hidden is not None and self.outbound is not None
        self.outbound.send(Header(Kind.UNIT, unit, self._prompt), self._hidden, self._mark)
        self._hidden = self._mark = self._unsent = None
        self.under_way += 1

    def _update(self, unit: Unit) -> None:
        self._leading.queues[unit.video].update(unit.block, unit.step)
        on_snapshot_point = self._leading.on_snapshot_point
        if on_snapshot_point is not None and self.schedule.ends_iteration(unit):
            # Velocities come back in the order of units: nothing of the next iteration has been updated yet.
            after = self.schedule.iteration(unit) + 1
            if self.schedule.is_restartable(after):
                on_snapshot_point(after)

    def _emit(self, unit: Unit) -> None:
        latents = self._leading.queues[unit.video].emit(unit.block)
        if not torch.isfinite(latents).all():
            self._refuse(unit)
        self._leading.on_emit(unit.video, unit.block, latents)

    def _take_mark(self, unit: Unit, found: torch.Tensor) -> None:
        assert self._first_mark is not None
        self._first_mark.take(unit, found)

    def _refuse(self, unit: Unit) -> None:
        """Raises NonFiniteError, unless such blocks are wanted all the same."""
        assert self._first_mark is not None
        origin = self._first_mark.origin()
        where = f"first in {origin}" if origin else "first in an update of the sampler"
        text = f"the latents of block {unit.block} hold NaN or infinity, {where}"
        if not self._leading.allow_nonfinite:
            raise NonFiniteError(f"{text}; it is not given out")
        logger.warning("%s", text)

    def _decode(self, unit: Unit) -> None:
        assert self._leading.on_decode is not None, "the schedule decodes"
        self._leading.on_decode(unit.video, unit.block)


def _first_places(team: Team, stage: Stage | ThreadedStage) -> FirstPlaces:
    assert isinstance(stage, Stage), "ranks have no threads for their places"
    return FirstPlaces(team, stage)


def run_together(executors: Sequence[StageExecutor]) -> Iterator[None]:
    """Runs several stages in one process, each as far as it gets, in turn. Yields after every action."""
    running: list[Any] = [executor.steps() for executor in executors]
    while any(running):
        moved = False
        for index, steps in enumerate(running):
            while steps is not None:
                result = next(steps, None)
                if result is None:
                    running[index] = steps = None
                    moved = True
                elif result:
                    moved = True
                    yield
                else:
                    break
        assert moved, "no stage can go on; the validator should have found this schedule"
