"""Attention without a mask, over whatever keys the caller has laid side by side.

Softmax does not care about the order of keys, so a neighbour's keys may lie anywhere in the arena. "sdpa" is
torch.nn.functional.scaled_dot_product_attention, which is hard to beat on Hopper.
"""

import torch
import torch.nn.functional as F

from .. import backend as backends
from . import reference

__all__ = ["attention"]

BACKENDS = ("sdpa", "reference")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, backend: str = "auto") -> torch.Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v`` for every head.

    Args:
        q: [S_q, inner], float32, bfloat16 or float16; inner = heads * head_dim.
        k, v: [S_k, inner] of q's dtype, S_k of 1 or more. Rows of all three are contiguous and may lie apart.
        backend: "auto", "sdpa" or "reference" (needs memory for heads * S_q * S_k scores).

    Returns:
        [S_q, inner], contiguous.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or the backend is unknown.
    """
    if q.ndim != 2 or heads < 1 or q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(f"q is {list(q.shape)} with heads={heads}; expected [S_q, heads * head_dim]")
    if k.ndim != 2 or k.shape[0] == 0:
        raise ValueError(f"k is {list(k.shape)}; expected [S_k, {q.shape[1]}] with S_k of 1 or more")
    backends.check_dtype("q", q)
    backends.check("q", q, q.shape, q.dtype, q.device, row_stride=True)
    for name, tensor in (("k", k), ("v", v)):
        backends.check(name, tensor, (k.shape[0], q.shape[1]), q.dtype, q.device, row_stride=True)
    chosen = backends.choose("attention", q.device, backend, BACKENDS)
    if q.shape[0] == 0:
        return q.new_empty(q.shape)
    if chosen == "reference":
        return reference.attention(q, k, v, heads=heads)
    # [1, heads, S, head_dim], views
    q_heads, k_heads, v_heads = (t.unflatten(1, (heads, -1)).transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads)
    return out[0].transpose(0, 1).flatten(1).contiguous()
