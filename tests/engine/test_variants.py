"""Models that differ from Wan's plain ones: equal to diffusers' pipeline, and for any number of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from engine_calls import embeds, reference_latents

SIZE = {"height": 64, "width": 64, "num_inference_steps": 3}
BLOCKS: dict[str, Any] = {"frames_per_block": 2, "context_frames": 1}


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ti2v"
    return build_tiny_pipeline(folder, latent_channels=48, residual_vae=True, expand_timesteps=True)


def noise(engine: Engine, frames: int) -> torch.Tensor:
    spec, generator = engine.source.spec, torch.Generator().manual_seed(2)
    side = 64 // spec.spatial_factor
    return torch.randn(1, spec.in_channels, frames, side, side, generator=generator)


def test_ti2v_without_an_image_is_diffusers_pipeline(ti2v: Path) -> None:
    built = Engine.from_pretrained(ti2v, device="cpu", frames_per_block=4)
    call = {**SIZE, "num_frames": 13, **embeds(built), "latents": noise(built, 4)}
    pipe = WanPipeline.from_pretrained(ti2v)
    assert pipe.config.expand_timesteps
    pipe.set_progress_bar_config(disable=True)
    for kind, most in (("latent", 5e-5), ("np", 2e-4)):
        found, wanted = (np.asarray(make(**call, output_type=kind).frames) for make in (built, pipe))
        assert found.shape == wanted.shape and wanted.std() > 0.1
        assert np.abs(found - wanted).max() < most


def test_five_blocks_are_the_same_for_any_number_of_stages_and_after_a_resume(ti2v: Path, tmp_path: Path) -> None:
    options = {**BLOCKS, "refresh_every": 2}
    call = {**SIZE, "num_frames": 37}
    engines = [Engine.from_pretrained(ti2v, device="cpu", stages=stages, **options) for stages in (1, 2, 3, 4)]
    prompt = embeds(engines[0])
    wanted = reference_latents(engines[0], prompt, seed=3, **call)
    for built in engines:
        assert torch.equal(built(**prompt, **call, seed=3, output_type="latent").frames, wanted)
    chunks = engines[1].stream(**prompt, **call, seed=3, output_type="latent", checkpoint=Checkpoint(tmp_path, every=1))
    made = {chunk.block: chunk.latents for chunk, _ in zip(chunks, range(3))}
    chunks.close()  # type: ignore[attr-defined]
    rest = {chunk.block: chunk.latents for chunk in engines[2].resume(tmp_path)}
    assert 0 < min(rest) < 4 == max(rest)
    assert torch.equal(torch.cat([latents for _, latents in sorted((made | rest).items())], 2), wanted)
