"""The first product of Wan's feed-forward, with its GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dualparal.models.linear import Linear


def linear_gelu(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """``gelu(x weight^T + bias)`` with the tanh approximation, as diffusers' FeedForward has it for Wan.

    On a card in the product's own epilogue: no pass over [tokens, ffn_dim], and the sum is not rounded to x's dtype
    before the GELU. aten takes the tanh approximation there, and the exact GELU on the CPU (ATen/native/cuda/Blas.cpp,
    ATen/native/LinearAlgebra.cpp).

    Args:
        x: [tokens, in].
        linear: weight [out, in], bias [out]; where the product is made in 8 bits the GELU is a pass of its own.

    Returns:
        [tokens, out], like x.
    """
    linear = linear.restored(x.dtype)
    if x.device.type == "cpu" or linear.scale is not None:
        return F.gelu(linear(x), approximate="tanh")
    return torch._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)
