"""Models that differ from Wan's plain ones: equal to diffusers' pipelines, and for any number of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.engine.engine import Engine
from dualparal.models.keys_values import KeysValues
from dualparal.models.times import joined
from dualparal.models.wan.tiny import build_tiny_pipeline
from engine_calls import embeds, reference_latents

KINDS: dict[str, dict[str, Any]] = {
    "ti2v": {"latent_channels": 48, "residual_vae": True, "expand_timesteps": True},
    "skyreels": {"skyreels": True},
}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
SIZE = {"height": 64, "width": 64, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: build_tiny_pipeline(folder / kind, **options) for kind, options in KINDS.items()}


class Copying(UniPCMultistepScheduler):
    """UniPC that keeps a copy of a sample: SkyReels' pipeline writes the result over the sample that it has given."""

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, return_dict: bool = True) -> Any:
        return super().step(model_output, timestep, sample.clone(), return_dict)


def stock(kind: str, model: Path) -> Any:
    """diffusers' pipeline."""
    pipe = (WanPipeline if kind == "ti2v" else SkyReelsV2DiffusionForcingPipeline).from_pretrained(model)
    if kind == "skyreels":
        pipe.scheduler = Copying.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_is_diffusers_pipeline(models: dict[str, Path], kind: str) -> None:
    built, pipe = Engine.from_pretrained(models[kind], device="cpu", frames_per_block=4), stock(kind, models[kind])
    call = {**SIZE, "prompt": None, "num_frames": 13, "guidance_scale": 5.0, **embeds(built)}
    spec = built.source.spec
    shape = 1, spec.in_channels, 4, *(64 // spec.spatial_factor,) * 2
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for output, most in (("latent", 5e-5), ("np", 2e-4)):
        found = np.asarray(built(**call, latents=latents, output_type=output).frames)
        drawn = torch.Generator().manual_seed(2)  # its latents= does not work in SkyReels' pipeline
        wanted = np.asarray(pipe(**call, generator=drawn, output_type=output).frames)
        assert found.shape == wanted.shape and wanted.std() > 0.1
        assert np.abs(found - wanted).max() < most


def test_one_block_with_an_image_is_diffusers_pipeline(models: dict[str, Path]) -> None:
    built, plain = (
        Engine.from_pretrained(models["ti2v"], device="cpu", frames_per_block=4),
        stock("ti2v", models["ti2v"]),
    )
    parts = {name: part for name, part in plain.components.items() if name != "transformer_2"}
    pipe = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 48, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    call = {**SIZE, "image": IMAGE, "prompt": None, "num_frames": 13, "latents": latents, **embeds(built)}
    for output, most in (("latent", 5e-5), ("np", 2e-4)):
        found, wanted = (np.asarray(make(**call, output_type=output).frames) for make in (built, pipe))
        assert found.shape == wanted.shape and wanted.std() > 0.1
        assert np.abs(found - wanted).max() < most
    with pytest.raises(ValueError, match="image was given for some of the videos only"):
        built.stream(["a", "b"], image=[IMAGE, None], **SIZE, num_frames=5)


def test_frames_of_unequal_times_are_diffusers_layers(models: dict[str, Path]) -> None:
    engine = Engine.from_pretrained(models["skyreels"], device="cpu")
    transformer, spec = stock("skyreels", models["skyreels"]).transformer, engine.source.spec
    (whole,) = engine.source.load_slices(range(spec.num_layers), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    latents, prompt = (torch.randn(*shape, generator=generator) for shape in ((1, 16, 4, 8, 8), (16, spec.text_dim)))
    times = torch.tensor([[0, 0, 500, 999]])
    with torch.inference_mode():
        wanted = transformer(latents, times, prompt[None], enable_diffusion_forcing=True, fps=[1]).sample
        grid, text = spec.grid(64, 64), whole.text(prompt)
        time = joined([whole.time(torch.tensor(t)) for t in (0, 500, 999)], (2 * 16, 16, 16))
        hidden, left, rotary = whole.embed(whole.patches(latents)), None, whole.rotary(0, 4, grid)
        for layer in range(whole.num_layers):
            own = KeysValues(torch.empty_like(hidden), torch.empty_like(hidden))
            hidden, left = whole.layer(layer, hidden, left, time, KeysValues(*text[layer]), rotary, own)
        found = [whole.picture(whole.head(hidden[16 * first :], left, time), grid) for first in (0, 1, 3)]
    for first, made in zip((0, 1, 3), found, strict=True):
        assert (made - wanted[:, :, first:]).abs().max() < 1e-5 < 0.1 < wanted.std()


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ti2v": ("ti2v", {"refresh_every": 2}, {}),
    # All of block 0 is lent and fed, the given frame too.
    "image": ("ti2v", {"context_frames": 2, "refresh_every": 2, "max_blocks_in_flight": 2}, {"image": IMAGE}),
    # Windows that are fed a neighbour's frame of another time, cut within it where a stage has two places.
    "skyreels": ("skyreels", {"context": "paper", "max_blocks_in_flight": 3}, {"height": 128, "width": 96}),
}


@pytest.mark.parametrize("case", CASES)
def test_five_blocks_are_the_same_for_any_number_of_stages_and_after_a_resume(
    models: dict[str, Path], case: str, tmp_path: Path
) -> None:
    kind, options, more = CASES[case]
    call: dict[str, Any] = {**SIZE, **more, "num_frames": 37 if kind == "ti2v" else 41, "guidance_scale": 2.0}

    def engine(stages: int, **more: Any) -> Engine:
        blocks = {"frames_per_block": 2, "context_frames": 1, **options}
        return Engine.from_pretrained(models[kind], device="cpu", stages=stages, **blocks, **more)

    engines = [engine(stages) for stages in (1, 2, 3, 4)]
    prompt: dict[str, Any] = embeds(engines[0])
    if image := call.pop("image", None):
        prompt["image"] = image
    wanted = reference_latents(engines[0], prompt, seed=3, **call)
    if kind == "skyreels":
        engines.append(engine(2, sequence_parallel=2))
    for built in engines:
        assert torch.equal(built(**prompt, **call, seed=3, output_type="latent").frames, wanted)
    kept = Checkpoint(tmp_path, every=1)
    chunks = engines[1].stream(**prompt, **call, seed=3, output_type="latent", checkpoint=kept)
    made = {chunk.block: chunk.latents for chunk, _ in zip(chunks, range(3))}
    chunks.close()  # type: ignore[attr-defined]
    rest = {chunk.block: chunk.latents for chunk in engines[2].resume(tmp_path)}
    assert 0 < min(rest) < 4 == max(rest)
    assert torch.equal(torch.cat([latents for _, latents in sorted((made | rest).items())], 2), wanted)
