"""How the model in the box makes clips while it learns: all frames at once, or block after block as in a queue.

For tools/train_reward.py. Fresh noise at every step (``lcm``), no guidance, many captions at a time.
"""

from __future__ import annotations

import itertools

import torch
from diffusers import FlowMatchLCMScheduler
from learner import Learner

BLOCK, CONTEXT = 8, 4  # latent frames of a block, and of its neighbours that it sees
STEPS, QUEUE_STEPS, QUEUE_GAP = 16, 12, 3  # of clips made at once; of a queue, and between its blocks
FLOW_SHIFT = 5.0


def noise_levels(steps: int) -> torch.Tensor:
    """Of every step, and 0 at the end: [steps + 1]."""
    scheduler = FlowMatchLCMScheduler(shift=FLOW_SHIFT)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def renoised(
    clips: torch.Tensor, velocity: torch.Tensor, now: torch.Tensor, then: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A step of ``lcm``: what is left of ``clips`` without their noise of level ``now``, with new noise of ``then``."""
    noise = torch.randn(clips.shape, generator=generator, device=clips.device)
    return (1 - then) * (clips - now * velocity) + then * noise


@torch.no_grad()
def at_once(learner: Learner, captions: list[str], shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Clips [captions, *shape] of the average of the weights; shape: channels, frames, height, width."""
    levels = noise_levels(STEPS)
    clips = torch.randn(len(captions), *shape, generator=generator, device=learner.device)
    for now, then in itertools.pairwise(levels):
        sigma = now.to(clips.device).expand(len(clips), shape[1])
        clips = renoised(clips, learner.velocity(clips, sigma, captions, average=True), now, then, generator)
    return clips


@torch.no_grad()
def queue(learner: Learner, captions: list[str], shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """As ``at_once``, in blocks of which each begins QUEUE_GAP steps after the one before.

    A block sees of its neighbours what they were when the model last saw them, and when it sees them now: what
    ``cached`` with ``newest`` does, but that features there are of a window around the neighbour.
    """
    levels = noise_levels(QUEUE_STEPS)
    clips = torch.randn(len(captions), *shape, generator=generator, device=learner.device)
    blocks = list(clips.split(BLOCK, dim=2))
    fed = [(block, levels[0]) for block in blocks]  # latents, and their level, that the model saw last
    for iteration in range(QUEUE_STEPS + QUEUE_GAP * (len(blocks) - 1)):
        for place in reversed(range(len(blocks))):  # the next block goes first, and is seen as it was before its step
            step = iteration - QUEUE_GAP * place
            if not 0 <= step < QUEUE_STEPS:
                continue
            fed[place] = own, now = blocks[place], levels[step]
            parts = [(own, now)]
            if place > 0:
                before, level = fed[place - 1]
                parts.insert(0, (before[:, :, -CONTEXT:], level))
            if place + 1 < len(blocks) and step >= QUEUE_GAP:
                behind, level = fed[place + 1]
                parts.append((behind[:, :, :CONTEXT], level))
            window = torch.cat([latents for latents, _ in parts], dim=2)
            sigma = torch.cat([level.repeat(latents.shape[2]) for latents, level in parts])
            velocity = learner.velocity(window, sigma.to(window.device).expand(len(window), -1), captions, average=True)
            first = CONTEXT if place else 0
            velocity = velocity[:, :, first : first + own.shape[2]]
            blocks[place] = renoised(own, velocity, now, levels[step + 1], generator)
    return torch.cat(blocks, dim=2)
