"""fp8 linear layers in plain PyTorch. Everything is computed in float32 and rounded where the package says so."""

import torch

from ..attention_8bit.reference import FP8, quantise


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> float8_e4m3fn of the same shape, float32 [rows, 1]."""
    wide = x.float()
    return quantise(wide, wide.abs().amax(1, keepdim=True), FP8)


def linear_8bit(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The product of what the scales bring back, as ``torch._scaled_mm`` has it on a CPU, with one rounding at the end.

    x: [S, in] and [S, 1]; weight: [out, in] and [out, 1]; bias: [out]. Returns [S, out] of bias's dtype.
    """
    product = (x.float() * x_scale) @ (weight.float() * weight_scale).T
    return (product + bias.float()).to(bias.dtype)
