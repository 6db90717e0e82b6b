"""Where the two guidance branches of a block meet: one pass in place of three.

The same arithmetic as WanPipeline.__call__ of diffusers (pipelines/wan/pipeline_wan.py), in float32.
"""

import math

import torch

from .. import backend as backends
from . import reference

__all__ = ["combine_guidance"]


def combine_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float, *, backend: str = "auto") -> torch.Tensor:
    """``uncond + scale * (cond - uncond)``, element by element, computed in float32.

    Args:
        cond, uncond: any one shape, float32, bfloat16 or float16, contiguous.
        scale: finite.
        backend: "auto", "cpp", "cuda" or "torch".

    Returns:
        A tensor like cond.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, scale is not finite, or the backend
            cannot run.
    """
    backends.check_dtype("cond", cond)
    backends.check("cond", cond, cond.shape, cond.dtype, cond.device)
    backends.check("uncond", uncond, cond.shape, cond.dtype, cond.device)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: expected a finite number")
    if backends.choose("combine_guidance", cond.device, backend) == "torch":
        return reference.combine_guidance(cond, uncond, scale)
    out = torch.empty_like(cond)
    backends._C.combine_guidance(
        cond=backends.pointer(cond),
        uncond=backends.pointer(uncond),
        out=backends.pointer(out),
        size=cond.numel(),
        scale=scale,
        dtype=backends.DTYPES[cond.dtype],
        **backends.where(cond.device),
    )
    return out
