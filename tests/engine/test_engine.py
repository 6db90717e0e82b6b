"""The engine in one process: equal to the reference, equal to diffusers, exact length, prompts, streaming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from dualparal.config.blocks import CONTEXT_VERSIONS
from dualparal.decoding.chunks import NonFiniteError
from dualparal.engine.engine import Engine
from dualparal.sampling.prompts import Prompts
from engine_calls import embeds, reference_latents
from pairwise import pairwise

SIZE = {"height": 32, "width": 32}
Build = Callable[..., Engine]

SHAPES = {  # name: B, C, T, latent frames
    "ragged": (3, 1, 2, 10),
    "T<N": (2, 2, 1, 9),
    "M<N": (2, 1, 5, 4),
    "M=1": (8, 4, 3, 5),
    "C=0": (4, 0, 3, 9),
    "C=B": (2, 2, 4, 7),
    "B=1": (1, 1, 3, 4),
}


@pytest.mark.parametrize("guidance, shape, policy", pairwise([1.0, 5.0], SHAPES, ["cached", "prior", "paper"]))
def test_engine_equals_reference_for_any_number_of_stages(
    engine: Build, wan21: Path, policy: str, shape: str, guidance: float
) -> None:
    own, context, steps, latents = SHAPES[shape]
    call = {"num_frames": 4 * (latents - 1) + 1, "num_inference_steps": steps, "guidance_scale": guidance, **SIZE}
    expected = None
    for stages in (1, 2, 3, 4):
        built = engine(frames_per_block=own, context_frames=context, context=policy, stages=stages)
        prompt = embeds(built, guidance > 1)
        if expected is None:
            expected = reference_latents(built, prompt, seed=3, **call)
            assert expected.shape[2] == latents and expected.isfinite().all() and expected.std() > 0.1
        made = built(**prompt, seed=3, output_type="latent", **call).frames
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().max()}"


LIMITED = {  # name: T, K, latent frames, depth; blocks of 2
    "K=1": (4, 1, 9, 2),
    "K=2": (5, 2, 9, 1),
    "K=T-1": (4, 3, 11, 3),
    "K=T": (3, 3, 9, 2),
    "T<K": (3, 7, 7, 1),
    "M<K": (6, 4, 5, 2),
    "uneven": (7, 3, 13, 3),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "guidance, shape, version", pairwise([1.0, 5.0], LIMITED, ["matching", "newest", "prior", "paper"])
)
def test_few_blocks_in_flight_equal_reference(
    engine: Build, wan22: Path, version: str, shape: str, guidance: float
) -> None:
    steps, limit, latents, depth = LIMITED[shape]
    policy = {"context": "cached", "context_version": version} if version in CONTEXT_VERSIONS else {"context": version}
    options = {"frames_per_block": 2, "context_frames": 1, "max_blocks_in_flight": limit, "depth": depth, **policy}
    call = {"num_frames": 4 * (latents - 1) + 1, "num_inference_steps": steps, "guidance_scale": guidance, **SIZE}
    expected = None
    for stages in (1, 4) if guidance == 1.0 else (2, 3):
        built = engine(wan22, stages=stages, **options)
        prompt = embeds(built, guidance > 1)
        if expected is None:
            expected = reference_latents(built, prompt, seed=3, **call)
            assert expected.isfinite().all() and expected.std() > 0.1
            if limit >= steps:
                free = reference_latents(
                    engine(wan22, **{**options, "max_blocks_in_flight": None}), prompt, seed=3, **call
                )
                assert torch.equal(expected, free), "a limit of T blocks or more changes nothing"
        made = built(**prompt, seed=3, output_type="latent", **call).frames
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().max()}"


REFRESHED = {  # name: R, T, K, latent frames; blocks of 2
    "each step": (1, 3, None, 9),
    "every other": (2, 4, None, 11),
    "rarely": (4, 5, None, 13),
    "never reached": (50, 3, None, 7),
    "gap": (4, 6, 3, 11),
    "gap, each step": (2, 6, 2, 9),
}


@pytest.mark.sampled(3)  # each shape, and each policy
@pytest.mark.parametrize("version", ["matching", "newest", "prior", "paper"])
@pytest.mark.parametrize("shape", REFRESHED)
def test_refreshes_equal_reference(engine: Build, wan22: Path, version: str, shape: str) -> None:
    every, steps, limit, latents = REFRESHED[shape]
    policy = {"context": "cached", "context_version": version} if version in CONTEXT_VERSIONS else {"context": version}
    options = {"frames_per_block": 2, "context_frames": 1, "max_blocks_in_flight": limit, **policy}
    call = {"num_frames": 4 * (latents - 1) + 1, "num_inference_steps": steps, **SIZE}
    prompt = embeds(engine(wan22))
    plain = reference_latents(engine(wan22, **options), prompt, seed=3, **call)
    for stages in (1, 3):
        built = engine(wan22, stages=stages, refresh_every=every, **options)
        expected = reference_latents(built, prompt, seed=3, **call)
        made = built(**prompt, seed=3, output_type="latent", **call).frames
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().max()}"
        assert torch.equal(made, plain) == (version == "paper" or shape == "never reached")


@pytest.mark.parametrize("split", [(1, 7, 1), (4, 3, 2), (1, 2, 1, 4, 1), (1, 1, 2, 1, 1, 2, 1), None])
def test_any_split_of_the_layers_gives_the_same_video(
    engine: Build, wan21_9_layers: Path, split: tuple[int, ...] | None
) -> None:
    call = {"num_frames": 29, "num_inference_steps": 3, **SIZE}
    stages = None if split else 7
    built = engine(wan21_9_layers, frames_per_block=2, context_frames=1, stages=stages, layers_per_stage=split)
    assert [len(layers) for layers in built.setup.layers] == list(split or (2, 2, 1, 1, 1, 1, 1))
    made = built(**embeds(built), output_type="latent", **call).frames
    assert torch.equal(made, reference_latents(built, embeds(built), **call))


def test_versions_of_the_context_differ(engine: Build) -> None:
    """Else the equalities above would show nothing."""
    made = {}
    for limit, version in ((None, "matching"), (None, "newest"), (2, "matching"), (2, "newest")):
        built = engine(frames_per_block=2, context_frames=1, max_blocks_in_flight=limit, context_version=version)
        call = {"num_frames": 29, "num_inference_steps": 4, "output_type": "latent", **SIZE}
        made[limit, version] = built(**embeds(built), **call).frames
    assert torch.equal(made[None, "matching"], made[None, "newest"])
    assert (made[2, "matching"] - made[None, "matching"]).abs().max() > 1e-3
    assert (made[2, "matching"] - made[2, "newest"]).abs().max() > 1e-3


@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_two_experts_equal_reference(engine: Build, wan22: Path, policy: str, guidance: float) -> None:
    call = {"num_frames": 29, "num_inference_steps": 6, "guidance_scale": guidance, "guidance_scale_2": 3.0, **SIZE}
    built = engine(wan22, frames_per_block=2, context_frames=1, context=policy)
    steps = {built.source.spec.expert(float(t), 1000) for t in _timesteps(built, 6)}
    assert steps == {0, 1}, "both experts must run for this test to mean anything"
    prompt = embeds(built, guidance > 1)
    expected = reference_latents(built, prompt, **call)
    for stages in (1, 3):
        built = engine(wan22, frames_per_block=2, context_frames=1, context=policy, stages=stages)
        assert torch.equal(built(**prompt, output_type="latent", **call).frames, expected)


def _timesteps(engine: Engine, steps: int) -> torch.Tensor:
    engine.scheduler.set_timesteps(steps)
    return engine.scheduler.timesteps


def test_euler_sampler(engine: Build) -> None:
    call = {"num_frames": 25, "num_inference_steps": 3, **SIZE}
    made = []
    for stages in (1, 2):
        built = engine(frames_per_block=3, context_frames=1, stages=stages)
        built.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        prompt = embeds(built)
        made.append(built(**prompt, output_type="latent", **call).frames)
    assert torch.equal(made[0], reference_latents(built, prompt, **call))
    assert torch.equal(made[0], made[1])


def test_policies_differ(engine: Build) -> None:
    """Else the equalities above would show nothing."""
    made = {}
    for policy in ("cached", "prior", "paper"):
        built = engine(frames_per_block=2, context_frames=1, context=policy)
        call = {"num_frames": 29, "num_inference_steps": 3, "output_type": "latent", **SIZE}
        made[policy] = built(**embeds(built), **call).frames
    assert (made["cached"] - made["prior"]).abs().max() > 1e-3
    assert (made["cached"] - made["paper"]).abs().max() > 1e-3


@pytest.mark.parametrize("model", ["wan21", "wan22"])
@pytest.mark.parametrize("policy", ["cached", "paper"])
def test_one_block_equals_diffusers(request: pytest.FixtureRequest, engine: Build, model: str, policy: str) -> None:
    path = request.getfixturevalue(model)
    pipe = WanPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    call = {"prompt": "two cats", "negative_prompt": "dogs", "num_frames": 9, "num_inference_steps": 5, **SIZE}
    expected = pipe(**call, latents=latents, output_type="latent").frames
    frames = pipe(**call, latents=latents, output_type="np").frames
    for stages in (1, 2):
        built = engine(path, stages=stages, context=policy)
        made = built(**call, latents=latents, output_type="latent").frames
        assert (made - expected).abs().max() < 5e-5
        video = built(**call, latents=latents, output_type="np").frames
        # The random VAE makes more of a last bit: 6e-5 on an AMD EPYC, less on a Xeon. A gray level is 4e-3.
        assert video.shape == frames.shape and np.abs(video - frames).max() < 2e-4


def test_a_loaded_pipeline_gives_the_same_video_as_its_files(engine: Build, wan21: Path) -> None:
    call = {"prompt": "a cat", "num_frames": 13, "num_inference_steps": 2, "output_type": "latent", **SIZE}
    options = {"frames_per_block": 2, "context_frames": 1}
    from_files = engine(**options)(**call).frames
    from_pipe = engine(WanPipeline.from_pretrained(wan21), **options)(**call).frames
    assert torch.equal(from_files, from_pipe)


@pytest.mark.parametrize("frames", [1, 5, 37])
@pytest.mark.parametrize("kind", ["np", "uint8", "pt", "pil"])
def test_exact_length_in_every_form(engine: Build, frames: int, kind: str) -> None:
    built = engine(frames_per_block=3, context_frames=1)
    video = built("a cat", num_frames=frames, num_inference_steps=1, output_type=kind, **SIZE).frames
    shape = {"np": (1, frames, 32, 32, 3), "uint8": (1, frames, 32, 32, 3), "pt": (1, frames, 3, 32, 32)}
    if kind == "pil":
        assert len(video) == 1 and len(video[0]) == frames and video[0][0].size == (32, 32)
    else:
        assert tuple(video.shape) == shape[kind]


def test_the_papers_headline_length(engine: Build) -> None:
    built = engine(frames_per_block=8, context_frames=8, context="paper", stages=3)
    made = built("a cat", num_frames=1025, num_inference_steps=1, output_type="latent", height=16, width=16).frames
    assert made.shape[2] == 257


def test_stream_gives_blocks_in_order_while_it_runs(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1, stages=2)
    updates: list[int] = []

    def count(_: Engine, step: int, timestep: torch.Tensor, state: dict[str, Any]) -> None:
        updates.append(state["block"])

    call = {"num_frames": 45, "num_inference_steps": 2, **SIZE}
    seen, start = [], 0
    for chunk in built.stream("a cat", callback_on_step_end=count, **call):
        assert chunk.start_frame == start
        start += len(chunk.frames)
        seen.append((chunk.block, len(updates)))
    assert [block for block, _ in seen] == list(range(6)) and start == 45
    assert seen[0][1] < len(updates) == 12, "the first block comes before the last update"
    assert built.stats is not None and built.stats.frames == 45
    whole = built("a cat", **call).frames
    parts = np.concatenate([chunk.frames for chunk in built.stream("a cat", **call)])
    assert np.array_equal(whole[0], parts)


def test_callback_can_replace_latents(engine: Build) -> None:
    def zero(_: Engine, step: int, timestep: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(state["latents"])}

    made = engine()(
        "a cat", num_frames=5, num_inference_steps=2, output_type="latent", callback_on_step_end=zero, **SIZE
    )
    assert (made.frames == 0).all()


@pytest.mark.parametrize(("limit", "version"), [(None, "matching"), (1, "newest"), (2, "matching"), (2, "newest")])
def test_an_endless_video_starts_as_a_finite_one_and_can_be_left(
    engine: Build, limit: int | None, version: str
) -> None:
    call = {"num_inference_steps": 3, "output_type": "latent", "seed": 4, **SIZE}
    built = engine(frames_per_block=2, context_frames=1, stages=2, max_blocks_in_flight=limit, context_version=version)
    chunks = []
    for chunk in built.stream("a cat", num_frames=None, **call):
        assert chunk.progress.total_blocks is None
        chunks.append(chunk.latents)
        if len(chunks) == 5:
            break
    finite = built("a cat", num_frames=4 * (24 - 1) + 1, **call).frames
    # cached: block b sees block b + 1, so the last blocks before the end differ; the others must not
    assert torch.equal(torch.cat(chunks, dim=2), finite[:, :, :10])


def test_interrupt_gives_out_what_is_finished(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    seen = []
    for chunk in built.stream("a cat", num_frames=81, num_inference_steps=2, output_type="latent", **SIZE):
        seen.append(chunk.block)
        if chunk.block == 2:
            built.interrupt()
    assert seen[:3] == [0, 1, 2] and len(seen) < 6
    assert built("a cat", num_frames=5, num_inference_steps=1, output_type="latent", **SIZE).frames.shape[2] == 2


def test_an_interrupt_before_the_first_block_is_not_lost(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    chunks = built.stream("a cat", num_frames=801, num_inference_steps=2, output_type="latent", **SIZE)
    built.interrupt()
    assert len(list(chunks)) < 3


def test_an_engine_makes_one_video_at_a_time(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    call = {"num_frames": 41, "num_inference_steps": 1, "output_type": "latent", **SIZE}
    first = built.stream("a cat", **call)
    next(first)
    with pytest.raises(RuntimeError, match="making a video"):
        built.stream("a dog", **call)
    first.close()
    assert built("a dog", **call).frames.shape[2] == 11


def test_prompt_change_reaches_new_blocks_only(engine: Build) -> None:
    call = {"num_frames": 61, "num_inference_steps": 3, "output_type": "latent", **SIZE}
    options = {"frames_per_block": 2, "context_frames": 0}  # without context, blocks do not influence each other
    alone = {text: engine(**options)(text, **call).frames for text in ("a cat", "a dog")}
    for stages in (1, 3):
        planned = engine(stages=stages, **options)({0: "a cat", 28: "a dog"}, **call).frames  # frame 28: latent 7
        assert torch.equal(planned[:, :, :6], alone["a cat"][:, :, :6])
        assert torch.equal(planned[:, :, 6:], alone["a dog"][:, :, 6:])
        built = engine(stages=stages, **options)
        parts = []
        for chunk in built.stream("a cat", **call):
            parts.append(chunk.latents)
            if chunk.block == 1:
                first = built.set_prompt("a dog")
                assert first > 2, "blocks in flight keep their prompt"
        made = torch.cat(parts, dim=2)
        assert torch.equal(made[:, :, : 2 * first], alone["a cat"][:, :, : 2 * first])
        assert torch.equal(made[:, :, 2 * first :], alone["a dog"][:, :, 2 * first :])
    with pytest.raises(RuntimeError, match="no video is running"):
        built.set_prompt("a bird")


def test_prompts_forget_what_no_block_can_use() -> None:
    prompts = Prompts({0: torch.zeros(1), 4: torch.ones(1)})
    assert [prompts.of(block) for block in range(6)] == [0, 0, 0, 0, 4, 4]
    assert prompts.change(torch.ones(1)) == 6
    assert prompts.of(7) == 6 and prompts.of(3) == 0  # a resumed run asks for older blocks after newer ones
    prompts.forget(5)
    assert set(prompts.state()) == {4, 6}
    prompts.forget(8)
    with pytest.raises(KeyError):
        prompts.embeds(4)


@pytest.mark.parametrize(("version", "guidance"), [("matching", 5.0), ("newest", 1.0), ("prior", 5.0), ("paper", 1.0)])
def test_each_of_several_videos_is_the_one_it_is_alone(
    engine: Build, wan22: Path, version: str, guidance: float
) -> None:
    policy = {"context": "cached", "context_version": version} if version in CONTEXT_VERSIONS else {"context": version}
    options = {"frames_per_block": 2, "context_frames": 1, "max_blocks_in_flight": 2, **policy}
    call = {"num_frames": 33, "num_inference_steps": 3, "guidance_scale": guidance, "output_type": "latent", **SIZE}
    prompts: list[Any] = ["a cat", {0: "a dog", 16: "a cow"}, "a bird"]
    seeds, negative = [7, 3, 3], ["", "wolves", "clouds"]
    alone = engine(wan22, **options)
    expected = torch.cat(
        [
            alone(text, negative_prompt=other, seed=seed, **call).frames
            for text, other, seed in zip(prompts, negative, seeds, strict=True)
        ]
    )
    assert not torch.equal(expected[1], expected[2])
    for stages in (1, 4) if guidance == 1.0 else (2, 3):
        built = engine(wan22, stages=stages, **options)
        made = built(prompts, negative_prompt=negative, seed=seeds, **call).frames
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().amax((1, 2, 3, 4))}"


def test_several_videos_in_eight_bits(engine: Build) -> None:
    options = {"frames_per_block": 2, "context_frames": 1, "dtype": "bfloat16", "attention_8bit": "int8"}
    call = {"num_frames": 21, "num_inference_steps": 3, "output_type": "latent", **SIZE}
    alone = torch.cat(
        [engine(**options)(text, seed=seed, **call).frames for text, seed in (("a cat", 4), ("a dog", 5))]
    )
    assert torch.equal(engine(stages=2, **options)(["a cat", "a dog"], seed=4, **call).frames, alone)


def test_several_videos_come_block_by_block_and_as_a_batch(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1, stages=2)
    call = {"num_frames": 21, "num_inference_steps": 2, "seed": 1, **SIZE}
    seen, frames = [], [0, 0]
    for chunk in built.stream(["a cat", "a dog"], **call):
        seen.append((chunk.block, chunk.video))
        assert chunk.start_frame == frames[chunk.video]
        frames[chunk.video] += len(chunk.frames)
    assert sorted(seen) == seen == [(block, video) for block in range(3) for video in range(2)]
    assert chunk.progress.blocks == chunk.progress.total_blocks == 6
    assert chunk.progress.frames == chunk.progress.total_frames == 42
    alone = [built("a dog", **{**call, "seed": 2, "output_type": kind}).frames for kind in ("np", "pt")]
    batch = [built(["a cat", "a dog"], output_type=kind, **call).frames for kind in ("np", "pt", "pil", "uint8")]
    assert batch[0].shape == (2, 21, 32, 32, 3) and np.array_equal(batch[0][1:], alone[0])
    assert batch[1].shape == (2, 21, 3, 32, 32) and torch.equal(batch[1][1:], alone[1])
    assert [len(images) for images in batch[2]] == [21, 21] and batch[3].shape == (2, 21, 32, 32, 3)


def test_rows_of_tensors_are_videos(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    call = {"num_frames": 13, "num_inference_steps": 2, "output_type": "latent", **SIZE}
    latents = torch.randn(2, 16, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    rows = [embeds(built, seed=seed) for seed in (1, 2)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    made = built(**batch, latents=latents, **call).frames
    for video in range(2):
        alone = built(**rows[video], latents=latents[video : video + 1], **call).frames
        assert torch.equal(made[video : video + 1], alone)


def test_the_prompt_of_one_of_several_videos_changes(engine: Build) -> None:
    call = {"num_frames": 61, "num_inference_steps": 3, "output_type": "latent", **SIZE}
    options = {"frames_per_block": 2, "context_frames": 0}
    alone = {text: engine(**options)(text, seed=5, **call).frames for text in ("a cat", "a dog", "a cow")}
    built = engine(stages=3, **options)
    parts: list[list[torch.Tensor]] = [[], []]
    for chunk in built.stream(["a cat", "a dog"], seed=[5, 5], **call):
        parts[chunk.video].append(chunk.latents)
        if (chunk.video, chunk.block) == (0, 1):
            first = built.set_prompt("a cow", video=1)
            with pytest.raises(ValueError, match="video=2: 2 are running"):
                built.set_prompt("a cow", video=2)
    made = [torch.cat(part, dim=2) for part in parts]
    assert torch.equal(made[0], alone["a cat"])
    assert torch.equal(made[1][:, :, : 2 * first], alone["a dog"][:, :, : 2 * first])
    assert torch.equal(made[1][:, :, 2 * first :], alone["a cow"][:, :, 2 * first :])


def test_interrupted_videos_are_of_one_length(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)

    def stop(_: Engine, step: int, timestep: torch.Tensor, state: dict[str, Any]) -> None:
        if (state["video"], state["block"], step) == (0, 2, 1):
            built.interrupt()

    call = {"num_frames": 81, "num_inference_steps": 2, "output_type": "latent", "callback_on_step_end": stop, **SIZE}
    made = built(["a cat", "a dog"], **call).frames
    assert made.shape[0] == 2 and 4 <= made.shape[2] < 10


def test_seeds_and_generators(engine: Build) -> None:
    built = engine()
    call = {"prompt": "a cat", "num_frames": 5, "num_inference_steps": 1, "output_type": "latent", **SIZE}
    assert torch.equal(built(**call, seed=1).frames, built(**call, seed=1).frames)
    assert not torch.equal(built(**call, seed=1).frames, built(**call, seed=2).frames)
    drawn = [built(**call, generator=torch.Generator().manual_seed(7)).frames for _ in range(2)]
    assert torch.equal(*drawn)
    pair = {**call, "prompt": ["a cat"] * 2}
    both = built(**pair, generator=torch.Generator().manual_seed(7)).frames
    assert torch.equal(both[:1], drawn[0]) and not torch.equal(both[1:], drawn[0])
    each = built(**pair, generator=[torch.Generator().manual_seed(7) for _ in range(2)]).frames
    assert torch.equal(each[:1], drawn[0]) and torch.equal(each[1:], drawn[0])
    with pytest.raises(ValueError, match="seed and generator"):
        built(**call, seed=1, generator=torch.Generator())


def test_bfloat16_runs_and_is_the_same_for_any_number_of_stages(engine: Build) -> None:
    made = []
    for stages in (1, 2, 4):
        built = engine(stages=stages, dtype="bfloat16", frames_per_block=2, context_frames=1)
        made.append(built("a cat", num_frames=21, num_inference_steps=3, output_type="latent", **SIZE).frames)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert made[0].dtype == torch.float32


def test_nan_is_not_given_out(engine: Build) -> None:
    def poison(_: Engine, step: int, timestep: torch.Tensor, state: dict[str, Any]) -> dict[str, Any] | None:
        return {"latents": state["latents"] * float("nan")} if state["block"] == 2 else None

    built = engine(frames_per_block=2, context_frames=0)
    seen = []
    with pytest.raises(NonFiniteError, match="block 2"):
        for chunk in built.stream(
            "a cat", num_frames=61, num_inference_steps=2, output_type="latent", callback_on_step_end=poison, **SIZE
        ):
            seen.append(chunk.block)
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_frames": 100}, "use 97 or 101"),
        ({"height": 40}, "height=40 is not divisible by 16"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt is an int: use a text"),
        ({"prompt": []}, "prompt holds no text"),
        ({"prompt": ["a", 3]}, "prompt is an int: use a text"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt for 1 videos, and prompts for 2"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "seed for 3 videos, and prompts for 2"),
        ({"prompt": ["a", "b"], "latents": torch.zeros(1, 16, 3, 4, 4)}, "latents for 1 videos"),
        ({"prompt": "a", "seed": [1, 2]}, "seed for 2 videos, and prompts for 1"),
        ({"prompt": {5: "a cat"}}, "no text for frame 0"),
        ({"prompt": {0: "a cat", 3: "a dog"}}, "same block 0"),
        ({"guidance_scale_2": 3.0}, "single transformer"),
        ({"latents": torch.zeros(1, 16, 2, 4, 4)}, r"latents have shape \[1, 16, 2, 4, 4\]"),
        ({"latents": torch.full((1, 16, 3, 4, 4), float("nan"))}, "NaN or infinity"),
        ({"latents": torch.zeros(1, 16, 3, 4, 4), "num_frames": None}, "endless"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 7)}, "negative_prompt_embeds too"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 7), "guidance_scale": 1.0}, r"\[1, 4, 7\]"),
        ({"output_type": "gif"}, "output_type='gif'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ],
)
def test_bad_requests_are_refused_before_weights_are_read(
    engine: Build, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], words: str
) -> None:
    built = engine()
    monkeypatch.setattr(built.source.__class__, "load_slices", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=words):
        built.stream(**{"prompt": "a cat", "num_frames": 9, "num_inference_steps": 2, **SIZE, **call})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_frames": 9}, "context_frames=9 exceeds"),
        ({"stages": 5}, "stages=5 with a model of 4 layers"),
        ({"stages": 0}, "stages=0"),
        ({"layers_per_stage": [2, 2], "stages": 3}, "2 numbers with stages=3"),
        ({"layers_per_stage": [2, 3]}, "5 layers, and the model has 4"),
        ({"depth": 0}, "depth=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"context": "none"}, "context='none'"),
        ({"max_blocks_in_flight": 0}, "max_blocks_in_flight=0"),
        ({"context_version": "older"}, "context_version='older'"),
        ({"context_version": "newest", "context": "prior"}, "only 'cached' has a choice"),
    ],
)
def test_bad_engines_are_refused(engine: Build, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine(**options)


def test_unknown_arguments_are_errors(engine: Build) -> None:
    with pytest.raises(TypeError, match="clip_skip"):
        engine()("a cat", clip_skip=2)
