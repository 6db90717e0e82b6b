"""The sinusoids of a timestep, as Wan's time embedder takes them."""

from __future__ import annotations

import math

import torch


def timestep_frequencies(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosines, then sines of timesteps [N]: [N, dim] in float32.

    Bit for bit diffusers' ``get_timestep_embedding(timesteps, dim, flip_sin_to_cos=True, downscale_freq_shift=0)``,
    whose module takes seconds to import.
    """
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)
    found = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return torch.nn.functional.pad(found, (0, 1)) if dim % 2 else found
