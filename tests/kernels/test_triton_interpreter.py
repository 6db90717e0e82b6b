"""The interpreter shim: bfloat16 is right or refused, and the compiler works as before."""

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

import interpreter_kernels as kernels
from kernel_common import random
from triton_interpreter import interpreted

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot(dtype):
    a, b = random(2, 32, 32, dtype=dtype)
    out = torch.full((32, 32), torch.nan)
    with interpreted(kernels):
        kernels.dot[(1,)](a, b, out, N=32, DTYPE=tl.float32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_survives(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = torch.zeros(2**16, dtype=dtype)
    with interpreted(kernels):
        kernels.convert[(1,)](every, out, N=2**16)
    torch.testing.assert_close(out, every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_conversions_round_to_nearest_even(dtype):
    """Random numbers of every size, and exact ties between neighbours."""
    size = 4096
    x = random(size) * 2.0 ** (random(size, seed=1) * 5)
    ties = (torch.arange(size) + 0.5) / size + 1
    for values in (x, ties.float(), -ties.float()):
        out = torch.zeros(size, dtype=dtype)
        with interpreted(kernels):
            kernels.convert[(1,)](values.contiguous(), out, N=size)
        limit = torch.finfo(dtype).max if dtype.itemsize == 1 else torch.inf
        assert torch.equal(out.float(), values.clamp(-limit, limit).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_8_bit_floats_widen_exactly(dtype):
    every = torch.arange(256).to(torch.uint8).view(dtype)
    out = torch.zeros(256)
    with interpreted(kernels):
        kernels.convert[(1,)](every, out, N=256)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("what", ["add", "scale", "negate", "compare"])
def test_arithmetic_on_bfloat16_is_refused(what):
    x = random(16, dtype=torch.bfloat16)
    with interpreted(kernels), pytest.raises(Exception, match="arithmetic on bfloat16"):
        kernels.careless[(1,)](x, torch.empty_like(x), N=16, WHAT=what)
    with interpreted(kernels):  # float16 has numbers of its own in numpy
        kernels.careless[(1,)](x.half(), torch.empty_like(x.half()), N=16, WHAT=what)


def test_reductions_in_called_functions():
    x = random(3, 50)
    out = torch.full((3,), torch.nan)
    with interpreted(kernels):
        kernels.row_sums[(3,)](x, out, 50, N=64)
    torch.testing.assert_close(out, 2 * x.sum(1))
