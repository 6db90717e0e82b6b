"""A video that goes on from a clip: its latents, its frames, any number of stages, and a resume."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualparal import reference
from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.config.blocks import BlockConfig
from dualparal.config.video import VideoConfig
from dualparal.engine.engine import Engine
from dualparal.engine.inputs import VideoInputs
from dualparal.engine.request import check_request
from dualparal.io.clips import last_frames
from dualparal.io.video import SegmentWriter
from dualparal.models.base import Grid
from dualparal.models.wan.encoder import StreamingEncoder
from dualparal.models.wan.vae import StreamingDecoder
from dualparal.sampling.noise import BlockNoise
from dualparal.schedule.layout import Layout
from engine_calls import embeds

SIZE = {"height": 32, "width": 32}
CALL: dict[str, Any] = {"num_frames": 28, "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 3, **SIZE}
BLOCKS = {"frames_per_block": 2, "context_frames": 1}
Build = Callable[..., Engine]

CASES: dict[str, dict[str, Any]] = {
    "cached": {"anchor_frames": 1},
    "newest": {"context_version": "newest", "max_blocks_in_flight": 2, "reuse": "steps=2,uncond=2,order=1"},
    "prior": {"context": "prior", "refresh_every": 3},
    "paper": {"context": "paper"},
}


def clip_latents(built: Engine, frames: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, built.source.spec.in_channels, frames, 4, 4, generator=generator)


class Backwards:
    """Euler's steps from finished latents to noise, each at the timestep of the level where it begins."""

    def __init__(self, sampler: Any) -> None:
        last = len(sampler) - 1
        self.timesteps = torch.stack([sampler.timesteps[min(last, last + 1 - step)] for step in range(last + 1)])
        self.to = [*reversed(sampler.levels)]
        self.levels = [0.0, *self.to[:-1]]
        self.num_train_timesteps = sampler.num_train_timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    def start(self, block: int) -> Any:
        return self

    def step(self, velocity: torch.Tensor, at: int, latents: torch.Tensor) -> torch.Tensor:
        return latents + (self.to[at] - self.levels[at]) * velocity


def inverted(
    built: Engine, sampler: Any, clip: torch.Tensor, prompt: dict[str, torch.Tensor], grid: Grid
) -> torch.Tensor:
    """The noise of a clip's last latents, all in one block, without guidance."""
    spec, back = built.source.spec, Backwards(sampler)
    noisy = reference.generate(
        spec,
        built.source.load_slices(range(spec.num_layers), built.dtype, torch.device("cpu")),
        back,  # type: ignore[arg-type]
        Layout(BlockConfig(frames_per_block=clip.shape[2], context_frames=0), clip.shape[2]),
        grid,
        lambda block: clip,
        lambda block: prompt["prompt_embeds"],
        [1.0, 1.0],
    )
    level = back.to[-1]
    noise = (noisy - (1 - level) * clip).double() / level
    channels = [(each - each.mean()) / each.std() for each in noise.numpy()[0]]
    return torch.from_numpy(np.stack(channels)[None]).float()


class KnownSampler:
    """The request's sampler, but for block 0, which goes from its noise to its end on a straight line."""

    def __init__(self, sampler: Any, end: torch.Tensor, noise: torch.Tensor) -> None:
        self._sampler, self._end, self._noise = sampler, end, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)

    def at(self, level: float) -> torch.Tensor:
        return (1 - level) * self._end + level * self._noise

    def start(self, block: int) -> Any:
        return self._sampler.start(block) if block else self

    def step(self, velocity: torch.Tensor, at: int, latents: torch.Tensor) -> torch.Tensor:
        return self.at([*self.levels, 0.0][at + 1])


def expected_latents(built: Engine, prompt: dict[str, torch.Tensor], clip: torch.Tensor) -> torch.Tensor:
    """The oracle's latents of the clip's end and of all that follows."""
    video = VideoConfig(output_type="latent", continues=True, **CALL)
    request = check_request(built.setup, built.scheduler, video, VideoInputs(**prompt, clip=clip, seed=3))
    spec, layout, grid = built.source.spec, request.layout, request.grid
    pooled = clip[:, :, -(layout.blocks.frames_per_block + layout.blocks.context_frames) :]
    pool = inverted(built, request.sampler, pooled, prompt, grid)
    noise = BlockNoise(layout, (spec.in_channels, grid.height, grid.width), video.seed, pool=pool)
    own = clip[:, :, -layout.frames(0) :]
    sampler = KnownSampler(request.sampler, own, noise(0))
    rows = request.embeds
    made = reference.generate(
        spec,
        built.source.load_slices(range(spec.num_layers), built.dtype, torch.device("cpu")),
        sampler,  # type: ignore[arg-type]
        layout,
        grid,
        lambda block: noise(block) if block else sampler.at(sampler.levels[0]),
        lambda block: rows,  # type: ignore[arg-type,return-value]
        [video.guidance_scale] * 2,
        reuse=built.config.reuse,
    )
    assert torch.equal(made[:, :, : layout.frames(0)], own)
    return made


