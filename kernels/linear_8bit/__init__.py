"""Rows in fp8 (e4m3) with one scale each, and linear layers of them: one per token, one per output channel of a weight.

``y = (x_8 @ w_8.T) * x_scale * w_scale + bias``, the product in the tensor cores' fp8, everything else in float32, the
result in bfloat16: on a GPU ``torch._scaled_mm``. Weights are quantised once, when they are loaded; inputs in a pass of
their own, one read and one write of half the size. Scales by row make a row's result a function of that row alone,
however tokens are cut into windows. e4m3 has three bits of mantissa, so a product of two has a relative error of some
3.7 % per term, independent of the others; docs/linear-8bit.md has what is left of it in sums and in whole videos.

Sums have float32 on a card, too, as the definition has them (``use_fast_accum=False``). The fast mode of Hopper's
tensor cores keeps about 14 bits of a running sum and cuts off the rest of every term, so that its error grows with
their number. Torch takes either value for scales by row: ``ScaledBlas.cpp`` and ``RowwiseScaledMM.cu``.
"""

import functools
from typing import NamedTuple

import torch

from .. import backend as backends
from . import reference

__all__ = ["DIVISOR", "Rows8", "absent", "linear_8bit", "quantise_rows", "restore_rows", "rows_absent"]

BACKENDS = ("triton", "torch")
_PIECE = 1 << 20  # numbers that the definition restores at once
DIVISOR = 16  # of both sides of a weight: what torch._scaled_mm takes


class Rows8(NamedTuple):
    """A matrix in 8 bits: values [rows, columns] float8_e4m3fn, and scale [rows, 1] float32 that brings it back."""

    values: torch.Tensor
    scale: torch.Tensor


def absent(device: torch.device) -> str:
    """Why ``device`` cannot run fp8 linears; empty when it can. On a GPU a small one is tried, once per device."""
    reason = rows_absent(device)
    return reason if reason or device.type != "cuda" else _refused(device)


def rows_absent(device: torch.device) -> str:
    """Why ``device`` cannot turn rows into fp8 and back; empty when it can.

    Triton converts to e4m3 from compute capability 8.9 on; the definition runs everywhere, but nobody wants it on a GPU
    by accident.
    """
    if device.type != "cuda":
        return ""  # the definition
    if torch.version.hip is not None:
        return "it has not been tried with ROCm"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import ({error})"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"fp8 needs compute capability 8.9, see {device}"
    return ""


@functools.cache
def _refused(device: torch.device) -> str:
    """Why torch does not make the product on ``device``, from trying; empty when it does.

    Scales by row are refused by some releases on some cards: CUBLAS_STATUS_NOT_SUPPORTED with torch 2.10 on compute
    capability 12.0 (pytorch issue 192707).
    """
    x = torch.ones(2 * DIVISOR, 2 * DIVISOR, dtype=torch.bfloat16, device=device)
    try:
        made = quantise_rows(x)
        right = bool((_product(made, made, x[0]) == 2 * DIVISOR + 1).all())
    except Exception as error:  # whatever it is: it would come again with the first unit
        said = str(error).partition("\n")[0]
        return f"torch {torch.__version__} does not make fp8 products with scales by row on {device} ({said})"
    return "" if right else f"torch {torch.__version__} makes wrong fp8 products with scales by row on {device}"


def quantise_rows(x: torch.Tensor, *, backend: str = "auto") -> Rows8:
    """Each row divided by ``absmax / 448`` and rounded to e4m3, to nearest even; computed in float32.

    A NaN or an infinity makes its row's scale NaN. Used for weights, whose rows are output channels, and for inputs.

    Args:
        x: [rows, columns], float32, bfloat16 or float16, contiguous.
        backend: "auto" (Triton on a GPU, the definition on a CPU), "triton" or "torch".

    Raises:
        ValueError: a shape, dtype or layout is not as above, or the backend cannot run.
    """
    run = torch.ops.dualparal.quantise_rows if backends.recorded(x) else _quantise_rows
    return Rows8(*run(x, backend))


