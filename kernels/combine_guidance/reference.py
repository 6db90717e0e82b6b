"""Classifier-free guidance in plain PyTorch. Narrow dtypes are computed in float32, float64 stays float64."""

import torch


def combine_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    wide = torch.promote_types(cond.dtype, torch.float32)
    start = uncond.to(wide)
    return (start + scale * (cond.to(wide) - start)).to(cond.dtype)
