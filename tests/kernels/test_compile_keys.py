"""No kernel is compiled in the middle of a video: whatever its blocks, units and slots, Triton sees one key of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from compile_keys import recorded_launches
from dualparal.engine.engine import Engine
from dualparal.kernels.attention_8bit import TILE, KeysValues8, Queries8, attention_8bit
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.models.wan.tiny import build_tiny_pipeline
from engine_calls import embeds

# Frames of 1, 4 and 15 tokens, blocks of 1 and 4 frames: numbers of rows, the rows where context begins and the sizes
# of latents are 1, divide by 16, and neither.
CUTS = [(16, 16, 1), (16, 16, 4), (32, 32, 4), (48, 80, 4)]  # height, width, frames per block
OPTIONS: dict[str, dict[str, Any]] = {
    "cached": {},
    "prior": {"context": "prior"},
    "paper": {"context": "paper"},
    "refresh": {"refresh_every": 3},
    "int8": {"attention_8bit": "int8"},
    "fp8": {"attention_8bit": "fp8", "context": "prior"},
    "linears and features": {"linear_8bit": "fp8", "features_8bit": True},
}


@pytest.fixture(scope="module")
def wan64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "wan64", layers=2, head_dim=64)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_key_per_kernel_and_shape_class(engine: Callable[..., Engine], wan64: Path, options: str) -> None:
    """Over all units of videos of several sizes."""
    hints = defaultdict(list)
    with recorded_launches() as found:
        for height, width, frames in CUTS:
            asked = {"frames_per_block": frames, "context_frames": 1, "dtype": "bfloat16", "allow_nonfinite": True}
            built = engine(wan64, **{**asked, **OPTIONS[options]})
            call = {"num_frames": 8 * frames + 1, "num_inference_steps": 3, "height": height, "width": width}
            built(**embeds(built), **call, output_type="latent")
    for launch in found:
        hints[launch.shape_class].append(dict(launch.hints))
    assert {"residual_norm_kernel", "combine_guidance_kernel", "attention_kernel"} <= {name for name, *_ in hints}
    if "linear_8bit" in OPTIONS[options]:
        assert {"quantise_rows_kernel", "restore_rows_kernel"} <= {name for name, *_ in hints}
    differing = [
        (shape_class[0], sorted({name for one in keys for name in one if one[name] != keys[0][name]}))
        for shape_class, keys in hints.items()
        if len(keys) > 1
    ]
    assert not differing, "compiled once more for other values of these arguments"


def test_one_key_for_all_sizes_of_latents() -> None:
    with recorded_launches() as found:
        for size in (1, 15, 16, 2048):
            combine_guidance(torch.zeros(size), torch.zeros(size), 2.0)
    assert len(found) == 1


def test_one_key_for_all_lengths_of_an_arena() -> None:
    with recorded_launches() as found:
        for tiles in (1, 2, 16):
            made = KeysValues8.empty(tiles * TILE, 64, 1, torch.bfloat16)
            q, scale, bias = torch.zeros(5, 64, dtype=torch.int8), torch.zeros(1, 5), torch.zeros(0, 1, 5)
            attention_8bit(Queries8(q, scale, bias), made, [0, tiles * TILE], heads=1)
    assert len(found) == 1
