"""Attention with an explicit softmax. Narrow dtypes are computed in float32, float64 stays float64."""

from collections.abc import Sequence

import torch


def attention_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(q k^T / sqrt(head_dim)) v`` [S_q, inner] and the log-sum-exp of the logits [heads, S_q]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_heads, k_heads, v_heads = (t.to(wide).unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    logits = q_heads @ k_heads.mT * q_heads.shape[-1] ** -0.5  # [heads, S_q, S_k]
    out = (logits.softmax(dim=-1) @ v_heads).transpose(0, 1).flatten(1).to(q.dtype)
    return out, logits.logsumexp(dim=-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int) -> torch.Tensor:
    return attention_lse(q, k, v, heads=heads)[0]


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of all ``parts`` together, from attention over each.

    Args:
        parts: one or more pairs of output [S_q, inner] and log-sum-exp [heads, S_q], of the same queries.

    Returns:
        Output in the dtype of the parts, log-sum-exp in theirs. The sum runs in float32 or wider.
    """
    logs = torch.stack([lse for _, lse in parts])  # [parts, heads, S_q]
    total = logs.logsumexp(dim=0)
    shares = (logs - total).exp().transpose(1, 2)[..., None]  # [parts, S_q, heads, 1]
    heads = logs.shape[1]
    out = sum(out.to(logs.dtype).unflatten(1, (heads, -1)) * share for (out, _), share in zip(parts, shares))
    assert isinstance(out, torch.Tensor)
    return out.flatten(1).to(parts[0][0].dtype), total
