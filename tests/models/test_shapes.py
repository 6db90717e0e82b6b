"""What is written down of a Wan transformer, so that nobody has to import it, is what diffusers has."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_timestep_embedding

from dualparal.models.wan.shapes import KEYS, tensor_shapes
from dualparal.models.wan.timesteps import timestep_frequencies

ODD = {  # no two sizes alike
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 5,
    "out_channels": 7,
    "text_dim": 11,
    "freq_dim": 14,
    "ffn_dim": 17,
    "num_layers": 2,
    "patch_size": [1, 2, 4],
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross_attn_norm": False},
        {"out_channels": None},
        {"num_layers": 0},
        {"image_dim": 13, "added_kv_proj_dim": 24},
        {"image_dim": 13, "added_kv_proj_dim": 24, "pos_embed_seq_len": 6},
    ],
    ids=str,
)
def test_names_and_shapes(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**ODD, **options})
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(tensor_shapes(model.config).items()) == list(state.items())


def test_options() -> None:
    assert set(inspect.signature(WanTransformer3DModel).parameters) == KEYS


@pytest.mark.parametrize("dim", [256, 7])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_frequencies_are_bit_for_bit_the_same(dim: int, dtype: torch.dtype) -> None:
    timesteps = torch.linspace(0, 1000, 301).to(dtype)
    theirs = get_timestep_embedding(timesteps, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_frequencies(timesteps, dim), theirs)
