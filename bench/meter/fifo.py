"""FIFO-Diffusion (Kim et al. 2024), with lookahead denoising, on diffusers' own WanTransformer3DModel: a rival.

A queue of T latent frames, each at its own noise level: the head one step from clean, the tail pure noise. One
iteration takes every frame one step down; the head leaves as a frame of the video, new noise joins at the tail. The
model sees windows of ``WINDOW`` frames, every half a window, and only their noisier half is updated (lookahead); in
front of the queue stand the frames that left last. The queue starts as an ordinary clip of one window, noised to its
levels, as in the authors' code.

Limits: Euler steps, as a sampler with history has none for a frame whose neighbours are at other steps. Positions
are those of the window, because diffusers' model counts from 0. The timestep is a number per token, which the model
takes (Wan2.2 TI2V uses it), but Wan2.1-type weights were trained with one noise level for all frames of a clip.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

WINDOW = 16  # latent frames: the clip the model was trained on


@torch.inference_mode()
def generate(
    pipe: Any, prompt: str, *, size: tuple[int, int], num_latents: int, steps: int, guidance_scale: float, seed: int
) -> torch.Tensor:
    """Latents [1, C, num_latents, *size] of a loaded WanPipeline; steps: T, the length of the queue too.

    Raises ValueError when the queue is no whole number of half windows, at least two.
    """
    half = WINDOW // 2
    if steps % half or steps < WINDOW:
        raise ValueError(f"steps={steps}: the queue is cut into half windows of {half}; use a multiple, from {WINDOW}")
    config = pipe.scheduler.config
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.get("flow_shift", config.get("shift")))
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas  # [T + 1], from 1 to 0
    is_guided = guidance_scale > 1
    positive, negative = pipe.encode_prompt(prompt, do_classifier_free_guidance=is_guided, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    channels = pipe.transformer.config.in_channels

    def noise(frames: int) -> torch.Tensor:
        return torch.randn(1, channels, frames, *size, generator=generator)

    def velocity(windows: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """windows [n, C, WINDOW, h, w], levels [n, WINDOW]: the noise of each frame."""
        _, p, q = pipe.transformer.config.patch_size
        tokens = (size[0] // p) * (size[1] // q)
        times = (1000 * levels).repeat_interleave(tokens, dim=1)
        found = []
        for embeds in (positive, negative) if is_guided else (positive,):
            text = embeds.expand(len(windows), -1, -1)
            found.append(pipe.transformer(windows, times, text, return_dict=False)[0])
        return found[-1] + guidance_scale * (found[0] - found[-1])

    clip = noise(WINDOW)
    for now, after in pairwise(sigmas):
        clip = clip + (after - now) * velocity(clip, now.expand(1, WINDOW))
    level = sigmas[:steps].flip(0)  # of the queue, from the head
    base = clip[:, :, torch.arange(steps).clamp(max=WINDOW - 1)]
    mix = level.view(1, 1, -1, 1, 1)
    queue = (1 - mix) * base + mix * noise(steps)
    drop = (sigmas[1:].flip(0) - level).view(1, 1, -1, 1, 1)

    before = clip[:, :, :1].expand(-1, -1, half, -1, -1)  # nobody has left yet
    video = []
    for _ in range(num_latents):
        whole = torch.cat([before, queue], dim=2)
        levels = torch.cat([torch.zeros(half), level])
        windows = whole[0].unfold(1, WINDOW, half).permute(1, 0, 4, 2, 3)
        speed = velocity(windows, levels.unfold(0, WINDOW, half))[:, :, half:]  # [n, C, half, h, w]
        queue = queue + drop * speed.transpose(0, 1).flatten(1, 2)[None]
        head, queue = queue[:, :, :1], torch.cat([queue[:, :, 1:], noise(1)], dim=2)
        before = torch.cat([before[:, :, 1:], head], dim=2)
        video.append(head)
    return torch.cat(video, dim=2)
