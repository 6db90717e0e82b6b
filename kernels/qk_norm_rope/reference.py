"""RMSNorm over all heads and interleaved rotation in plain PyTorch, as in WanAttnProcessor of diffusers.

One difference, towards the truth: nothing is rounded between norm and rotation. Narrow dtypes are computed in
float32; float64 stays float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Lend(NamedTuple):
    """Rows of k and v that go to one slot of a store as well: as many as a slot holds, from row ``first`` on."""

    keys: torch.Tensor  # [slots, tokens, inner]
    values: torch.Tensor
    slot: torch.Tensor  # int64 [1], beside the keys: a captured graph can be told another slot
    first: int

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotates the pairs (2i, 2i+1) of every head. x: [S, inner]; cos, sin: [S, head_dim // 2]."""
    a, b = x.unflatten(1, (heads, -1, 2)).unbind(-1)  # [S, heads, head_dim // 2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(1)


def qk_norm_rope(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    *,
    heads: int,
    eps: float,
    lends: Sequence[Lend] = (),
) -> torch.Tensor:
    q, k, v = qkv.chunk(3, dim=1)  # [S, inner] each
    wide = torch.promote_types(qkv.dtype, torch.float32)
    k_out.copy_(rotate(rms_norm(k.to(wide), norm_k, eps), cos, sin, heads))
    v_out.copy_(v)
    for lend in lends:
        for buffer, made in ((lend.keys, k_out), (lend.values, v_out)):
            buffer.index_copy_(0, lend.slot, made[None, lend.first : lend.first + lend.tokens])
    return rotate(rms_norm(q.to(wide), norm_q, eps), cos, sin, heads).to(qkv.dtype)
