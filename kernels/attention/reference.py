"""Attention with an explicit softmax. Narrow dtypes are computed in float32, float64 stays float64."""

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    q_heads, k_heads, v_heads = (t.to(wide).unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    scores = q_heads @ k_heads.mT * q_heads.shape[-1] ** -0.5  # [heads, S_q, S_k]
    return (scores.softmax(dim=-1) @ v_heads).transpose(0, 1).flatten(1).to(q.dtype)
