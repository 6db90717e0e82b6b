"""The Triton passes under the interpreter, against their plain PyTorch definitions.

Bit-equal to PyTorch, and so to diffusers, is what is computed element by element in a fixed order: x_new of
residual_norm, residual, v of qk_norm_rope, combine_guidance. Norms sum a row in another order than PyTorch does
and are compared with the truth; where the sum is exact in any order, q and k are bit-equal too.
"""

import logging
import sys

import pytest
import torch

pytest.importorskip("triton")

from diffusers.models.normalization import FP32LayerNorm

from dualparal.kernels import backend as backends
from dualparal.kernels.accuracy import assert_no_worse, nan_filled_memory
from dualparal.kernels.combine_guidance import cases as guidance_cases
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.kernels.combine_guidance import triton_kernel as guidance_kernel
from dualparal.kernels.offline import compile_offline
from dualparal.kernels.qk_norm_rope import cases as rope_cases
from dualparal.kernels.qk_norm_rope import qk_norm_rope
from dualparal.kernels.qk_norm_rope import reference as rope_reference
from dualparal.kernels.qk_norm_rope import triton_kernel as rope_kernel
from dualparal.kernels.residual_norm import cases as norm_cases
from dualparal.kernels.residual_norm import reference as norm_reference
from dualparal.kernels.residual_norm import residual, residual_norm
from dualparal.kernels.residual_norm import triton_kernel as norm_kernel
from dualparal.kernels.rows import LONGEST, tiles
from kernel_common import DTYPES, Stores, random
from triton_interpreter import interpreted

EPS = 1e-6
ROWS = 5  # of every case: rows do not know each other, and the interpreter is slow


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """Inside the test, backend="triton" takes CPU tensors and is interpreted."""
    absent = backends.absent
    monkeypatch.setattr(backends, "absent", lambda name, device: "" if name == "triton" else absent(name, device))
    with interpreted(norm_kernel, rope_kernel, guidance_kernel):
        yield


