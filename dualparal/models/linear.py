"""A linear of a layer in 16 or in 8 bits, and the way of its weight there: quantised once, while it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dualparal.config.eight_bit import LinearPolicy
from dualparal.kernels.linear_8bit import Rows8, linear_8bit, quantise_rows
from dualparal.models.base import ModelSpec

_SCALE = "_scale"  # a weight in 8 bits has its scales under its own name and this


class Linear(NamedTuple):
    """Weight [out, in], bias [out], and for a weight in 8 bits the scale of each output channel, float32 [out, 1]."""

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], *names: str) -> Linear:
        """The linear of one name, or that of several whose results lie side by side (a copy).

        Args:
            tensors: as ``placed`` makes them: "<name>.weight", "<name>.bias" and, in 8 bits, the scales.
        """
        weight = _joined([tensors[f"{name}.weight"] for name in names])
        bias = _joined([tensors[f"{name}.bias"] for name in names])
        scales = [tensors[f"{name}.weight{_SCALE}"] for name in names if f"{name}.weight{_SCALE}" in tensors]
        return cls(weight, bias, _joined(scales) if scales else None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        return linear_8bit(x, Rows8(self.weight, self.scale), self.bias)


def placed(
    spec: ModelSpec, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, policy: LinearPolicy
) -> dict[str, torch.Tensor]:
    """A tensor of a checkpoint as its slice takes it, by name; with its scales, if it is one in 8 bits.

    Quantised from the numbers of the checkpoint, not from those rounded to ``dtype``, so that Q, K and V can be joined
    afterwards and no second copy of a stage's weights is held.

    Args:
        tensor: on any device; [out, in] where the policy covers it.
        dtype: of the model.
        policy: the layers whose linears have 8 bits.
    """
    if not policy.covers(spec.linear_layer(name)):
        return {name: tensor.to(device, spec.tensor_dtype(name, dtype))}
    made = quantise_rows(tensor.to(device).contiguous())
    return {name: made.values, name + _SCALE: made.scale}


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors one below the other; a single one as it is."""
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dtype.itemsize > 1:
        return torch.cat(tensors)
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)  # fp8 does not join
