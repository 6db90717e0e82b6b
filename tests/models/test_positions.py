"""Absolute rotary positions equal window-local ones, have no largest index, and are diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

import dualparal.reference
from dualparal.config.blocks import BlockConfig
from dualparal.engine.engine import Engine
from dualparal.models.base import Grid, Rotary
from dualparal.models.keys_values import KeysValues
from dualparal.models.wan.transformer import WanSlice
from dualparal.sampling.noise import BlockNoise
from dualparal.sampling.sampler import Sampler
from dualparal.schedule.layout import Layout
from engine_calls import embeds

GRID = Grid(4, 6, 2, 3)


def full_slice(engine: Engine) -> WanSlice:
    spec = engine.source.spec
    loaded = engine.source.load_slices(range(spec.num_layers), torch.float32, torch.device("cpu"))[0]
    assert isinstance(loaded, WanSlice)
    return loaded


def test_angles_are_diffusers_angles(engine: Callable[..., Engine]) -> None:
    expert = full_slice(engine())
    theirs = WanRotaryPosEmbed(expert.head_dim, (1, 2, 2), 1024)(torch.zeros(1, 16, 40, 4, 6))
    ours = expert.rotary(0, 40, GRID)
    for mine, other, first in zip(ours, theirs, (0, 1), strict=True):
        assert torch.equal(mine, other[0, :, 0, first::2])
    later = expert.rotary(30, 10, GRID)
    assert torch.equal(later.cos, ours.cos[30 * GRID.tokens :])


class WindowLocal:
    """A slice whose positions restart at 0 in every window, as in the authors' code.

    Its own keys are turned by the window's start before they are lent and turned back by the reader's start, so
    that a neighbour's keys lie where the reader's window has them.
    """

    def __init__(self, inner: WanSlice) -> None:
        self.inner = inner
        self.start = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def rotary(self, start: int, frames: int, grid: Grid) -> Rotary:
        self.start = start
        return self.inner.rotary(0, frames, grid)

    def turn(self, keys: torch.Tensor, frames: int) -> torch.Tensor:
        spec = self.inner
        temporal = spec.head_dim - 4 * (spec.head_dim // 6)
        frequencies = 10000.0 ** (-torch.arange(0, temporal, 2, dtype=torch.float64) / temporal)
        angles = frames * frequencies
        pairs = keys.double().unflatten(1, (spec.heads, -1, 2)).clone()
        x, y = pairs[:, :, : len(angles), 0].clone(), pairs[:, :, : len(angles), 1].clone()
        pairs[:, :, : len(angles), 0] = x * angles.cos() - y * angles.sin()
        pairs[:, :, : len(angles), 1] = x * angles.sin() + y * angles.cos()
        return pairs.flatten(1).float()

    def layer(
        self, index: int, hidden: Any, pending: Any, time: Any, text: Any, rotary: Any,
        context: KeysValues, *_: Any,
    ) -> Any:  # fmt: skip
        own = len(hidden)
        local = KeysValues(torch.cat([context.keys[:own], self.turn(context.keys[own:], -self.start)]), context.values)
        result = self.inner.layer(index, hidden, pending, time, text, rotary, local)
        context.keys[:own] = self.turn(local.keys[:own], self.start)
        return result


class Unturned(WindowLocal):
    """The mistake: neighbours' keys stay where their maker's window had them."""

    def turn(self, keys: torch.Tensor, frames: int) -> torch.Tensor:
        return keys


@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
def test_window_local_positions_give_the_same_video(engine: Callable[..., Engine], policy: str) -> None:
    built = engine()
    expert = full_slice(built)
    layout = Layout(BlockConfig(3, 2, policy), 14)  # type: ignore[arg-type]
    text = torch.randn(2, 16, expert.config["text_dim"], generator=torch.Generator().manual_seed(0))

    def generate(slice_: Any) -> torch.Tensor:
        return dualparal.reference.generate(
            built.source.spec, [slice_], Sampler(built.scheduler, 4), layout, GRID,
            BlockNoise(layout, (16, 4, 6), 1), lambda block: text, [3.0],
        )  # fmt: skip

    absolute = generate(expert)
    assert (absolute - generate(WindowLocal(expert))).abs().max() < 1e-5
    assert (absolute - generate(Unturned(expert))).abs().max() > 1e-3, "the test can fail"


def test_frame_100000_works(engine: Callable[..., Engine]) -> None:
    """Angles there are as exact as at 0, and relative positions are all that matters."""
    built = engine()
    expert = full_slice(built)
    far = expert.rotary(100_000, 4, GRID)
    assert far.cos.isfinite().all() and (far.cos**2 + far.sin**2 - 1).abs().max() < 1e-6
    latents = torch.randn(1, 16, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    time, text = expert.time(torch.tensor(500)), expert.text(torch.zeros(16, expert.config["text_dim"]))

    def velocity(start: int) -> torch.Tensor:
        hidden, pending = expert.embed(expert.patches(latents)), None
        for index in range(expert.num_layers):
            context = KeysValues(torch.empty_like(hidden), torch.empty_like(hidden))
            keys_values = KeysValues(text[index, 0], text[index, 1])
            rotary = expert.rotary(start, 4, GRID)
            hidden, pending = expert.layer(index, hidden, pending, time, keys_values, rotary, context)
        return expert.picture(expert.head(hidden, pending, time), GRID)

    with torch.inference_mode():
        assert (velocity(0) - velocity(100_000)).abs().max() < 1e-5


def test_angles_are_made_once_for_every_window(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take turns; of those that are gone nothing is kept."""
    made: list[int] = []
    original = WanSlice.rotary

    def rotary(self: WanSlice, start: int, frames: int, grid: Grid) -> Rotary:
        made.append(start)
        return original(self, start, frames, grid)

    monkeypatch.setattr(WanSlice, "rotary", rotary)
    built = engine(frames_per_block=2, context_frames=1)
    chunks = built.stream(
        **embeds(built), height=32, width=32, num_frames=45, num_inference_steps=3, output_type="latent"
    )
    for _ in chunks:
        assert built._run is not None
        for executor in built._run._executors:
            assert len(executor.stage._angles._made) <= 3, "as many as blocks are in flight"
    assert len(made) == len(set(made)) == 6