def restore_rows(rows: Rows8, out: torch.Tensor, *, backend: str = "auto") -> None:
    """Writes ``values * scale`` to ``out``, computed in float32 and rounded once to its dtype.

    Args:
        rows: as ``quantise_rows`` makes them, contiguous.
        out: [rows, columns], float32, bfloat16 or float16, contiguous.
        backend: "auto" (Triton on a GPU, the definition on a CPU), "triton" or "torch".

    Raises:
        ValueError: a shape, dtype or layout is not as above, or the backend cannot run.
    """
    run = torch.ops.dualparal.restore_rows if backends.recorded(rows.values) else _restore_rows
    run(*rows, out, backend)


def linear_8bit(x: torch.Tensor, weight: Rows8, bias: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """``F.linear(x, weight, bias)`` with both factors in 8 bits.

    Args:
        x: [S, in] bfloat16, contiguous; quantised here.
        weight: of [out, in], as ``quantise_rows`` makes it; both sides multiples of ``DIVISOR``.
        bias: [out] bfloat16.
        backend: "auto" (on a GPU Triton and torch._scaled_mm, on a CPU the definition) or "torch" (the definition).

    Returns:
        [S, out] bfloat16.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or the backend cannot run.
    """
    out, width = weight.values.shape
    if x.ndim != 2 or out % DIVISOR or width % DIVISOR:
        raise ValueError(
            f"x is {list(x.shape)} and the weight {[out, width]}; expected [S, in], and multiples of {DIVISOR}"
        )
    backends.check("x", x, (x.shape[0], width), torch.bfloat16, x.device)
    backends.check("weight", weight.values, (out, width), reference.FP8, x.device)
    backends.check("scale", weight.scale, (out, 1), torch.float32, x.device)
    backends.check("bias", bias, (out,), torch.bfloat16, x.device)
    made = quantise_rows(x, backend=backend)
    if backend == "torch" or x.device.type == "cpu" or x.shape[0] == 0:
        return reference.linear_8bit(*made, *weight, bias)
    return _product(made, weight, bias)


def _product(x: Rows8, weight: Rows8, bias: torch.Tensor) -> torch.Tensor:
    """torch's own product, [S, out] bfloat16."""
    return torch._scaled_mm(
        x.values,
        weight.values.T,
        scale_a=x.scale,
        scale_b=weight.scale.T,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )


def _quantise_rows(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x is {list(x.shape)}; expected [rows, columns] with a column or more")
    backends.check_dtype("x", x)
    backends.check("x", x, x.shape, x.dtype, x.device)
    if backends.choose("quantise_rows", x.device, backend, BACKENDS) == "torch":
        return reference.quantise_rows(x)
    from . import triton_kernel

    return triton_kernel.quantise_rows(x)


_quantise_rows_op = torch.library.custom_op("dualparal::quantise_rows", _quantise_rows, mutates_args=())


@_quantise_rows_op.register_fake
def _(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=reference.FP8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _restore_rows(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, backend: str) -> None:
    backends.check_dtype("out", out)
    backends.check("out", out, values.shape, out.dtype, values.device)
    backends.check("values", values, out.shape, reference.FP8, out.device)
    backends.check("scale", scale, (out.shape[0], 1), torch.float32, out.device)
    if backends.choose("restore_rows", out.device, backend, BACKENDS) == "torch":
        step = max(1, _PIECE // max(1, out.shape[1]))
        for part in range(0, len(out), step):  # float32 copies of a whole matrix would be large
            piece = slice(part, part + step)
            out[piece].copy_(values[piece].float() * scale[piece])
        return
    from . import triton_kernel

    triton_kernel.restore_rows(values, scale, out)


torch.library.custom_op("dualparal::restore_rows", _restore_rows, mutates_args=("out",))
