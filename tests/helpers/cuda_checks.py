"""Comparisons of the emulated CUDA kernels with their definitions, as the tests of tests/kernels/ make them on a card.

Every check takes an ``Emulated`` and raises AssertionError: a ``Fault``, or words in which something "differs".
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from cuda_emulation import DEVICE, STREAM, Emulated, Fault, shifted
from dualparal.kernels import backend as backends
from dualparal.kernels.accuracy import assert_no_worse, nan_filled_memory
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.kernels.combine_guidance import reference as guidance_reference
from dualparal.kernels.qk_norm_rope import cases as rope_cases
from dualparal.kernels.qk_norm_rope import qk_norm_rope
from dualparal.kernels.qk_norm_rope import reference as rope_reference
from dualparal.kernels.residual_norm import cases as norm_cases
from dualparal.kernels.residual_norm import reference as norm_reference
from dualparal.kernels.residual_norm import residual, residual_norm
from kernel_common import Stores, random

EPS = 1e-6
LONGEST = 12160  # elements of a row, as csrc/common.cuh says
NARROW = torch.bfloat16
WHERE = dict(dtype=backends.DTYPES[NARROW], device=DEVICE, stream=STREAM)


def agree(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    if not torch.equal(ours, theirs):
        raise AssertionError(f"{name} differs from the definition")


def placed(tensors: list, shift: bool) -> list:
    """The tensors; with ``shift`` none of them begins at a multiple of 16 bytes."""
    return [shifted(tensor) if shift and tensor is not None else tensor for tensor in tensors]


def double(tensors: list) -> list:
    return [None if tensor is None else tensor.double() for tensor in tensors]


# residual_norm -----------------------------------------------------------------------------------------------------


def norm_inputs(case: norm_cases.Case, dtype: torch.dtype) -> list:
    x = random(case.rows, case.dim, dtype=dtype, seed=1)
    y = random(case.rows, case.dim, dtype=dtype, seed=2) if case.update else None
    present = (case.gate, case.weight, case.bias)
    return [x, y, *(random(case.dim, seed=3 + i) if given else None for i, given in enumerate(present))]


def compare_norm(x_new: torch.Tensor, h: torch.Tensor, args: list) -> None:
    want_x, want_h = norm_reference.residual_norm(*args, eps=EPS)
    agree(x_new, want_x, "x_new")  # one multiplication and one addition, each rounded once
    # The norm starts from x_new as it was rounded.
    _, truth = norm_reference.residual_norm(x_new.double(), None, None, *double(args[3:]), eps=EPS)
    assert_no_worse(h, want_h, truth, 2.0, "h differs from the definition")


def check_norm(native: Emulated, case: norm_cases.Case, dtype: torch.dtype, shift: bool = False) -> None:
    args = placed(norm_inputs(case, dtype), shift)
    with native.installed(), nan_filled_memory():
        x_new, h = residual_norm(*args, eps=EPS, backend="cuda")
        alone = residual(*args[:3], backend="cuda") if case.update else x_new
    compare_norm(x_new, h, args)
    agree(alone, x_new, "x_new without a norm")


def check_constant_rows(native: Emulated) -> None:
    """No variance leaves eps alone under the root."""
    with native.installed():
        _, h = residual_norm(torch.full((2, 40), 7.0), eps=EPS, backend="cuda")
    agree(h, torch.zeros(2, 40), "h of constant rows")


def check_longest_row(native: Emulated) -> None:
    """The longest row that is taken fits into shared memory, and a longer one is refused in words."""
    x = random(1, LONGEST)
    with native.installed():
        _, h = residual_norm(x, eps=EPS, backend="cuda")
        try:
            residual_norm(random(1, LONGEST + 1), eps=EPS, backend="cuda")
        except ValueError as error:
            said = str(error)
        else:
            said = "nothing"
    want, truth = (norm_reference.residual_norm(rows, eps=EPS)[1] for rows in (x, x.double()))
    assert_no_worse(h, want, truth, 2.0, "h of the longest row differs from the definition")
    if "a row of 12161 elements: the CUDA kernels take up to 12160; use backend='torch'" not in said:
        raise AssertionError(f"the refusal of a longer row differs: {said}")


NORM_POINTERS = ("x", "y", "gate", "weight", "bias", "x_new", "h")


def check_norm_pointer(native: Emulated, off: str) -> None:
    """Everything at multiples of 16 bytes but the tensor ``off``."""
    args = norm_inputs(norm_cases.Case("", 2, 64), NARROW)
    tensors = dict(zip(NORM_POINTERS, [*args, *torch.full((2, 2, 64), torch.nan, dtype=NARROW)]))
    tensors[off] = shifted(tensors[off])
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    native.residual_norm(**pointers, rows=2, dim=64, eps=EPS, **WHERE)
    compare_norm(tensors["x_new"], tensors["h"], args)


# qk_norm_rope ------------------------------------------------------------------------------------------------------


def rope_inputs(case: rope_cases.Case, dtype: torch.dtype) -> list:
    angles = 100 * random(case.rows, case.head_dim // 2, seed=4)
    qkv = random(case.rows, 3 * case.inner, dtype=dtype, seed=1)
    return [qkv, random(case.inner, seed=2), random(case.inner, seed=3), angles.cos(), angles.sin()]


def run_rope(case: rope_cases.Case, args: list, run: Callable, shift: bool, **given: object) -> tuple:
    """q, k, v, and the memory of k and v: rows of their own between NaN."""
    stride = case.inner + case.padding
    memory = torch.full((2, (case.rows + 2) * stride + shift), torch.nan, dtype=args[0].dtype)
    k, v = (one[shift:].view(-1, stride)[1 : case.rows + 1, : case.inner] for one in memory)
    return run(*args, k, v, heads=case.heads, eps=EPS, **given), k, v, memory


def compare_rope(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: list, case: rope_cases.Case) -> None:
    want_q, want_k, want_v, _ = run_rope(case, args, rope_reference.qk_norm_rope, False)
    true_q, true_k, _, _ = run_rope(case, double(args), rope_reference.qk_norm_rope, False)
    assert_no_worse(q, want_q, true_q, 2.0, "q differs from the definition")
    assert_no_worse(k, want_k, true_k, 2.0, "k differs from the definition")
    agree(v, want_v, "v")


def check_rope(native: Emulated, case: rope_cases.Case, dtype: torch.dtype, shift: bool = False) -> None:
    args, stores = placed(rope_inputs(case, dtype), shift), Stores(case, dtype)
    run = functools.partial(qk_norm_rope, backend="cuda", lends=stores.lends)
    with native.installed(), nan_filled_memory():
        q, k, v, memory = run_rope(case, args, run, shift)
    compare_rope(q, k, v, args, case)
    assert memory.isnan().sum() == memory.numel() - 2 * case.rows * case.inner, "memory around k and v differs"
    try:
        stores.check(k, v)
    except AssertionError:
        raise AssertionError("a store differs from the definition") from None


ROPE_POINTERS = ("qkv", "q", "k", "v", "keys", "values")


def check_rope_pointer(native: Emulated, off: str = "", k_stride: int = 32, v_stride: int = 32, slot: int = 1) -> None:
    """Everything at multiples of 16 bytes but the tensor ``off``."""
    case = rope_cases.Case("", 3, 2, 16)
    args, number = rope_inputs(case, NARROW), torch.tensor([slot])
    tensors = dict(zip(("qkv", "norm_q", "norm_k", "cos", "sin"), args))
    strides = {"q": 32, "k": k_stride, "v": v_stride}
    tensors |= {name: torch.full((3, stride), torch.nan, dtype=NARROW) for name, stride in strides.items()}
    tensors |= dict(zip(("keys", "values"), torch.full((2, 2, 2, 32), torch.nan, dtype=NARROW)))
    if off:
        tensors[off] = shifted(tensors[off])
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    lends = [(pointers.pop("keys"), pointers.pop("values"), number.data_ptr(), 2, 2, 1)]
    sizes = dict(rows=3, heads=2, head_dim=16, k_stride=k_stride, v_stride=v_stride, eps=EPS)
    native.qk_norm_rope(**pointers, **sizes, lends=lends, **WHERE)
    k, v = tensors["k"][:, :32], tensors["v"][:, :32]
    compare_rope(tensors["q"], k, v, args, case)
    agree(tensors["keys"][1], k[1:], "the lent keys")
    agree(tensors["values"][1], v[1:], "the lent values")


def check_slot(native: Emulated, slot: int) -> None:
    """A slot that the store does not have: the kernel stops before it writes."""
    try:
        check_rope_pointer(native, slot=slot)
    except Fault as fault:
        if str(fault) != "trap":
            raise
    else:
        raise AssertionError("a slot that is not there differs from no other")


# combine_guidance --------------------------------------------------------------------------------------------------


def check_guidance(native: Emulated, shape: tuple[int, ...], dtype: torch.dtype, shift: bool = False) -> None:
    cond, uncond = placed([random(*shape, dtype=dtype, seed=seed) for seed in (1, 2)], shift)
    with native.installed(), nan_filled_memory():
        ours = combine_guidance(cond, uncond, 5.3, backend="cuda")
    # Three operations, each rounded once: there is only one right answer.
    agree(ours, guidance_reference.combine_guidance(cond, uncond, 5.3), "the result")


GUIDANCE_POINTERS = ("cond", "uncond", "out")


def check_guidance_pointer(native: Emulated, off: str) -> None:
    """Everything at multiples of 16 bytes but the tensor ``off``."""
    cond, uncond = random(2, 64, dtype=NARROW)
    tensors = dict(zip(GUIDANCE_POINTERS, (cond, uncond, torch.full_like(cond, torch.nan))))
    tensors[off] = shifted(tensors[off])
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    native.combine_guidance(**pointers, size=64, scale=5.3, **WHERE)
    agree(tensors["out"], guidance_reference.combine_guidance(cond, uncond, 5.3), "the result")
