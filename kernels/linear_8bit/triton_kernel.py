"""quantise_rows and restore_rows in Triton: one thread block per row, which is read once and written once.

It stays in registers between its maximum and its rounding.
"""

import torch
import triton
import triton.language as tl

from .. import backend as backends
from ..attention_8bit.reference import FP8, LIMITS, SMALLEST
from ..offline import ARCHS, OfflineCase
from ..rows import load, store, tiles


@triton.jit
def quantise_rows_kernel(
    X, Y, SCALE,
    DIM: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, LIMIT: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Row program_id(0). X: [rows, DIM]; Y: the same, fp8; SCALE: [rows] float32."""
    row = tl.program_id(0).to(tl.int64)
    full: tl.constexpr = HIGH + LOW == DIM
    high = tl.arange(0, HIGH)
    a = load(X + row * DIM, high, DIM, True).to(tl.float32)
    largest, total = tl.max(tl.abs(a), 0), tl.sum(a, 0)
    if LOW > 0:
        low = HIGH + tl.arange(0, LOW)
        b = load(X + row * DIM, low, DIM, full).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(b), 0))
        total += tl.sum(b, 0)
    largest = tl.maximum(largest, SMALLEST)
    # Maxima lose a NaN; 0 * NaN and 0 * infinity are NaN. A sum of finite bfloat16 numbers may only overflow where
    # their squares would have long before.
    tl.store(SCALE + row, tl.math.div_rn(largest, LIMIT) + 0.0 * total)
    factor = tl.math.div_rn(LIMIT, largest)
    store(Y + row * DIM, high, a * factor, DIM, True)
    if LOW > 0:
        store(Y + row * DIM, low, b * factor, DIM, full)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op that the package describes. x is checked already.

    Raises:
        ValueError: the rows are too long for this backend.
    """
    rows, dim = x.shape
    high, low, num_warps = tiles(dim, x.element_size())
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        with backends.current(x.device):
            quantise_rows_kernel[(rows,)](
                *(x, values, scale),
                **dict(DIM=dim, HIGH=high, LOW=low, LIMIT=LIMITS[FP8], SMALLEST=SMALLEST),
                num_warps=num_warps,
                enable_fp_fusion=False,  # a product is rounded by itself, as in PyTorch
            )
    return values, scale


@triton.jit
def restore_rows_kernel(X, SCALE, Y, DIM: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Row program_id(0). X: [rows, DIM] fp8; SCALE: [rows] float32; Y: [rows, DIM]."""
    row = tl.program_id(0).to(tl.int64)
    full: tl.constexpr = HIGH + LOW == DIM
    high = tl.arange(0, HIGH)
    scale = tl.load(SCALE + row)
    store(Y + row * DIM, high, load(X + row * DIM, high, DIM, True).to(tl.float32) * scale, DIM, True)
    if LOW > 0:
        low = HIGH + tl.arange(0, LOW)
        store(Y + row * DIM, low, load(X + row * DIM, low, DIM, full).to(tl.float32) * scale, DIM, full)


def restore_rows(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """The op that the package describes; its arguments are checked already. Raises ValueError for rows too long."""
    rows, dim = values.shape
    high, low, num_warps = tiles(dim, out.element_size())
    if rows:
        with backends.current(out.device):
            restore_rows_kernel[(rows,)](values, scale, out, DIM=dim, HIGH=high, LOW=low, num_warps=num_warps)


FP8_ARCHS = tuple(arch for arch in ARCHS if arch >= 89)


def _quantise(dim: int) -> OfflineCase:
    high, low, num_warps = tiles(dim, 2)
    signature = {"X": "*bf16", "Y": "*fp8e4nv", "SCALE": "*fp32"}
    constexprs = dict(DIM=dim, HIGH=high, LOW=low, LIMIT=LIMITS[FP8], SMALLEST=SMALLEST)
    return OfflineCase(
        *(f"quantise: {dim}", quantise_rows_kernel, signature, constexprs, num_warps), fp_fusion=False, archs=FP8_ARCHS
    )


def _restore(dim: int) -> OfflineCase:
    high, low, num_warps = tiles(dim, 2)
    signature = {"X": "*fp8e4nv", "SCALE": "*fp32", "Y": "*bf16"}
    constexprs = dict(DIM=dim, HIGH=high, LOW=low)
    return OfflineCase(f"restore: {dim}", restore_rows_kernel, signature, constexprs, num_warps, archs=FP8_ARCHS)


# Inputs and weights of Wan's linears (hidden, ffn), in bfloat16; features have the widths of hidden states.
OFFLINE = [*(_quantise(dim) for dim in (1536, 5120, 8960, 13824)), *(_restore(dim) for dim in (1536, 5120))]
