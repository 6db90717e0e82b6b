"""The end of one sub-layer and the start of the next, in one pass over memory.

Gate, residual, LayerNorm and modulation of WanTransformerBlock.forward (diffusers,
models/transformers/transformer_wan.py), which runs them as up to eight separate passes.
"""

from typing import NamedTuple

import torch

from .. import backend as backends
from . import reference

__all__ = ["residual", "residual_norm"]


class _Inputs(NamedTuple):
    """The tensors of one call, so that their list stands once behind the public functions and the ops' schemas."""

    x: torch.Tensor
    y: torch.Tensor | None
    gate: torch.Tensor | None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x_new = x + y * gate`` and ``h = LayerNorm(x_new) * weight + bias``, computed in float32.

    x_new is rounded to x's dtype before the norm. For a modulated norm, weight is ``1 + scale`` and bias is
    ``shift``; for the affine norm2 they are the module's own.

    Args:
        x, y: [S, D], float32, bfloat16 or float16, contiguous; without y there is nothing to add.
        gate, weight, bias: [D] float32, or None for 1, 1 and 0; gate needs y.
        backend: "auto", "cpp", "cuda", "triton" or "torch".

    Returns:
        (x_new, h), both like x; x_new is x itself when there is no y.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or the backend cannot run.
    """
    if backends.recorded(x, y, gate, weight, bias):
        if y is not None:
            return torch.ops.dualparal.residual_norm(x, y, gate, weight, bias, eps, backend)
        _check_gate(y, gate)
        return x, torch.ops.dualparal.norm(x, weight, bias, eps, backend)
    return _residual_norm(_Inputs(x, y, gate, weight, bias), eps, backend)


def residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """``x + y * gate``, computed in float32: residual_norm without the norm, for the end of a layer.

    Args, errors: as in residual_norm. Returns a tensor like x.
    """
    if backends.recorded(x, y, gate):
        return torch.ops.dualparal.residual(x, y, gate, backend)
    return _residual(x, y, gate, backend)


def _residual_norm(inputs: _Inputs, eps: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check_once(inputs)
    x, y = inputs.x, inputs.y
    chosen = backends.choose("residual_norm", x.device, backend)
    if chosen == "torch":
        return reference.residual_norm(*inputs, eps=eps)
    x_new = x if y is None else torch.empty_like(x)
    h = torch.empty_like(x)
    _launch(chosen, inputs, None if y is None else x_new, h, eps)
    return x_new, h


def _residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, backend: str) -> torch.Tensor:
    inputs = _Inputs(x, y, gate)
    _check_once(inputs)
    chosen = backends.choose("residual_norm", x.device, backend)
    if chosen == "torch":
        return reference.residual(x, y, gate)
    x_new = torch.empty_like(x)
    _launch(chosen, inputs, x_new, None, eps=0.0)
    return x_new


# What torch.compile and torch.export record. An op may not return its own argument, so the norm without an
# update is an op of its own.


@torch.library.custom_op("dualparal::residual_norm", mutates_args=())
def _residual_norm_op(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _residual_norm(_Inputs(x, y, gate, weight, bias), eps, backend)


@_residual_norm_op.register_fake
def _(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(_Inputs(x, y, gate, weight, bias))
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("dualparal::norm", mutates_args=())
def _norm_op(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, backend: str
) -> torch.Tensor:
    return _residual_norm(_Inputs(x, None, None, weight, bias), eps, backend)[1]


@_norm_op.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, backend: str
) -> torch.Tensor:
    _check(_Inputs(x, None, None, weight, bias))
    return torch.empty_like(x)


@torch.library.custom_op("dualparal::residual", mutates_args=())
def _residual_op(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, backend: str) -> torch.Tensor:
    return _residual(x, y, gate, backend)


@_residual_op.register_fake
def _(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, backend: str) -> torch.Tensor:
    _check(_Inputs(x, y, gate))
    return torch.empty_like(x)


def _check_gate(y: torch.Tensor | None, gate: torch.Tensor | None) -> None:
    if y is None and gate is not None:
        raise ValueError("gate is given without y: there is nothing to gate")


def _check(inputs: _Inputs) -> None:
    """Raises ValueError unless everything fits ``x``."""
    x, y, gate, weight, bias = inputs
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x is {list(x.shape)}; expected [S, D] with D of 1 or more and no batch dimension")
    backends.check_dtype("x", x)
    backends.check("x", x, x.shape, x.dtype, x.device)
    if y is not None:
        backends.check("y", y, x.shape, x.dtype, x.device)
    _check_gate(y, gate)
    for name, vector in (("gate", gate), ("weight", weight), ("bias", bias)):
        if vector is not None:
            backends.check(name, vector, x.shape[1:], torch.float32, x.device)


_check_once = backends.once_per_layout(_check)


def _launch(backend: str, inputs: _Inputs, x_new: torch.Tensor | None, h: torch.Tensor | None, eps: float) -> None:
    if backend == "triton":
        from . import triton_kernel

        return triton_kernel.launch(*inputs, x_new, h, eps)
    x, y, gate, weight, bias = inputs
    rows, dim = x.shape
    backends._C.residual_norm(
        x=backends.pointer(x),
        y=backends.pointer(y),
        gate=backends.pointer(gate),
        weight=backends.pointer(weight),
        bias=backends.pointer(bias),
        x_new=backends.pointer(x_new),
        h=backends.pointer(h),
        rows=rows,
        dim=dim,
        eps=eps,
        dtype=backends.DTYPES[x.dtype],
        **backends.where(x.device),
    )
