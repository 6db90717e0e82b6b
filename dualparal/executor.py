"""Walks the actions of one stage: a short branch per action, no cleverness about ranks.

``StageExecutor`` runs a stage; ``LatentQueue`` is what stage 0 owns besides: the latents of the blocks in flight,
their samplers, and the updates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dualparal.finite import FirstMark, mark
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.sampler import BlockSampler, Sampler
from dualparal.schedule.actions import Action, Op, Unit
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule
from dualparal.snapshot import BlockState
from dualparal.stage import Stage
from dualparal.trace import BusyClock
from dualparal.transport import Header, Inbound, Kind, Outbound, PromptChannel, TransportError

logger = logging.getLogger("dualparal")

StepCallback = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
Report = Callable[[str, Unit], None]


class NonFiniteError(ArithmeticError):
    """NaN or infinity in latents; names the block, and the stage and step where it first appeared."""


class Stopped(Exception):
    """The stage before has stopped."""


class LatentQueue:
    """Latents and sampler states of a video's blocks in flight. Owned by stage 0.

    Args:
        noise: block -> initial latents [1, C, F, H, W], float32.
        prompt_of: block -> id of its prompt, asked once, when the block enters.
        embeds_of: id of a prompt -> its embeddings [branches, sequence, text_dim].
        guidance_scales: one per step.
        callback: (block, step, timestep, latents) -> latents, after every update.
    """

    def __init__(
        self,
        schedule: Schedule,
        layout: Layout,
        sampler: Sampler,
        noise: Callable[[int], torch.Tensor],
        prompt_of: Callable[[int], int],
        embeds_of: Callable[[int], torch.Tensor],
        guidance_scales: Sequence[float],
        device: torch.device,
        callback: StepCallback | None = None,
    ) -> None:
        self.schedule = schedule
        self.layout = layout
        self.sampler = sampler
        self.noise = noise
        self.prompt_of = prompt_of
        self.embeds_of = embeds_of
        self.guidance_scales = guidance_scales
        self.device = device
        self.callback = callback
        self._latents: dict[int, torch.Tensor] = {}
        self._states: dict[int, BlockSampler] = {}
        self._prompts: dict[int, int] = {}
        self._velocity: dict[tuple[int, int], torch.Tensor] = {}  # by block and branch

    def state(self) -> dict[int, BlockState]:
        """Latents and sampler states of the blocks in flight, which nobody will write to."""
        return {block: BlockState(self._latents[block], state.state()) for block, state in self._states.items()}

    def restore(self, blocks: Mapping[int, BlockState], before: torch.Tensor | None) -> None:
        """Goes on with a ``state``. before: the final latents of the block before the first."""
        if before is not None:
            self._latents[self.schedule.first_block - 1] = before.to(self.device)
        for block in sorted(blocks):
            self._prompts[block] = self.prompt_of(block)
            self._latents[block] = blocks[block].latents.to(self.device)
            self._states[block] = self.sampler.start()
            self._states[block].restore(blocks[block].sampler, self.device)

    def prompt(self, unit: Unit) -> int:
        """The prompt of the unit's block; a block enters with its first unit."""
        if unit.block not in self._prompts:
            self._prompts[unit.block] = self.prompt_of(unit.block)
            self._latents[unit.block] = self.noise(unit.block).to(self.device)
            self._states[unit.block] = self.sampler.start()
        return self._prompts[unit.block]

    def window(self, unit: Unit) -> torch.Tensor:
        """What the model is fed: [1, C, F, H, W], for ``paper`` and in a refresh with the end of the block before."""
        own = self._latents[unit.block]
        fed = self.layout.fed_context(unit.block, self.schedule.refreshes(unit))
        if not fed:
            return own
        return torch.cat([self._latents[unit.block - 1][:, :, -fed:], own], dim=2)

    def velocity_shape(self, unit: Unit) -> torch.Size:
        return self._latents[unit.block].shape

    def take(self, unit: Unit, velocity: torch.Tensor) -> None:
        """Keeps a copy of a branch's velocity until the update."""
        self._velocity[unit.block, unit.branch] = velocity.clone()

    def update(self, block: int, step: int) -> None:
        """One sampler step from the velocities of the block's branches."""
        velocity = [self._velocity.pop((block, branch)) for branch in range(self.schedule.branches)]
        guided = combine_guidance(*velocity, self.guidance_scales[step]) if len(velocity) == 2 else velocity[0]
        latents = self._states[block].step(guided, step, self._latents[block])
        if self.callback is not None:
            latents = self.callback(block, step, self.sampler.timesteps[step], latents)
        self._latents[block] = latents

    def emit(self, block: int) -> torch.Tensor:
        """The block's final latents. Its successor may still read them, its predecessor is forgotten."""
        del self._states[block]
        self._latents.pop(block - 1, None)
        self._prompts.pop(block - 1, None)
        return self._latents[block]


