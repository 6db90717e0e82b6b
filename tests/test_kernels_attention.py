import pytest
import torch

from dualparal.kernels.attention import attention, reference
from dualparal.kernels.attention import cases as named
from dualparal.testing import assert_no_worse
from kernel_common import DEVICES, DTYPES, cases, random


def inputs(case, dtype=torch.float32, device="cpu"):
    inner = case.heads * case.head_dim
    q = random(case.q_rows, inner, dtype=dtype, device=device, seed=1)
    k, v = random(2, case.k_rows, inner + case.padding, dtype=dtype, device=device, seed=2)
    return q, k[:, :inner], v[:, :inner]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in cases(named) if c.values[0].elements <= 2**24])
def test_sdpa_is_near_the_truth(case, dtype, device):
    args = inputs(case, dtype, device)
    ours = attention(*args, heads=case.heads)
    assert ours.is_contiguous()
    # torch's own kernel on the same heads as contiguous tensors: views must cost nothing in accuracy.
    heads = [t.contiguous().unflatten(1, (case.heads, -1)).transpose(0, 1).contiguous()[None] for t in args]
    plain = torch.nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1).flatten(1)
    truth = reference.attention(*(t.double() for t in args), heads=case.heads)
    assert_no_worse(ours, plain, truth, 2.0, case.name)


def test_reference_backend():
    case = named.Case("reference", q_rows=9, k_rows=11, heads=3, head_dim=8)
    args = inputs(case)
    torch.testing.assert_close(
        attention(*args, heads=3, backend="reference"), attention(*args, heads=3, backend="sdpa")
    )


X = torch.zeros(4, 12)
BAD = {
    "heads": ((X, X, X, 5), "heads=5"),
    "batch dimension": ((X[None], X, X, 2), "[1, 4, 12]"),
    "no keys": ((X, X[:0], X[:0], 2), "[0, 12]"),
    "width of k": ((X, X[:, :6], X, 2), "[4, 6]"),
    "rows of v": ((X, X, X[:3], 2), "[3, 12]"),
    "dtype of v": ((X, X, X.bfloat16(), 2), "torch.bfloat16"),
    "columns of k": ((X, torch.zeros(12, 4).T, X, 2), "(1, 4)"),
}


@pytest.mark.parametrize("args, says", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(args, says):
    q, k, v, heads = args
    with pytest.raises(ValueError) as error:
        attention(q, k, v, heads=heads)
    assert says in str(error.value)


def test_unknown_backend():
    with pytest.raises(ValueError, match="'cpp' is unknown; use 'auto' or one of sdpa, reference"):
        attention(X, X, X, heads=2, backend="cpp")
