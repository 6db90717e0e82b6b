"""Compiling without a GPU: what the report says of small kernels whose answer is known."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import interpreter_kernels
from dualparal.kernels.offline import compile_offline
from triton_interpreter import interpreted


@triton.jit
def copy(X, Y, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i, mask=i < n), mask=i < n)


@triton.jit
def crowded(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Y + i, x - tl.max(x, 0))  # all of x waits for the maximum


@triton.jit
def square(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    tl.store(Y + i[:, None] * N + i[None, :], tl.dot(x, x))


def test_width_of_loads():
    wide = compile_offline(copy, {"X": "*bf16", "Y": "*bf16", "n": "i32:16"}, {"N": 1024}, 90, num_warps=4)
    assert wide.loads == {16: 1} and wide.stores == {16: 1}
    assert wide.widths() == "1x16 / 1x16"
    assert not wide.spills and not wide.serialised and 0 < wide.registers <= 64
    # A length that need not be a multiple of 16 takes the pieces apart.
    narrow = compile_offline(copy, {"X": "*bf16", "Y": "*bf16", "n": "i32"}, {"N": 1024}, 90, num_warps=4)
    assert max(narrow.loads) < 16 and max(narrow.stores) < 16


def test_spills_show():
    report = compile_offline(crowded, {"X": "*fp32", "Y": "*fp32"}, {"N": 2**14}, 80, num_warps=1)
    assert report.spills and report.stack > 0 and report.spill_instructions > 0


@pytest.mark.parametrize("arch", [80, 90])
def test_tensor_cores_show(arch):
    report = compile_offline(square, {"X": "*bf16", "Y": "*fp32"}, {"N": 64}, arch, num_warps=4)
    assert (report.mma > 0) == (arch == 80) and (report.gmma > 0) == (arch == 90)
    assert report.shared > 0 and not report.spills and not report.serialised


@pytest.mark.parametrize(
    "signature, constexprs, says",
    [
        ({"X": "*bf16", "Y": "*bf16"}, {"N": 8}, r"missing \['n'\]"),
        ({"X": "*bf16", "Y": "*bf16", "n": "i32", "m": "i32"}, {"N": 8}, r"unknown \['m'\]"),
        ({"X": "*bf16", "Y": "*bf16", "n": "i32"}, {"N": 8, "n": 4}, r"given twice \['n'\]"),
    ],
)
def test_arguments_are_checked(signature, constexprs, says):
    with pytest.raises(ValueError, match=says):
        compile_offline(copy, signature, constexprs, 90)


def test_compiler_and_interpreter_share_a_process():
    """What the interpreter patches in triton.language is back when a kernel is compiled after it."""
    attributes = {name: value for name, value in vars(tl).items()}
    x, out = torch.ones(2, 64), torch.zeros(2)
    signature = {"X": "*fp32", "Y": "*fp32", "n": "i32"}
    for _ in range(2):
        with interpreted(interpreter_kernels):
            interpreter_kernels.row_sums[(2,)](x, out, 64, N=64)
        assert out.tolist() == [128.0, 128.0]
        assert all(vars(tl)[name] is value for name, value in attributes.items())
        report = compile_offline(interpreter_kernels.row_sums, signature, {"N": 64}, 80, num_warps=1)
        assert report.registers > 0
    with pytest.raises(Exception):  # noqa: B017  no driver, or a card that cannot read memory of the CPU
        interpreter_kernels.row_sums[(2,)](x, out, 64, N=64)
