"""The first product of Wan's feed-forward, with its GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``gelu(x weight^T + bias)`` with the tanh approximation, as diffusers' FeedForward has it for Wan.

    On a card in the product's own epilogue: no pass over [tokens, ffn_dim], and the sum is not rounded to x's dtype
    before the GELU. aten takes the tanh approximation there, and the exact GELU on the CPU (ATen/native/cuda/Blas.cpp,
    ATen/native/LinearAlgebra.cpp).

    Args:
        x: [tokens, in].
        weight: [out, in].
        bias: [out].

    Returns:
        [tokens, out], like x.
    """
    if x.device.type == "cpu":
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
