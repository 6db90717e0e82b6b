"""Everything that a device does in a run, done once before the first message.

The first use of a kernel loads its code, the first unit of a shape allocates memory and, where steps are captured, the
second one captures. All of that can wait for the whole device, and none of it belongs in the middle of a video.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch

from dualparal.device import to_device
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.runtime.executor import StageExecutor
from dualparal.runtime.latents import LatentQueue
from dualparal.runtime.nonfinite import mark
from dualparal.runtime.stage import StepShape, UnitPlan
from dualparal.schedule.actions import Unit
from dualparal.schedule.schedule import Schedule

_PROMPT = -1  # no prompt of a run has it


@torch.inference_mode()
def warm_up(executor: StageExecutor, embeds: torch.Tensor, captures: bool, known: set[Hashable]) -> None:
    """Runs a unit of every shape that the schedule has, on zeros. Nothing of it is read afterwards.

    Features that it leaves behind lie where the run's own will be before anybody reads them: the schedule is proven to
    read what it names.

    Args:
        executor: of a run that has not begun.
        embeds: prompt embeddings of the run's shape, [branches, tokens, text_dim].
        captures: the second unit of a shape is captured, so each is run twice, and in every run anew.
        known: what earlier runs of this process have warmed up, which is left out; gets what this one does.
    """
    stage, leading = executor.stage, executor.leading
    dtype = stage.experts[0].dtype
    stage.add_prompt(_PROMPT, embeds)
    plans: dict[StepShape, UnitPlan] = {}
    for unit in _units(executor.schedule):
        plan = executor.plan(unit)._replace(prompt=_PROMPT)
        plans.setdefault(stage.shape(plan), plan)
    for shape, plan in plans.items():
        name = executor.index, stage.spec.grid, shape
        if name in known and not captures:
            continue
        known.add(name)
        tokens = len(plan.window) * stage.spec.grid.tokens
        if leading is not None:
            given = _latents(leading.queues[0], len(plan.window))
        else:
            given = torch.zeros(tokens, stage.inner_dim, dtype=dtype, device=stage.experts[0].device)
        for _ in range(1 + captures):
            result = stage.run(given, plan)
        mark(result, mark(given, None, None).to(result.dtype), executor.index)
    stage.forget()
    if leading is not None:
        _sample(leading.queues[0], dtype)
    if captures:  # which gave back pinned memory, and to ask for that anew may wait for the device
        stage.add_prompt(_PROMPT, embeds)
        stage.run(given, plan)
        stage.forget()


def _units(schedule: Schedule) -> Iterator[Unit]:
    """Units of blocks from the beginning, for a period of refreshes, and from the end: all shapes are among them."""
    count, first = schedule.max_in_flight + 2 + (schedule.refresh_every or 0), schedule.first_block
    blocks = set(range(first, first + count))
    if schedule.num_blocks is not None:
        last = range(schedule.num_blocks - count, schedule.num_blocks)
        blocks = {block for block in blocks | set(last) if first <= block < schedule.num_blocks}
    for block in sorted(blocks):
        for step in range(schedule.steps_done(block), schedule.num_steps):
            for branch in range(schedule.branches_at(step)):
                yield Unit(block, step, branch)
    if schedule.is_anchored:
        yield from (Unit(0, schedule.num_steps, branch) for branch in range(schedule.branches))


def _latents(queue: LatentQueue, frames: int) -> torch.Tensor:
    _, channels, _, height, width = queue.noise(queue.schedule.first_block).shape
    if queue.condition is not None:
        channels += queue.condition.first.shape[1]
    return torch.zeros(1, channels, frames, height, width, device=queue.device)


def _sample(queue: LatentQueue, dtype: torch.dtype) -> None:
    """Takes all steps of a sampler, from zeros."""
    latents = to_device(queue.noise(queue.schedule.first_block), queue.device)
    velocity, state = latents.to(dtype), queue.sampler.start(0)
    for step in range(len(queue.sampler)):
        guided = combine_guidance(velocity, velocity, 1.0) if queue.schedule.branches == 2 else velocity
        latents = state.step(guided, step, latents)
    torch.isfinite(latents).all()
