"""Noise is a function of (seed, block), and every window holds each pool frame once."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.config.blocks import CONTEXT_POLICIES, MAX_STEPS, BlockConfig
from dualparal.sampling.noise import BlockNoise, derive_seed, step_generator, step_seed
from dualparal.schedule.layout import Layout

SHAPE = (2, 2, 2)
blocks = st.integers(1, 8).flatmap(
    lambda b: st.builds(BlockConfig, st.just(b), st.integers(0, b), st.sampled_from(CONTEXT_POLICIES))
)


@settings(max_examples=60)
@given(blocks, st.integers(0, 2**63 - 1), st.randoms())
def test_any_order_gives_the_same_noise(config: BlockConfig, seed: int, order: random.Random) -> None:
    layout = Layout(config, None)
    noise = BlockNoise(layout, SHAPE, seed)
    straight = [noise(block) for block in range(8)]
    shuffled = list(range(8))
    order.shuffle(shuffled)
    other = BlockNoise(layout, SHAPE, seed)
    for block in shuffled:
        assert torch.equal(other(block), straight[block])


@settings(max_examples=60)
@given(blocks, st.integers(0, 1000))
def test_a_window_holds_each_pool_frame_once(config: BlockConfig, seed: int) -> None:
    noise = BlockNoise(Layout(config, None), SHAPE, seed)
    for block in range(1, 12):
        previous = noise.frames(block - 1)
        window = previous[len(previous) - config.context_frames :] + noise.frames(block)
        assert sorted(window) == list(range(config.frames_per_block + config.context_frames))


def test_seeds_and_blocks_give_different_noise() -> None:
    seeds = {derive_seed(seed, block) for seed in range(200) for block in range(-1, 200)}
    assert len(seeds) == 200 * 201
    layout = Layout(BlockConfig(4, 2), None)
    assert not torch.equal(BlockNoise(layout, SHAPE, 1)(0), BlockNoise(layout, SHAPE, 2)(0))


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    BlockNoise(Layout(BlockConfig(4, 2), None), SHAPE, 1)(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_given_latents_are_used_and_the_surplus_comes_from_the_pool() -> None:
    layout = Layout(BlockConfig(4, 2), 10)
    given_latents = torch.randn(1, 2, 10, 2, 2)
    noise = BlockNoise(layout, SHAPE, 1, given_latents)
    made = torch.cat([noise(block) for block in range(3)], dim=2)
    assert torch.equal(made[:, :, :10], given_latents)
    assert torch.equal(made[:, :, 10:], BlockNoise(layout, SHAPE, 1)(2)[:, :, 2:])


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(0, 420_000))
def test_fresh_noise_never_meets_the_pool_or_itself(seed: int, first: int) -> None:
    """By the seeds that count: torch's generator on the CPU takes the lower 32 bits."""
    places = [(first + block, step) for block in range(40) for step in (*range(8), MAX_STEPS - 1)]
    seeds = {step_seed(seed, *place) for place in places}
    assert len(seeds) == len(places) and all(0 <= found < 2**32 for found in seeds)
    assert derive_seed(seed, -1) % 2**32 not in seeds


def test_the_last_place_before_seeds_repeat_is_not_the_pools() -> None:
    pool = derive_seed(7, -1) % 2**32
    last = 2**32 - 2  # place + 1 = 2**32 - 1 strides; one more would be the pool again
    assert step_seed(7, *divmod(last, MAX_STEPS)) != pool != step_seed(7, *divmod(last + 1, MAX_STEPS))
    assert step_seed(7, *divmod(last + 1, MAX_STEPS)) == step_seed(7, 0, 0)


def test_the_generator_takes_32_bits_and_ours_differ_in_them() -> None:
    one, same = (torch.randn(32, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(one, same)
    drawn = {tuple(torch.randn(4, generator=step_generator(1, *place)).tolist()) for place in ((0, 0), (0, 1), (1, 0))}
    assert len(drawn) == 3
    assert torch.equal(*(torch.randn(32, generator=step_generator(1, 2, 3)) for _ in range(2)))
