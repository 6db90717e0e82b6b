"""The meeting of a block's two guidance branches: one pass in place of three.

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
        backend: "auto", "cpp", "cuda", "triton" or "torch".

    Returns:
        A tensor like cond.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, scale is not finite, or the backend
            cannot run.
    """
    if backends.recorded(cond, uncond):
        return torch.ops.dualparal.combine_guidance(cond, uncond, scale, backend)
    return _combine_guidance(cond, uncond, scale, backend)


def _combine_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
    _check_once(cond, uncond)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: expected a finite number")
    chosen = backends.choose("combine_guidance", cond.device, backend)
    if chosen == "torch":
        return reference.combine_guidance(cond, uncond, scale)
    out = torch.empty_like(cond)
    if chosen == "triton":
        from . import triton_kernel

        triton_kernel.launch(cond, uncond, out, scale)
        return out
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


def _check(cond: torch.Tensor, uncond: torch.Tensor) -> None:
    backends.check_dtype("cond", cond)
    backends.check("cond", cond, cond.shape, cond.dtype, cond.device)
    backends.check("uncond", uncond, cond.shape, cond.dtype, cond.device)


_check_once = backends.once_per_layout(_check)


# What torch.compile and torch.export record.


@torch.library.custom_op("dualparal::combine_guidance", mutates_args=())
def _combine_guidance_op(cond: torch.Tensor, uncond: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
    return _combine_guidance(cond, uncond, scale, backend)


@_combine_guidance_op.register_fake
def _(cond: torch.Tensor, uncond: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
    _check(cond, uncond)
    return torch.empty_like(cond)
