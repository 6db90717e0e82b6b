"""Everything that a device does in a run, done once before the first message.

The first use of a kernel loads its code, the first unit of a shape allocates memory and, where steps are captured, the
second one captures. All of that can wait for the whole device, and none of it belongs in the middle of a video.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.runtime.executor import StageExecutor
from dualparal.runtime.latents import LatentQueue
from dualparal.runtime.nonfinite import mark
from dualparal.runtime.stage import StepShape, UnitPlan
from dualparal.schedule.actions import Unit
from dualparal.schedule.schedule import Schedule

_PROMPT = -1  # no prompt of a run has it


@torch.inference_mode()
def warm_up(executor: StageExecutor, embeds: torch.Tensor, times: int) -> int:
    """Runs a unit of every shape that the schedule has, on zeros. Nothing of it is read afterwards.

    Features that it leaves behind lie where the run's own will be before anybody reads them: the schedule is proven to
    read what it names.

    Args:
        executor: of a run that has not begun.
        embeds: prompt embeddings of the run's shape, [branches, tokens, text_dim].
        times: runs of each shape; 2 where the second one captures.

    Returns:
        The number of shapes.
    """
    stage, leading = executor.stage, executor.leading
    dtype = stage.experts[0].dtype
    stage.add_prompt(_PROMPT, embeds)
    plans: dict[StepShape, UnitPlan] = {}
    for unit in _units(executor.schedule):
        plan = executor.plan(unit)._replace(prompt=_PROMPT)
        plans.setdefault(stage.shape(plan), plan)
    for plan in plans.values():
        tokens = len(plan.window) * stage.spec.grid.tokens
        if leading is not None:
            given = _latents(leading.queues[0], len(plan.window))
        else:
            given = torch.zeros(tokens, stage.inner_dim, dtype=dtype, device=stage.experts[0].device)
        for _ in range(times):
            result = stage.run(given, plan)
        mark(result, mark(given, None, None).to(result.dtype), executor.index)
    stage.forget()
    if leading is not None:
        _sample(leading.queues[0], dtype)
    return len(plans)


def _units(schedule: Schedule) -> Iterator[Unit]:
    """Units of blocks from the beginning and from the end, among which all shapes are but rare ones of refreshes."""
    count, first = schedule.max_in_flight + 2, schedule.first_block
    blocks = set(range(first, first + count))
    if schedule.num_blocks is not None:
        last = range(schedule.num_blocks - count, schedule.num_blocks)
        blocks = {block for block in blocks | set(last) if first <= block < schedule.num_blocks}
    for block in sorted(blocks):
        for step in range(schedule.steps_done(block), schedule.num_steps):
            for branch in range(schedule.branches):
                yield Unit(block, step, branch)


def _latents(queue: LatentQueue, frames: int) -> torch.Tensor:
    _, channels, _, height, width = queue.noise(queue.schedule.first_block).shape
    return torch.zeros(1, channels, frames, height, width, device=queue.device)


def _sample(queue: LatentQueue, dtype: torch.dtype) -> None:
    """Takes all steps of a sampler, from zeros."""
    latents = _latents(queue, queue.layout.blocks.frames_per_block)
    velocity, state = latents.to(dtype), queue.sampler.start()
    for step in range(len(queue.sampler)):
        guided = combine_guidance(velocity, velocity, 1.0) if queue.schedule.branches == 2 else velocity
        latents = state.step(guided, step, latents)
    torch.isfinite(latents).all()
