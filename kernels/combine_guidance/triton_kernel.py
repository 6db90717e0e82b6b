"""combine_guidance in Triton: each element of cond and uncond is read once, each of the result written once."""

import torch
import triton
import triton.language as tl

from .. import backend as backends
from ..offline import OfflineCase

BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def combined(cond, uncond, scale):
    """uncond + scale * (cond - uncond), in float32."""
    start = uncond.to(tl.float32)
    return start + scale * (cond.to(tl.float32) - start)


# Not specialised: it changes with the block, and full thread blocks need no mask.
@triton.jit(do_not_specialize=["size"])
def combine_guidance_kernel(COND, UNCOND, OUT, size, scale, BLOCK: tl.constexpr):
    """Elements program_id(0) * BLOCK and on, of ``size``."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    # Only the last thread block has a mask: a mask whose length is no multiple of 16 takes the loads apart.
    if first + BLOCK <= size:
        out = combined(tl.load(COND + at), tl.load(UNCOND + at), scale)
        tl.store(OUT + at, out.to(OUT.dtype.element_ty))
    else:
        inside = at < size
        out = combined(tl.load(COND + at, mask=inside), tl.load(UNCOND + at, mask=inside), scale)
        tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=inside)


def launch(cond: torch.Tensor, uncond: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """Fills out. Three contiguous tensors of one shape and dtype, already checked."""
    size = cond.numel()
    if size == 0:
        return
    with backends.current(cond.device):
        combine_guidance_kernel[(triton.cdiv(size, BLOCK),)](
            *(cond, uncond, out, size, scale),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # a product is rounded before it is added, as in PyTorch
        )


OFFLINE = [
    OfflineCase(
        "any shape, float32",  # latents
        combine_guidance_kernel,
        dict(COND="*fp32", UNCOND="*fp32", OUT="*fp32", size="i32", scale="fp32"),
        dict(BLOCK=BLOCK),
        NUM_WARPS,
        fp_fusion=False,
    )
]
