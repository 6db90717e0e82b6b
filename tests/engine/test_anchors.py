"""Anchor frames: their order of work, their keys, and the engine's equality with the reference for any N."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.config.engine import EngineConfig
from dualparal.engine.engine import Engine
from dualparal.models.anchors import Weighed, turn
from dualparal.models.base import Grid, attend_here
from dualparal.models.keys_values import KeysValues
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.validate import validate
from engine_calls import embeds, reference_latents

Build = Callable[..., Engine]

CASES: dict[str, tuple[dict[str, Any], float, int, tuple[int, ...]]] = {  # options, guidance, side of a frame, stages
    "cached": ({"anchor_frames": 2, "features_8bit": True}, 5.0, 32, (1, 4)),
    "newest, weighed": (
        {"context_version": "newest", "max_blocks_in_flight": 2, "anchor_weight": -1.5, "reuse": "uncond=2"},
        5.0,
        32,
        (3,),
    ),
    "prior, refreshes": ({"context": "prior", "refresh_every": 3, "anchor_weight": 0.5}, 1.0, 32, (2, 3)),
    "paper, places": ({"context": "paper", "sequence_parallel": 2, "anchor_weight": 1.0}, 1.0, 128, (2,)),
    "no context": ({"context_frames": 0, "max_blocks_in_flight": 3}, 5.0, 32, (2,)),
}


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_reference_with_anchors(engine: Build, wan22: Path, case: str) -> None:
    more, guidance, side, counts = CASES[case]
    options = {"frames_per_block": 2, "context_frames": 1, "anchor_frames": 1, **more}
    call = {"num_frames": 21, "num_inference_steps": 4, "guidance_scale": guidance, "height": side, "width": side}
    built = engine(wan22, **options)
    prompt = embeds(built, guidance > 1)
    expected = reference_latents(built, prompt, seed=3, **call)
    for stages in counts:
        built = engine(wan22, stages=stages, **options)
        made = built(**prompt, seed=3, output_type="latent", **call).frames
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().max()}"
    without = reference_latents(
        engine(wan22, **{**options, "anchor_frames": 0, "anchor_weight": 0.0}), prompt, seed=3, **call
    )
    start = options["frames_per_block"] + (options.get("context") == "paper")
    same = [torch.equal(expected[:, :, frame], without[:, :, frame]) for frame in (0, start)]
    assert not same[1], "the second block sees the anchor"


def test_every_order_of_work_reads_the_anchor_that_it_names() -> None:
    numbers = product(("cached", "prior", "paper"), (None, 2), (None, 4), ((), (1, 3)), (0, 2), (1, 2))
    for context, most, every, only, frames, videos in numbers:
        order = Schedule(
            3, 6, 5, context, frames, max_blocks_in_flight=most, refresh_every=every, conditional_only=only,
            num_videos=videos, anchor_frames=1, context_version="newest" if context == "cached" else "matching",
        )  # fmt: skip
        validate(order)
        read = {features for unit in order.units() for features in order.reads(unit)}
        written = {features for unit in order.units() for features in order.writes(unit)}
        assert read == written and len([f for f in read if f.side == "anchor" and f.step == 6]) == 2 * videos
        starts = [at for at in range(1, 14) if order.is_restartable(at) and order.in_flight(at)]
        assert not starts or min(starts) >= order.num_steps
        for start in starts:
            validate(replace(order, start=start))


def test_anchor_keys_are_as_if_made_where_they_are_wanted(engine: Build, wan21: Path) -> None:
    (expert,) = engine(wan21).source.load_slices(range(1), torch.float32, torch.device("cpu"))
    grid = Grid(4, 6, 2, 3)
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = torch.randn(3, 4 * grid.tokens, expert.inner_dim, generator=generator)

    def at(start: int) -> torch.Tensor:
        whole = expert.rotary(start, 4, grid)
        pairs = keys.unflatten(1, (expert.heads, -1, 2)).double()
        turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(*whole).unsqueeze(1)
        return torch.view_as_real(turned).flatten(1).float()

    moved = at(0)
    turn(moved, expert.shift(37), expert.heads)
    torch.testing.assert_close(moved, at(37), rtol=0, atol=1e-5)

    rows, weight = 2 * grid.tokens, 0.7
    made = Weighed(rows, weight, attend_here)(None, queries, KeysValues(keys, values), expert.heads)  # type: ignore[arg-type]
    q, k, v = (x.unflatten(1, (expert.heads, -1)).transpose(0, 1).double() for x in (queries, keys, values))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    logits[..., -rows:] += weight
    torch.testing.assert_close(made, (logits.softmax(-1) @ v).transpose(0, 1).flatten(1).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_frames": 9}, "anchor_frames=9"),
        ({"anchor_weight": 1.0}, "anchor_frames=0: there is no anchor"),
        ({"anchor_frames": 1, "anchor_weight": float("nan")}, "anchor_weight=nan"),
        ({"anchor_frames": 1, "attention_8bit": "int8"}, "attention_8bit='int8' with anchor_frames=1"),
    ],
)
def test_refusals_name_the_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.of(**options)
