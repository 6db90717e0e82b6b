"""The whole method in one process with a plain loop: the oracle that every faster way must equal.

No schedule, no transport, no slots: neighbour features lie in a dictionary under the name of the unit that made
them. One new block enters per iteration; block b is at step i - b in iteration i (DualParal, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import torch

from dualparal.config import Layout
from dualparal.features import KeysValues
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.models.base import Grid, ModelSpec, Pending, Slice
from dualparal.sampler import Sampler

Name = tuple[int, str, int, int, int]  # layer, side, block, step, branch


@torch.inference_mode()
def generate(
    spec: ModelSpec,
    experts: Sequence[Slice],
    sampler: Sampler,
    layout: Layout,
    grid: Grid,
    noise: Callable[[int], torch.Tensor],
    prompt_embeds: Callable[[int], torch.Tensor],
    guidance_scales: Sequence[float],
) -> torch.Tensor:
    """Final latents [1, C, L, H, W] float32 of a video of ``layout.num_latents`` frames.

    Args:
        experts: each transformer as one slice of all its layers.
        noise: block -> initial latents of its own frames.
        prompt_embeds: block -> [1 or 2, sequence, text_dim], the conditional row first; two rows mean guidance.
        guidance_scales: one per expert.
    """
    assert layout.num_blocks is not None, "the reference makes finite videos"
    policy, context, steps = layout.blocks.context, layout.blocks.context_frames, len(sampler)
    states = [sampler.start() for _ in range(layout.num_blocks)]
    latents: list[torch.Tensor] = []
    features: dict[Name, KeysValues] = {}

    def forward(block: int, step: int, branch: int, newest: int) -> torch.Tensor:
        timestep = sampler.timesteps[step]
        expert = experts[spec.expert(float(timestep), sampler.num_train_timesteps)]
        fed = layout.fed_context(block)
        window = latents[block]
        if fed:
            window = torch.cat([latents[block - 1][:, :, -fed:], window], dim=2)
        time = expert.time(timestep)
        text = expert.text(prompt_embeds(block)[branch])
        rotary = expert.rotary(layout.window_start(block), window.shape[2], grid)
        hidden = expert.embed(window)
        pending: Pending | None = None
        own, lent, first = len(hidden), context * grid.tokens, fed * grid.tokens
        for layer in range(expert.num_layers):
            parts = [KeysValues(torch.empty_like(hidden), torch.empty_like(hidden))]  # own, to be written
            if context and policy != "prior" and block < newest:
                parts.append(features[layer, "head", block + 1, step - 1, branch])
            if context and policy != "paper" and block > 0:
                made_at = step if policy == "cached" else min(step + 1, steps - 1)
                parts.append(features[layer, "tail", block - 1, made_at, branch])
            keys_values = KeysValues(torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts]))
            text_condition = KeysValues(text[layer, 0], text[layer, 1])
            hidden, pending = expert.layer(layer, hidden, pending, time, text_condition, rotary, keys_values)
            features[layer, "head", block, step, branch] = keys_values.rows(first, lent)
            features[layer, "tail", block, step, branch] = keys_values.rows(own - lent, lent)
        own_pending = None if pending is None else (pending[0][first:], pending[1])
        return expert.head(hidden[first:], own_pending, time, grid)

    for iteration in count():
        newest = min(iteration, layout.num_blocks - 1)
        blocks = range(max(0, iteration - steps + 1), newest + 1)
        if not blocks:
            break
        if newest == iteration:
            latents.append(noise(newest))
        for block in blocks if policy == "prior" else reversed(blocks):
            step = iteration - block
            branches = len(prompt_embeds(block))
            velocity = [forward(block, step, branch, newest) for branch in range(branches)]
            expert_index = spec.expert(float(sampler.timesteps[step]), sampler.num_train_timesteps)
            guided = velocity[0]
            if branches == 2:
                guided = combine_guidance(*velocity, guidance_scales[expert_index])
            latents[block] = states[block].step(guided, step, latents[block])
        # Nothing older than this iteration's blocks of the last one is read again.
        features = {n: kv for n, kv in features.items() if n[2] + n[3] >= iteration}
    return torch.cat(latents, dim=2)[:, :, : layout.num_latents]
