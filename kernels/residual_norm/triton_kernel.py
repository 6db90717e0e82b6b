"""residual_norm in Triton: one thread block per row, which stays in registers between its passes.

Memory: x and y are read once, x_new and h written once. The vectors come from the caches.
"""

import torch
import triton
import triton.language as tl

from .. import backend as backends
from ..offline import OfflineCase
from ..rows import inverse_root, load, store, tiles


@triton.jit
def updated(X, Y, GATE, X_NEW, start, at, DIM: tl.constexpr, FULL: tl.constexpr):
    """x + y * gate as it is stored in X_NEW, as float32: the norm starts from the rounded value."""
    x = load(X + start, at, DIM, FULL).to(tl.float32)
    if Y is not None:
        y = load(Y + start, at, DIM, FULL).to(tl.float32)
        if GATE is not None:
            y = y * load(GATE, at, DIM, FULL)
        x = x + y
        store(X_NEW + start, at, x, DIM, FULL)
        x = x.to(X_NEW.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def centred(x, mean, at, DIM: tl.constexpr, FULL: tl.constexpr):
    """x - mean, and zero beyond the row."""
    d = x - mean
    if not FULL:
        d = tl.where(at < DIM, d, 0.0)
    return d


@triton.jit
def finish(H, WEIGHT, BIAS, start, at, d, factor, DIM: tl.constexpr, FULL: tl.constexpr):
    """Writes d * factor * weight + bias."""
    h = d * factor
    if WEIGHT is not None:
        h = h * load(WEIGHT, at, DIM, FULL)
    if BIAS is not None:
        h = h + load(BIAS, at, DIM, FULL)
    store(H + start, at, h, DIM, FULL)


@triton.jit
def residual_norm_kernel(
    X, Y, GATE, WEIGHT, BIAS, X_NEW, H, eps, DIM: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr
):
    """Row program_id(0). X, Y, X_NEW, H: [rows, DIM]; GATE, WEIGHT, BIAS: [DIM] float32.

    Y, GATE, WEIGHT, BIAS may be None; X_NEW is None with Y; H is None when there is no norm.
    """
    start = tl.program_id(0).to(tl.int64) * DIM
    full: tl.constexpr = HIGH + LOW == DIM
    high = tl.arange(0, HIGH)
    a = updated(X, Y, GATE, X_NEW, start, high, DIM, True)
    if LOW > 0:
        low = HIGH + tl.arange(0, LOW)
        b = updated(X, Y, GATE, X_NEW, start, low, DIM, full)
    if H is not None:
        total = tl.sum(a, 0)
        if LOW > 0:
            total += tl.sum(b, 0)
        mean = tl.math.div_rn(total, DIM * 1.0)
        a = centred(a, mean, high, DIM, True)
        squares = tl.sum(a * a, 0)
        if LOW > 0:
            b = centred(b, mean, low, DIM, full)
            squares += tl.sum(b * b, 0)
        factor = inverse_root(squares, eps, DIM)
        finish(H, WEIGHT, BIAS, start, high, a, factor, DIM, True)
        if LOW > 0:
            finish(H, WEIGHT, BIAS, start, low, b, factor, DIM, full)


def launch(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    x_new: torch.Tensor | None,
    h: torch.Tensor | None,
    eps: float,
) -> None:
    """Fills x_new (unless y is None) and h (unless it is None). Shapes as in residual_norm, already checked.

    Raises:
        ValueError: the rows are too long for this backend, or eps is negative or not finite.
    """
    rows, dim = x.shape
    high, low, num_warps = tiles(dim, x.element_size())
    backends.check_eps(eps)
    if rows == 0:
        return
    with backends.current(x.device):
        residual_norm_kernel[(rows,)](
            *(x, y, gate, weight, bias, x_new, h, eps),
            **dict(DIM=dim, HIGH=high, LOW=low),
            num_warps=num_warps,
            enable_fp_fusion=False,  # a product is rounded before it is added, as in PyTorch
        )


def offline_case(name: str, dim: int, absent: str = "", dtype: str = "bf16") -> OfflineCase:
    """The variant that ``launch`` would compile. ``absent``: the arguments that are None."""
    high, low, num_warps = tiles(dim, 4 if dtype == "fp32" else 2)
    types = dict.fromkeys(("X", "Y", "X_NEW", "H"), f"*{dtype}") | dict.fromkeys(("GATE", "WEIGHT", "BIAS"), "*fp32")
    signature = {name: type_ for name, type_ in types.items() if name not in absent.split()} | {"eps": "fp32"}
    constexprs = dict.fromkeys(absent.split()) | dict(DIM=dim, HIGH=high, LOW=low)
    return OfflineCase(name, residual_norm_kernel, signature, constexprs, num_warps, fp_fusion=False)


OFFLINE = [
    offline_case("gate, norm, modulation: 1536", 1536),
    offline_case("gate, norm, modulation: 5120", 5120),
    offline_case("gate, norm, modulation: 5120 float32", 5120, dtype="fp32"),
    offline_case("affine norm: 3072", 3072, "GATE"),
    offline_case("residual: 5120", 5120, "WEIGHT BIAS H"),
]
