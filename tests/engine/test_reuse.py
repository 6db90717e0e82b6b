"""Steps that are not run: the engine equals the reference for any number of stages, and goes on from any snapshot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dualparal.engine.engine import Engine
from engine_calls import embeds, reference_latents

SIZE = {"height": 32, "width": 32}
Build = Callable[..., Engine]

CASES = {  # name: options, T, guidance
    "cached": ({}, 7, 5.0),
    "cached, held": ({"reuse": "steps=3,uncond=2,order=0"}, 8, 5.0),
    "cached, no guidance": ({}, 7, 1.0),
    "cached, K": ({"max_blocks_in_flight": 2}, 8, 5.0),
    "newest": ({"max_blocks_in_flight": 2, "context_version": "newest"}, 8, 5.0),
    "newest, uncond": (
        {"max_blocks_in_flight": 2, "context_version": "newest", "reuse": "uncond=3,order=1"}, 7, 5.0,
    ),
    "prior": ({"context": "prior"}, 7, 5.0),
    "prior, interval": ({"context": "prior", "reuse": "uncond=2,order=2,from=0.3,to=0.99"}, 7, 5.0),
    "paper": ({"context": "paper"}, 7, 5.0),
    "paper, interval": ({"context": "paper", "reuse": "steps=2,from=0.4,to=0.98"}, 7, 5.0),
    "refreshes": ({"refresh_every": 3}, 8, 5.0),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_engine_equals_reference_with_steps_that_are_not_run(engine: Build, wan22: Path, case: str) -> None:
    options, steps, guidance = CASES[case]
    options = {"reuse": "steps=2,uncond=2,order=2,first=2", "frames_per_block": 2, "context_frames": 1, **options}
    call = {"num_frames": 29, "num_inference_steps": steps, "guidance_scale": guidance, **SIZE}
    expected = None
    for stages in (1, 2, 3, 4):
        built = engine(wan22, stages=stages, **options)
        prompt = embeds(built, guidance > 1)
        if expected is None:
            expected = reference_latents(built, prompt, seed=3, **call)
            whole = reference_latents(engine(wan22, **{**options, "reuse": "off"}), prompt, seed=3, **call)
            assert expected.isfinite().all() and not torch.equal(expected, whole)
        made = built(**prompt, seed=3, output_type="latent", **call).frames
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().max()}"


def test_several_videos_have_the_bits_that_each_has_alone(engine: Build, wan21: Path) -> None:
    options = {"reuse": "steps=2,uncond=2,order=1", "frames_per_block": 2, "context_frames": 1}
    call = {"num_frames": 29, "num_inference_steps": 6, **SIZE}
    for context, stages in (("cached", 2), ("prior", 3), ("paper", 1)):
        built = engine(wan21, stages=stages, context=context, **options)
        prompts = [embeds(built, seed=seed) for seed in (1, 2)]
        both = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
        made = built(**both, seed=[3, 8], output_type="latent", **call).frames
        for video, (prompt, seed) in enumerate(zip(prompts, (3, 8), strict=True)):
            assert torch.equal(made[video : video + 1], reference_latents(built, prompt, seed=seed, **call)), context