def fewer_rows(cases):
    return [pytest.param(case._replace(rows=min(case.rows, ROWS)), id=case.name) for case in cases.CASES]


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def norm_inputs(case, dtype):
    x = random(case.rows, case.dim, dtype=dtype, seed=1)
    y = random(case.rows, case.dim, dtype=dtype, seed=2) if case.update else None
    present = (case.gate, case.weight, case.bias)
    return [x, y, *(random(case.dim, seed=3 + i) if given else None for i, given in enumerate(present))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", fewer_rows(norm_cases))
def test_residual_norm(triton_on_cpu, case, dtype):
    args = norm_inputs(case, dtype)
    with nan_filled_memory():
        x_new, h = residual_norm(*args, eps=EPS, backend="triton")
    want_x, want_h = residual_norm(*args, eps=EPS, backend="torch")
    assert torch.equal(x_new, want_x)
    assert (x_new is args[0]) == (args[1] is None)
    _, truth = norm_reference.residual_norm(x_new.double(), None, None, *double(args[3:]), eps=EPS)
    assert_no_worse(h, want_h, truth, 2.0, case.name)
    if case.update:
        with nan_filled_memory():
            alone = residual(*args[:3], backend="triton")
        assert torch.equal(alone, want_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diffusers_layer(triton_on_cpu, dtype):
    """The lines of WanTransformerBlock.forward around its self-attention."""
    dim = 96
    hidden, attention = random(ROWS, dim, dtype=dtype, seed=1), random(ROWS, dim, dtype=dtype, seed=2)
    shift, scale, gate = random(3, dim, seed=3)
    norm = FP32LayerNorm(dim, EPS, elementwise_affine=False)
    norm1 = (norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    after = (hidden.float() + attention * gate).type_as(hidden)
    _, our_norm1 = residual_norm(hidden, weight=1 + scale, bias=shift, eps=EPS, backend="triton")
    our_after = residual(hidden, attention, gate, backend="triton")
    assert torch.equal(our_after, after)
    _, truth = norm_reference.residual_norm(hidden.double(), None, None, *double([1 + scale, shift]), eps=EPS)
    assert_no_worse(our_norm1, norm1, truth, 2.0, f"norm1 {dtype}")


def test_constant_rows_and_large_offsets(triton_on_cpu):
    """No variance leaves eps alone under the root; a large mean must not swallow the variance."""
    _, h = residual_norm(torch.full((3, 40), 7.0), eps=EPS, backend="triton")
    assert torch.equal(h, torch.zeros(3, 40))
    x = random(ROWS, 1536) + 1000.0
    _, ours = residual_norm(x, eps=EPS, backend="triton")
    _, plain = residual_norm(x, eps=EPS, backend="torch")
    assert_no_worse(ours, plain, norm_reference.residual_norm(x.double(), eps=EPS)[1], 2.0, "offset")


def rope_inputs(case, dtype):
    angles = 100 * random(case.rows, case.head_dim // 2, seed=4)
    return [
        random(case.rows, 3 * case.inner, dtype=dtype, seed=1),
        *(random(case.inner, seed=2), random(case.inner, seed=3)),
        *(angles.cos(), angles.sin()),
    ]


def run_rope(case, args, run):
    """q, k, v and the arena, full of NaN, that k and v are written into."""
    arena = torch.full((2, case.rows + 2, case.inner + case.padding), torch.nan, dtype=args[0].dtype)
    k, v = arena[:, 1 : case.rows + 1, : case.inner]
    return run(*args, k, v, heads=case.heads, eps=EPS), k, v, arena


ROPE_CASES = [case for case in fewer_rows(rope_cases) if not case.values[0].lends]
LENDING = [pytest.param(case, id=case.name) for case in rope_cases.CASES if case.lends and case.rows < 10]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LENDING)
def test_lent_rows_are_the_rows_made(triton_on_cpu, case, dtype):
    args, stores = rope_inputs(case, dtype), Stores(case, dtype)
    alone = run_rope(case, args, lambda *a, **b: qk_norm_rope(*a, **b, backend="triton"))
    made = run_rope(case, args, lambda *a, **b: qk_norm_rope(*a, **b, backend="triton", lends=stores.lends))
    assert all(torch.equal(a, b) for a, b in zip(made[:3], alone[:3]))
    stores.check(*made[1:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROPE_CASES)
def test_qk_norm_rope(triton_on_cpu, case, dtype):
    args = rope_inputs(case, dtype)
    with nan_filled_memory():
        q, k, v, arena = run_rope(case, args, lambda *a, **b: qk_norm_rope(*a, **b, backend="triton"))
    want_q, want_k, want_v, _ = run_rope(case, args, rope_reference.qk_norm_rope)
    true_q, true_k, _, _ = run_rope(case, double(args), rope_reference.qk_norm_rope)
    assert_no_worse(q, want_q, true_q, 2.0, f"{case.name} q")
    assert_no_worse(k, want_k, true_k, 2.0, f"{case.name} k")
    assert torch.equal(v, want_v)
    # Written: the two slices. Everything around them is as it was.
    assert arena.isnan().sum() == arena.numel() - 2 * case.rows * case.inner


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, head_dim", [(12, 128), (5, 6)])
def test_rotation_is_bit_equal_where_the_norm_is_exact(triton_on_cpu, heads, head_dim, dtype):
    """A row of ones and minus ones has the mean square 1 in any order of summation."""
    case = rope_cases.Case("signs", ROWS, heads, head_dim)
    args = rope_inputs(case, dtype)
    args[0] = args[0].sign()
    ours = run_rope(case, args, lambda *a, **b: qk_norm_rope(*a, **b, backend="triton"))
    theirs = run_rope(case, args, rope_reference.qk_norm_rope)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in guidance_cases.CASES])
def test_combine_guidance(triton_on_cpu, case, dtype):
    cond, uncond = random(2, *(min(size, 2100 if len(case.shape) == 1 else 16) for size in case.shape), dtype=dtype)
    with nan_filled_memory():
        ours = combine_guidance(cond, uncond, 5.3, backend="triton")
    assert torch.equal(ours, combine_guidance(cond, uncond, 5.3, backend="torch"))


@pytest.mark.parametrize("size", [2047, 2048, 4096, 4097])
def test_diffusers_guidance(triton_on_cpu, size):
    """Around the ends of thread blocks, the line of WanPipeline.__call__."""
    cond, uncond = random(2, size)
    assert torch.equal(combine_guidance(cond, uncond, 5.0, backend="triton"), uncond + 5.0 * (cond - uncond))


def test_an_output_may_lie_anywhere(triton_on_cpu):
    """Rows at an odd address: the kernels count elements, not 16-byte pieces."""
    x = random(3 * 96 + 1, dtype=torch.bfloat16)[1:].view(3, 96)
    _, h = residual_norm(x, eps=EPS, backend="triton")
    _, same = residual_norm(x.clone(), eps=EPS, backend="triton")
    assert torch.equal(h, same)


def test_tiles():
    for dim in range(1, LONGEST + 1):
        for itemsize in (2, 4):
            high, low, num_warps = tiles(dim, itemsize)
            assert high <= dim <= high + low and low <= high and (low == 0 or high < dim)
            assert all(number & (number - 1) == 0 for number in (high, low, num_warps)) and 1 <= num_warps <= 16
    assert tiles(1536, 2) == (1024, 512, 2) and tiles(5120, 2) == (4096, 1024, 4) and tiles(3072, 2) == (2048, 1024, 4)
    assert tiles(48, 2) == (32, 16, 1)


def test_limits_are_named(triton_on_cpu):
    with pytest.raises(ValueError, match=f"a row of {LONGEST + 1} elements.*use backend='torch'"):
        residual_norm(torch.zeros(1, LONGEST + 1), eps=EPS, backend="triton")
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"eps=.*expected"):
            residual_norm(torch.zeros(1, 4), eps=eps, backend="triton")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dim", [LONGEST, LONGEST - 2])
def test_the_longest_row_fits_the_registers(dim):
    assert not norm_kernel.offline_case("", dim).compile(90).spills
    assert not rope_kernel.offline_case("", dim, 2).compile(90).spills
    assert not rope_kernel.offline_case("", dim, 2, lends=2).compile(90).spills


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", norm_cases.CASES, ids=lambda case: case.name)
def test_every_case_of_residual_norm_compiles(case, dtype):
    """The interpreter takes what the compiler refuses: types of branches, tiles of one element."""
    given = dict(Y=case.update, X_NEW=case.update, GATE=case.gate, WEIGHT=case.weight, BIAS=case.bias)
    absent = " ".join(name for name, present in given.items() if not present)
    assert not norm_kernel.offline_case(case.name, case.dim, absent, dtype).compile(90).spills


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("case", rope_cases.CASES, ids=lambda case: case.name)
def test_every_case_of_qk_norm_rope_compiles(case, dtype):
    stride = "i32" if (case.inner + case.padding) % 16 else "i32:16"
    made = rope_kernel.offline_case(case.name, case.inner, case.head_dim, dtype, stride, len(case.lends))
    assert not made.compile(90).spills


def test_more_than_2_to_the_31_elements_compile():
    signature = dict(COND="*bf16", UNCOND="*bf16", OUT="*bf16", size="i64", scale="fp32")
    report = compile_offline(guidance_kernel.combine_guidance_kernel, signature, dict(BLOCK=2048), 90, 4)
    assert not report.spills and report.loads[16]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: residual_norm(x, eps=EPS, backend="triton"),
        lambda x: residual(x, x, backend="triton"),
        lambda x: combine_guidance(x, x, 2.0, backend="triton"),
    ],
    ids=["residual_norm", "residual", "combine_guidance"],
)
def test_triton_does_not_take_cpu_tensors(call):
    with pytest.raises(ValueError, match="backend='triton' cannot run: it takes tensors on cuda, not on cpu"):
        call(torch.zeros(2, 6))


