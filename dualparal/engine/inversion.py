"""Inversion of clips: the noise that the model would have made them from, of which the new blocks' noise is made.

It is a run before the run: one block per video, on the same stages, whose sampler goes from the clip to noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dualparal.config.blocks import BlockConfig
from dualparal.config.reuse import REUSE_OFF
from dualparal.decoding.delivery import Delivery
from dualparal.engine.build import Builder, RunSpec
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request, schedule_of
from dualparal.engine.setup import Setup
from dualparal.runtime.executor import run_together
from dualparal.sampling.continued import Clip, Inversion, unit_noise
from dualparal.sampling.prompts import Prompts
from dualparal.schedule.layout import Layout
from dualparal.trace.clock import BusyClock

_OF_THE_RUN = ("iteration", "busy", "decoding", "units", "total_units")  # what a report tells of the run that follows


def invert_clips(
    setup: Setup, parts: Parts, spec: RunSpec, prompts: Sequence[Prompts], clips: Sequence[Clip | None]
) -> list[torch.Tensor]:
    """The noise [1, C, f, h, w] of the last latents of each video's clip, float32 on the CPU. Collective.

    Args:
        setup, parts: the engine's; the layers are loaded.
        spec: the run whose videos go on from clips.
        prompts, clips: of every video, on the rank that leads; empty elsewhere, where nothing is returned.

    Raises:
        NonFiniteError: it holds NaN or infinity; and what a run raises.
    """
    mesh, level = setup.mesh, spec.requests[0].sampler.levels[0]
    ends = [clip.latents for clip in clips if clip is not None]
    requests = [_request(request, ends[v] if ends else None, setup) for v, request in enumerate(spec.requests)]
    frames = requests[0].layout.first_frames
    blocks = BlockConfig(frames_per_block=frames, context_frames=0)
    setup = replace(setup, config=replace(setup.config, blocks=blocks, features_8bit=False))
    schedule, report = schedule_of(setup, requests), spec.report and _without_progress(spec.report)
    spec = replace(spec, requests=requests, schedule=schedule, timeline=None, checkpoint=None, report=report)
    texts = [Prompts({0: found.embeds(found.of(0))[:1]}) for found in prompts]
    builder = Builder(setup, parts, spec, texts, [None] * len(requests), [None] * len(requests))
    clocks = [BusyClock(mesh.device) for _ in mesh.stages]
    request, delivery = requests[0], None
    if mesh.is_leader:
        factor = setup.source.spec.temporal_factor
        delivery = Delivery(request.layout, request.video, factor, len(requests), None, lambda: clocks[0].seconds)
    executors = builder.executors(clocks, delivery, None, None)
    try:
        builder.warm_up(executors, None)
        for _ in run_together(executors):
            pass
    finally:
        for executor in executors:
            executor.close()
    found = {} if delivery is None else {chunk.video: chunk.latents.cpu() for chunk in delivery.drain()}
    return [unit_noise(end[:, :, -frames:], found[video], level) for video, end in enumerate(ends)]


def _request(request: Request, end: torch.Tensor | None, setup: Setup) -> Request:
    """The request of one block that begins with the end of a clip and is taken to noise, without guidance."""
    frames, sampler = request.inverted_frames, Inversion(request.sampler)
    asked = replace(
        request.video,
        num_frames=setup.source.spec.temporal_factor * (frames - 1) + 1,
        guidance_scale=1.0,
        guidance_scale_2=None,
        output_type="latent",
        continues=False,
    )
    return replace(
        request,
        video=asked,
        layout=Layout(BlockConfig(frames_per_block=frames, context_frames=0), frames),
        sampler=sampler,
        steps=REUSE_OFF.plan(sampler.levels, guidance=False),
        latents=None if end is None else end[:, :, -frames:],
        clip=None,
        callback=None,
    )


def _without_progress(report: Callable[..., None]) -> Callable[..., None]:
    def told(phase: str, **where: Any) -> None:
        report(phase, **{name: value for name, value in where.items() if name not in _OF_THE_RUN})

    return told
