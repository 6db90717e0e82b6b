"""A linear of a layer in 16 or in 8 bits, and the way of its weight there: quantised once, while it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dualparal.config.eight_bit import LinearPolicy
from dualparal.kernels.linear_8bit import Rows8, linear_8bit, quantise_rows, restore_rows, rows_absent
from dualparal.models.base import ModelSpec

_SCALE = "_scale"  # a weight whose products are made in 8 bits has its scales under its own name and this
_KEPT_SCALE = "_kept_scale"  # the same of one that is only kept in 8 bits
_FP8 = torch.float8_e4m3fn
_PIECE = 1 << 22  # elements that are changed at once: 16 MiB in float32


class Linear(NamedTuple):
    """A linear, in 16 or in 8 bits.

    Attributes:
        weight: [out, in].
        bias: [out].
        scale: for a weight in 8 bits, of each output channel, float32 [out, 1].
        restore: the backend that makes the weight's numbers again before each product, where it is kept in 8 bits and
            products are not made so; otherwise empty.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor | None = None
    restore: str = ""

    @classmethod
    def of(cls, tensors: MutableMapping[str, torch.Tensor], *names: str) -> Linear:
        """The linear of one name, or that of several whose results lie side by side (a copy).

        Args:
            tensors: as ``placed`` makes them: "<name>.weight", "<name>.bias" and, in 8 bits, the scales. Weights are
                taken out, so that only those of one layer are there twice.
        """
        weights = [tensors.pop(f"{name}.weight") for name in names]
        bias = _joined([tensors[f"{name}.bias"] for name in names])
        for suffix, restore in ((_SCALE, ""), (_KEPT_SCALE, _backend(bias.device))):
            scales = [tensors[key] for name in names if (key := f"{name}.weight{suffix}") in tensors]
            if len(scales) == len(names):
                return cls(_joined(weights), bias, _joined(scales), restore)
        plain = [  # where a file has only some of them in 8 bits
            cls(weight, bias, tensors.get(f"{name}.weight{_KEPT_SCALE}"), _backend(bias.device)).restored(bias.dtype)
            for name, weight in zip(names, weights)
        ]
        return cls(_joined([linear.weight for linear in plain]), bias)

    def restored(self, dtype: torch.dtype) -> Linear:
        """The linear as its product is made: a weight that is only kept in 8 bits becomes one in ``dtype``."""
        if self.scale is None or not self.restore:
            return self
        weight = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        restore_rows(Rows8(self.weight, self.scale), weight, backend=self.restore)
        return Linear(weight, self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        weight, bias, scale, _ = self.restored(x.dtype)
        return F.linear(x, weight, bias) if scale is None else linear_8bit(x, Rows8(weight, scale), bias)


def placed(
    spec: ModelSpec,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    policy: LinearPolicy,
    scale: torch.Tensor | None = None,
    change: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """A tensor of a checkpoint as its slice takes it, by name; with its scales, if it is one in 8 bits.

    Quantised from the numbers of the checkpoint, not from those rounded to ``dtype``, so that Q, K and V can be joined
    afterwards and no second copy of a stage's weights is held. A linear's weight that the checkpoint has in 8 bits
    keeps them; one that is changed is quantised anew, row by row. Other tensors in 8 bits become numbers of ``dtype``.

    Args:
        tensor: on any device; [out, in] where the policy covers it.
        dtype: of the model.
        policy: the layers whose linears have 8 bits.
        scale: of a tensor in fp8, one number or one per row; None: it was only cast.
        change: (rows of the tensor, which they are) -> others, in float32; a large tensor goes through it in pieces.
    """
    layer, tensor = spec.linear_layer(name), tensor.to(device)
    covered, fp8 = policy.covers(layer), tensor.dtype == _FP8
    eight = covered or (fp8 and layer is not None)
    suffix = _SCALE if covered else _KEPT_SCALE
    if fp8:
        scale = torch.ones(1, device=device) if scale is None else scale.to(device, torch.float32).flatten()
        if eight and change is None:
            return {name: tensor, name + suffix: scale.expand(len(tensor))[:, None].contiguous()}
    elif change is None and not eight:
        return {name: tensor.to(spec.tensor_dtype(name, dtype))}
    made = torch.empty(tensor.shape, dtype=_FP8 if eight else spec.tensor_dtype(name, dtype), device=device)
    scales = torch.empty(len(tensor) if eight else 0, 1, device=device)
    options = {} if covered else {"backend": _backend(device)}
    for rows in _pieces(tensor):
        piece = tensor[rows]
        if scale is not None and fp8:
            piece = piece.float() * (scale if len(scale) == 1 else scale[rows].view(-1, *[1] * (tensor.ndim - 1)))
        if change is not None:
            piece = change(piece, rows)
        if eight:
            made[rows], scales[rows] = quantise_rows(piece.contiguous(), **options)
        else:
            made[rows] = piece
    return {name: made, name + suffix: scales} if eight else {name: made}


def _pieces(tensor: torch.Tensor) -> Iterator[slice]:
    """The rows of a tensor in pieces, so that a large matrix is never there as a whole in float32."""
    count = max(1, _PIECE // max(1, tensor[0].numel()))
    for first in range(0, len(tensor), count):
        yield slice(first, min(first + count, len(tensor)))


def _backend(device: torch.device) -> str:
    """The backend of conversions: the definition where Triton makes no fp8, as on cards older than 8.9."""
    return "torch" if rows_absent(device) else "auto"


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors one below the other; a single one as it is."""
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dtype.itemsize > 1:
        return torch.cat(tensors)
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)  # fp8 does not join
