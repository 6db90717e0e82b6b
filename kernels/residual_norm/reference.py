"""Residual and LayerNorm in plain PyTorch, as WanTransformerBlock.forward of diffusers writes them.

Narrow dtypes are computed in float32; float64 stays float64, which is the truth that tests compare with.
"""

import torch
import torch.nn.functional as F


def residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    update = y.to(wide) if gate is None else y.to(wide) * gate  # [S, D]
    return (x.to(wide) + update).to(x.dtype)


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_new = x if y is None else residual(x, y, gate)
    # The norm sees x_new rounded to x's dtype, as the next layer will.
    h = F.layer_norm(x_new.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=eps)
    if weight is not None:
        h = h * weight
    if bias is not None:
        h = h + bias
    return x_new, h.to(x.dtype)
