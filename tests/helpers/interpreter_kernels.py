"""Small kernels that test the interpreter shim of triton_interpreter.py."""

import triton
import triton.language as tl


@triton.jit
def twice(x):
    return tl.sum(x, 0) * 2


@triton.jit
def dot(A, B, C, N: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(A + at), tl.load(B + at))
    tl.store(C + at, c.to(DTYPE))


@triton.jit
def convert(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(tl.float32).to(Y.dtype.element_ty))


@triton.jit
def row_sums(X, Y, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + tl.program_id(0) * n + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(Y + tl.program_id(0), twice(x))


@triton.jit
def careless(X, Y, N: tl.constexpr, WHAT: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    if WHAT == "add":
        x = x + x
    elif WHAT == "scale":
        x = x * 0.5
    elif WHAT == "negate":
        x = -x
    elif WHAT == "compare":
        x = tl.where(x > x, x, x)
    tl.store(Y + i, x)