@pytest.fixture
def fresh(monkeypatch):
    """Choices are made anew inside the test, and again after it."""
    for cached in (backends.absent, backends._auto):
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in (backends.absent, backends._auto):
        cached.cache_clear()


def test_order_on_cuda(fresh, caplog):
    """The C++ library where it was built for the card, else Triton, else PyTorch; told once."""
    fresh.setattr(backends, "NOT_BUILT", "dualparal._C does not import (no such module)")
    device = torch.device("cuda")
    with caplog.at_level(logging.INFO, "dualparal"):
        assert backends.choose("an_op", device, "auto") == "triton"
    assert caplog.messages == [
        "an_op on cuda: triton; not cuda: dualparal._C does not import (no such module); reinstall dualparal where "
        "there is a C++ compiler"
    ]
    for cached in (backends.absent, backends._auto):
        cached.cache_clear()
    fresh.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.INFO, "dualparal"):
        assert backends.choose("an_op", device, "auto") == "torch"
    assert "not triton: triton does not import" in caplog.text
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: triton does not import.*install triton"):
        backends.choose("an_op", device, "triton")

    backends._auto.cache_clear()
    fresh.setattr(backends, "absent", lambda backend, device_type: "" if backend != "cpp" else "it takes tensors")
    assert backends.choose("an_op", device, "auto") == "cuda"