class StageExecutor:
    """One stage of a schedule.

    Args:
        inbound, outbound: edges from the stage before and to the one after; None with a single stage.
        queues: of every video; stage 0 only.
        clock: adds up the time spent in units, and times actions for the timeline.
        on_emit, on_decode: stage 0 only, called with (video, block, latents) and (video, block).
        on_cut: stage 0 only, called with an iteration that stands alone when the latents are those at its start.
        allow_nonfinite: whether blocks with NaN or infinity are given out, with a warning.
        report: called with a phase and the unit before every action.
    """

    def __init__(
        self,
        schedule: Schedule,
        layout: Layout,
        index: int,
        stage: Stage,
        inbound: Inbound | None,
        outbound: Outbound | None,
        prompts: PromptChannel,
        clock: BusyClock,
        queues: Sequence[LatentQueue] = (),
        on_emit: Callable[[int, int, torch.Tensor], None] | None = None,
        on_decode: Callable[[int, int], None] | None = None,
        on_cut: Callable[[int], None] | None = None,
        report: Report | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        self.schedule = schedule
        self.layout = layout
        self.index = index
        self.allow_nonfinite = allow_nonfinite
        self.stage = stage
        self.inbound, self.outbound = inbound, outbound
        self.prompts = prompts
        self.queues = queues
        self.on_emit, self.on_decode, self.on_cut = on_emit, on_decode, on_cut
        self.report = report or (lambda phase, unit: None)
        self.clock = clock
        self.under_way = 0  # stage 0: units sent and not yet back
        self._hidden: torch.Tensor | None = None
        self._mark: torch.Tensor | None = None  # of the unit under way
        self._first_mark = FirstMark(queues[0].device) if queues else None
        self._prompt = 0
        self._prompt_of: dict[tuple[int, int], int] = {}  # by video and block
        self._handlers: dict[Op, Callable[[Unit], None]] = {
            Op.RECV: self._receive_velocity if queues else self._receive_hidden,
            Op.RUN: self._run_first if queues else self._run_later,
            Op.SEND: self._send,
            Op.UPDATE: self._update,
            Op.EMIT: self._emit,
            Op.DECODE: self._decode,
        }

    def steps(self) -> Iterator[bool]:
        """Performs the actions one by one. Yields True after each, False while the next one has to wait."""
        for action in self.schedule.actions(self.index):
            while not self._ready(action):
                yield False
            self.report(action.op.value, action.unit)
            try:
                with self.clock.on(action, self._waited):
                    self._handlers[action.op](action.unit)
            except Stopped:
                return
            yield True
        self._finish()

    def stop(self) -> None:
        """Stage 0 of a distributed run: ends it early on all ranks. What is under way is thrown away."""
        assert self.inbound is not None and self.outbound is not None
        while self.under_way:
            self.inbound.receive()
            self.inbound.release()
            self.under_way -= 1
        self.outbound.stop()
        self.inbound.stop()
        self._finish()

    def _finish(self) -> None:
        if self.outbound is not None:
            self.outbound.finish()
        self.prompts.finish()

    def _waited(self) -> float:
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
        queue = self.queues[unit.video]
        shape = queue.velocity_shape(unit)
        queue.take(unit, tensor[: shape.numel()].view(shape))
        self._take_mark(unit, tensor[-1:])
        self.inbound.release()
        self.under_way -= 1

    def _run_first(self, unit: Unit) -> None:
        queue = self.queues[unit.video]
        self._prompt = queue.prompt(unit)
        if not self.stage.knows_prompt(self._prompt):
            embeds = queue.embeds_of(self._prompt)
            self.stage.add_prompt(self._prompt, embeds)
            if self.schedule.num_stages > 1:
                self.prompts.publish(self._prompt, embeds)
        window = queue.window(unit)
        self._mark = mark(window, None, None)
        result = self._run(window, unit)
        if self.schedule.num_stages == 1:
            queue.take(unit, result)
            assert self._mark is not None
            self._take_mark(unit, self._mark)
        else:
            self._hidden = result

    def _run_later(self, unit: Unit) -> None:
        assert self._hidden is not None and self.inbound is not None
        self._hidden = self._run(self._hidden, unit)
        self.inbound.release()

    def _run(self, hidden: torch.Tensor, unit: Unit) -> torch.Tensor:
        if (unit.video, unit.block) not in self._prompt_of:
            self._admit(unit)
        refresh = self.schedule.refreshes(unit)
        with self.clock:
            result = self.stage.run(
                hidden,
                unit,
                prompt=self._prompt,
                place=self.schedule.place(unit),
                window=self.layout.window(unit.block, refresh),
                fed_context=self.layout.fed_context(unit.block, refresh),
                refresh=refresh,
                after_refresh=unit.step > 0 and self.schedule.refreshes(unit._replace(step=unit.step - 1)),
                reads=self.schedule.reads(unit),
                writes=self.schedule.writes(unit),
            )
        assert self._mark is not None
        self._mark = mark(result, self._mark.to(result.dtype), self.index)
        return result

    def _admit(self, unit: Unit) -> None:
        """A block enters; prompts that only blocks long gone have used are forgotten."""
        self._prompt_of[unit.video, unit.block] = self._prompt
        self._prompt_of.pop((unit.video, unit.block - self.schedule.max_in_flight), None)
        self.stage.keep_prompts(set(self._prompt_of.values()))

    def _send(self, unit: Unit) -> None:
        assert self._hidden is not None and self.outbound is not None
        self.outbound.send(Header(Kind.UNIT, unit, self._prompt), self._hidden, self._mark)
        self._hidden = self._mark = None
        self.under_way += 1

    def _update(self, unit: Unit) -> None:
        self.queues[unit.video].update(unit.block, unit.step)
        if self.on_cut is not None and self.schedule.ends_iteration(unit):
            # Velocities come back in the order of units: nothing of the next iteration has been updated yet.
            after = self.schedule.iteration(unit) + 1
            if self.schedule.is_restartable(after):
                self.on_cut(after)

    def _emit(self, unit: Unit) -> None:
        assert self.on_emit is not None
        latents = self.queues[unit.video].emit(unit.block)
        if not torch.isfinite(latents).all():
            self._refuse(unit)
        self.on_emit(unit.video, unit.block, latents)

    def _take_mark(self, unit: Unit, found: torch.Tensor) -> None:
        assert self._first_mark is not None
        self._first_mark.take(unit, found)

    def _refuse(self, unit: Unit) -> None:
        """Raises NonFiniteError, unless such blocks are wanted all the same."""
        assert self._first_mark is not None
        origin = self._first_mark.origin()
        where = f"first in {origin}" if origin else "first in an update of the sampler"
        text = f"the latents of block {unit.block} hold NaN or infinity, {where}"
        if not self.allow_nonfinite:
            raise NonFiniteError(f"{text}; it is not given out")
        logger.warning("%s", text)

    def _decode(self, unit: Unit) -> None:
        assert self.on_decode is not None
        self.on_decode(unit.video, unit.block)


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
