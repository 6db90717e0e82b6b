"""Files of light decoders with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from dualparal.models.wan.light_sizes import LightSizes

SMALL = LightSizes((8, 6, 4, 4), 16, 1)


def tensors_of(sizes: LightSizes = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under which a picture neither fades nor runs out of range."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in sizes.shapes.items():
        inputs = torch.Size(shape[1:]).numel() if len(shape) > 1 else 16
        found[name] = torch.randn(shape, generator=generator) * inputs**-0.5
    return found


def write_light(path: Path, sizes: LightSizes = SMALL, seed: int = 0, **changes: torch.Tensor | None) -> Path:
    """Writes a file with these weights, and a tensor of the encoder. ``changes``: tensors by name; None: left out."""
    tensors: dict[str, torch.Tensor | None] = {**tensors_of(sizes, seed), "encoder.0.weight": torch.zeros(1), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path
