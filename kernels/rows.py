"""The common part of the Triton passes: a row of any length as one or two tiles, and loads that are float32 at once.

Triton's tiles are powers of two and the rows of these models are not. One tile of 8192 for 5120 elements would
leave 37 % of the threads idle. A row is therefore read as the largest power of two that fits, and a smaller one
for the rest: 1536 = 1024 + 512, 3072 = 2048 + 1024, 5120 = 4096 + 1024, all without a mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LONGEST = 16384  # elements of a row; beyond it the registers of a thread block would not hold one


class Tiles(NamedTuple):
    """The split of one row: ``high`` elements, then up to ``low`` more, by ``num_warps`` warps."""

    high: int
    low: int  # 0: there is no rest
    num_warps: int


def tiles(dim: int, itemsize: int) -> Tiles:
    """The tiles of a row of ``dim`` elements of ``itemsize`` bytes.

    As many warps as let every thread move 16 bytes at a time in the smaller tile too, but at most 8, and no fewer
    than leave a thread 32 elements of the larger one.

    Raises:
        ValueError: the row is longer than LONGEST.
    """
    if dim > LONGEST:
        raise ValueError(f"a row of {dim} elements: the Triton kernels take up to {LONGEST}; use backend='torch'")
    high = 1 << (dim.bit_length() - 1)
    low = triton.next_power_of_2(dim - high) if dim > high else 0
    wide = (low or high) * itemsize // (32 * 16)
    return Tiles(high, low, min(max(min(wide, 8), high // 1024, 1), 16))


@triton.jit
def load(P, at, DIM: tl.constexpr, FULL: tl.constexpr):
    """Elements ``at`` of a row at P, as they are; zeros beyond DIM, which a FULL tile does not reach."""
    if FULL:
        x = tl.load(P + at)
    else:
        x = tl.load(P + at, mask=at < DIM, other=0.0)
    return x


@triton.jit
def store(P, at, x, DIM: tl.constexpr, FULL: tl.constexpr):
    """Writes x, rounded to P's dtype, to elements ``at`` of a row at P; nothing beyond DIM."""
    x = x.to(P.dtype.element_ty)
    if FULL:
        tl.store(P + at, x)
    else:
        tl.store(P + at, x, mask=at < DIM)


@triton.jit
def inverse_root(total, eps, DIM: tl.constexpr):
    """``1 / sqrt(total / DIM + eps)``, each step rounded as IEEE says; once per row, so it costs nothing."""
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(total, DIM * 1.0) + eps))