@pytest.mark.parametrize("case", CASES)
def test_engine_goes_on_from_a_clip_as_the_reference_does(engine: Build, wan21: Path, case: str) -> None:
    options = {**BLOCKS, **CASES[case]}
    built = engine(**options)
    prompt, clip = embeds(built), clip_latents(built)
    expected = expected_latents(built, prompt, clip)
    first = expected.shape[2] - 7  # four blocks behind the clip's, the last one with a surplus
    for stages in (1, 2, 3, 4) if case == "cached" else (1, 3):
        built = engine(stages=stages, **options)
        made = built(**prompt, video=clip, output_type="latent", **CALL).frames
        assert torch.equal(made, expected[:, :, first:]), f"{stages} stages"
    if case == "cached":  # the frames are those of a decoder that has seen the clip
        chunks = list(engine(stages=2, **options).stream(**prompt, video=clip, output_type="pt", **CALL))
        assert [(chunk.block, chunk.start_frame) for chunk in chunks] == [(0, 0), (1, 8), (2, 16), (3, 24)]
        decoder = StreamingDecoder(built.vae())
        decoder.push(clip)
        whole = decoder.push(expected[:, :, first:])
        assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), (whole * 0.5 + 0.5).clamp(0, 1))


def test_a_continued_run_goes_on_from_its_snapshots(engine: Build, tmp_path: Path) -> None:
    options = {**BLOCKS, "refresh_every": 2, "anchor_frames": 1}
    built = engine(**options)
    prompt, clip = embeds(built), clip_latents(built)
    asked = {**CALL, "num_frames": 40, "output_type": "uint8"}
    whole = list(engine(stages=2, **options).stream(**prompt, video=clip, **asked))
    for count in (0, 3):  # while the decoder still sees the clip, and with its end
        folder = tmp_path / str(count)
        chunks = engine(**options).stream(**prompt, video=clip, checkpoint=Checkpoint(folder, every=1), **asked)
        for _ in range(count):
            next(chunks)
            threading.Event().wait(0.05)
        if count:
            chunks.close()
            made = list(engine(stages=2, **options).resume(folder))
            assert 0 < made[0].block < len(whole) - 1
        else:
            list(chunks)
            again = engine(**options).decode_again(folder, [len(whole) - 1])
            made = []
            assert [(block, frames.tobytes()) for block, frames in again] == [
                (whole[-1].block, whole[-1].frames.tobytes())
            ]
        for chunk in made:
            same = whole[chunk.block]
            assert torch.equal(chunk.latents, same.latents) and (chunk.frames == same.frames).all()
            assert (chunk.start_frame, chunk.progress.blocks) == (same.start_frame, same.progress.blocks)


def test_a_file_is_encoded_from_its_end(engine: Build, tmp_path: Path) -> None:
    built = engine(**BLOCKS)
    prompt = embeds(built)
    frames = torch.rand(30, 32, 32, 3, generator=torch.Generator().manual_seed(2)).mul(255).byte().numpy()
    path = SegmentWriter(tmp_path, 16).write(0, frames)
    made = built(**prompt, video=path, output_type="latent", **CALL).frames
    read = torch.from_numpy(last_frames(path, 29)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = StreamingEncoder(built.vae()).push(read)
    assert torch.equal(made, built(**prompt, video=latents, output_type="latent", **CALL).frames)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video": "nowhere.mp4"}, "nowhere.mp4: there is no such file"),
        ({"video": 3}, "video is a int"),
        ({"video": torch.zeros(1, 16, 2, 4, 5)}, "goes on from"),
        ({"video": torch.zeros(1, 16, 1, 4, 4)}, "video has 1 latent frames"),
        ({"num_frames": 21}, "num_frames=21 after a clip"),
        ({"latents": torch.zeros(1, 16, 5, 4, 4)}, "latents and video were both given"),
    ],
)
def test_clips_that_do_not_fit_are_refused(engine: Build, changed: dict[str, Any], message: str) -> None:
    built = engine(**BLOCKS)
    with pytest.raises(ValueError, match=message):
        built.stream(**{**embeds(built), "video": clip_latents(built), **CALL, **changed})
