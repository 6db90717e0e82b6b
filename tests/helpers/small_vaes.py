"""Small causal VAEs of Wan's kinds with random weights, and latents for them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

MEAN = torch.linspace(-1.0, 1.5, 16).tolist()
STD = torch.linspace(1.1, 3.3, 16).tolist()
CASES = {
    "wan2.1": {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "wan2.1-shallow": {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "wan2.2-residual": {
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}


def make_vae(case: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """A VAE of ``CASES`` with random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=4, latents_mean=MEAN, latents_std=STD, **CASES[case])
    return (vae if dtype == torch.float32 else vae.to(dtype)).eval()


def make_latents(frames: int, *, seed: int = 0, height: int = 3, width: int = 5) -> torch.Tensor:
    """Random latents [1, 16, frames, height, width]."""
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(seed))
