"""Blocks, windows and lengths: every latent frame belongs to exactly one block."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualparal.config.blocks import CONTEXT_POLICIES, BlockConfig
from dualparal.config.video import VideoConfig
from dualparal.schedule.layout import Layout, split_layers

blocks = st.integers(1, 12).flatmap(
    lambda b: st.builds(BlockConfig, st.just(b), st.integers(0, b), st.sampled_from(CONTEXT_POLICIES))
)


@given(blocks, st.integers(1, 200))
def test_blocks_tile_the_video(config: BlockConfig, length: int) -> None:
    layout = Layout(config, length)
    assert layout.num_blocks is not None
    at = 0
    for block in range(layout.num_blocks):
        assert layout.start(block) == at
        at += layout.kept_frames(block)
        assert layout.kept_frames(block) > 0, "no block is all surplus"
        assert layout.window(block).start >= 0
        assert layout.window(block).stop == layout.start(block) + layout.frames(block)
    assert at == length
    assert layout.padded_latents is not None and 0 <= layout.padded_latents - length < config.frames_per_block


@given(blocks)
def test_an_endless_video_is_laid_out_as_a_long_one(config: BlockConfig) -> None:
    endless, long = Layout(config, None), Layout(config, 1000)
    assert endless.num_blocks is None
    for block in (0, 1, 7):
        assert endless.start(block) == long.start(block)
        assert endless.window(block) == long.window(block)


def test_a_video_that_fits_into_a_block_is_one_block_of_its_length() -> None:
    for policy, length in (("cached", 5), ("prior", 8), ("paper", 12)):
        layout = Layout(BlockConfig(8, 4, policy), length)  # type: ignore[arg-type]
        assert (layout.num_blocks, layout.frames(0), layout.padded_latents) == (1, length, length)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (81, 21), (1025, 257)])
def test_frames_to_latents(frames: int, latents: int) -> None:
    assert VideoConfig(num_frames=frames).num_latents() == latents


def test_an_impossible_length_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"num_frames=100 .* use 97 or 101"):
        VideoConfig(num_frames=100).num_latents()


@given(st.integers(1, 100), st.integers(1, 100))
def test_layers_are_split_evenly(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(ValueError, match=f"stages={stages}"):
            split_layers(layers, stages)
        return
    parts = split_layers(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_layers_are_split_as_asked() -> None:
    assert split_layers(30, 3, [9, 11, 10]) == [range(9), range(9, 20), range(20, 30)]
    assert split_layers(4, 3, (2, 1, 1)) == split_layers(4, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockConfig(4, 5), "context_frames=5 exceeds frames_per_block=4"),
        (lambda: BlockConfig(0, 0), "frames_per_block=0"),
        (lambda: BlockConfig(4, -1), "context_frames=-1"),
        (lambda: BlockConfig(4, 1, "both"), "context='both'"),  # type: ignore[arg-type]
        (lambda: BlockConfig(max_blocks_in_flight=0), "max_blocks_in_flight=0"),
        (lambda: BlockConfig(context_version="old"), "context_version='old'"),  # type: ignore[arg-type]
        (lambda: BlockConfig(context="paper", context_version="newest"), "leave context_version out"),
        (lambda: split_layers(30, 3, [15, 15]), "layers_per_stage=15,15: 2 numbers with stages=3"),
        (lambda: split_layers(30, 2, [30, 0]), "layers_per_stage=30,0: every stage owns at least one layer"),
        (lambda: split_layers(30, 2, [15, 14]), "layers_per_stage=15,14: 29 layers, and the model has 30"),
        (lambda: VideoConfig(num_frames=0), "num_frames=0"),
        (lambda: VideoConfig(height=10**6), "height=1000000"),
        (lambda: VideoConfig(num_inference_steps=True), "num_inference_steps=True"),
        (lambda: VideoConfig(guidance_scale=float("nan")), "guidance_scale=nan"),
        (lambda: VideoConfig(guidance_scale_2=10**400), "guidance_scale_2=10"),
        (lambda: VideoConfig.of(timesteps=[1000, 757, 757]), r"timesteps\[2\]=757: .*below the one before"),
        (lambda: VideoConfig.of(timesteps=[500, 1000]), r"timesteps\[1\]=1000"),
        (lambda: VideoConfig.of(timesteps=[1000, 0]), r"timesteps\[1\]=0: .*above 0"),
        (lambda: VideoConfig.of(timesteps=[float("nan")]), r"timesteps\[0\]=nan"),
        (lambda: VideoConfig.of(timesteps=[float("inf"), 5]), r"timesteps\[0\]=inf"),
        (lambda: VideoConfig.of(timesteps=[10**400, 5]), r"timesteps\[0\]=10000"),
        (lambda: VideoConfig.of(timesteps=[True]), r"timesteps\[0\]=True"),
        (lambda: VideoConfig.of(timesteps="1000,500"), "timesteps='1000,500': use a list"),
        (lambda: VideoConfig.of(timesteps=1000), "timesteps=1000: use a list"),
        (lambda: VideoConfig.of(timesteps=[]), "with 0 timesteps: a list has every step, 1 to 10000"),
        (lambda: VideoConfig.of(sigmas=[1.1, 0.5]), r"sigmas\[0\]=1.1: use noise levels from at most 1 down"),
        (lambda: VideoConfig.of(sigmas=[1.0, 0.0]), r"sigmas\[1\]=0.0"),
        (lambda: VideoConfig.of(sigmas=[1.0], timesteps=[1000]), "timesteps and sigmas were both given"),
        (lambda: VideoConfig.of(sigmas=[1.0], num_inference_steps=50), "num_inference_steps=50 with 1 sigmas.*leave"),
        (lambda: VideoConfig(sigmas=(1.0,)), "num_inference_steps=50 with 1 sigmas"),
        (lambda: VideoConfig.of(sigmas=[1 - i / 20000 for i in range(10001)]), "with 10001 sigmas"),
        (lambda: VideoConfig(output_type="gif"), "output_type='gif'"),  # type: ignore[arg-type]
        (lambda: VideoConfig(height=100).check_size(16, 16), "height=100 is not divisible by 16.*use 96 or 112"),
    ],
)
def test_refusals_name_value_and_way_out(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_a_list_says_how_many_steps_there_are() -> None:
    found = VideoConfig.of(timesteps=[1000, 757, 522], num_frames=9)
    assert (found.num_inference_steps, found.timesteps, found.num_frames) == (3, (1000.0, 757.0, 522.0), 9)
    assert VideoConfig.of(sigmas=(1.0, 0.5), num_inference_steps=2).sigmas == (1.0, 0.5)
    assert VideoConfig.of().num_inference_steps == VideoConfig.of(timesteps=None).num_inference_steps == 50
    again = VideoConfig(**json.loads(json.dumps(asdict(found))))
    assert again == found and hash(again) == hash(found)
