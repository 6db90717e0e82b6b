import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.kernels.accuracy import assert_no_worse, nan_filled_memory
from dualparal.kernels.residual_norm import cases as named
from dualparal.kernels.residual_norm import reference, residual, residual_norm
from kernel_common import DEVICES, DTYPES, cases, native, random

EPS = 1e-6


def inputs(case, dtype=torch.float32, device="cpu"):
    x = random(case.rows, case.dim, dtype=dtype, device=device, seed=1)
    y = random(case.rows, case.dim, dtype=dtype, device=device, seed=2) if case.update else None
    vectors = [
        random(case.dim, device=device, seed=3 + i) if present else None
        for i, present in enumerate((case.gate, case.weight, case.bias))
    ]
    return [x, y, *vectors]


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(named))
def test_no_worse_than_torch(case, dtype, device):
    args = inputs(case, dtype, device)
    with nan_filled_memory():
        x_new, h = residual_norm(*args, eps=EPS, backend=native(device))
    want_x, want_h = residual_norm(*args, eps=EPS, backend="torch")
    # One multiplication and one addition, each rounded once: there is only one right answer.
    assert torch.equal(x_new, want_x)
    assert (x_new is args[0]) == (args[1] is None)
    # The norm starts from x_new as it was rounded.
    _, truth = reference.residual_norm(x_new.double(), None, None, *double(args[3:]), eps=EPS)
    assert_no_worse(h, want_h, truth, 2.0, case.name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in cases(named) if c.values[0].update])
def test_residual_alone(case, dtype, device):
    x, y, gate, *_ = inputs(case, dtype, device)
    with nan_filled_memory():
        ours = residual(x, y, gate, backend=native(device))
    assert torch.equal(ours, residual(x, y, gate, backend="torch"))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diffusers_layer(dtype, backend):
    """The lines of WanTransformerBlock.forward, with the modulation of one timestep."""
    if backend == "cpp":
        native("cpu")
    dim = 96
    hidden = random(50, dim, dtype=dtype, seed=1)
    attention = random(50, dim, dtype=dtype, seed=2)
    shift, scale, gate = random(3, dim, seed=3)
    norm = FP32LayerNorm(dim, EPS, elementwise_affine=False)
    affine = FP32LayerNorm(dim, EPS, elementwise_affine=True).requires_grad_(False)
    torch.nn.init.normal_(affine.weight)
    torch.nn.init.normal_(affine.bias)

    norm1 = (norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    after = (hidden.float() + attention * gate).type_as(hidden)
    norm2 = affine(after.float()).type_as(after)
    _, our_norm1 = residual_norm(hidden, weight=1 + scale, bias=shift, eps=EPS, backend=backend)
    our_after, our_norm2 = residual_norm(hidden, attention, gate, affine.weight, affine.bias, eps=EPS, backend=backend)

    assert torch.equal(our_after, after)
    for name, ours, theirs, x, weight, bias in (
        ("norm1", our_norm1, norm1, hidden, 1 + scale, shift),
        ("norm2", our_norm2, norm2, after, affine.weight, affine.bias),
    ):
        _, truth = reference.residual_norm(x.double(), None, None, *double([weight, bias]), eps=EPS)
        assert_no_worse(ours, theirs, truth, 2.0, f"{name} {dtype}")


def test_constant_rows_and_large_offsets():
    """No variance leaves eps alone under the root; a large mean must not swallow the variance."""
    backend = native("cpu")
    _, h = residual_norm(torch.full((3, 40), 7.0), eps=EPS, backend=backend)
    assert torch.equal(h, torch.zeros(3, 40))
    x = random(16, 1536) + 1000.0
    _, ours = residual_norm(x, eps=EPS, backend=backend)
    _, plain = residual_norm(x, eps=EPS, backend="torch")
    assert_no_worse(ours, plain, reference.residual_norm(x.double(), eps=EPS)[1], 2.0, "offset")


def test_threads_do_not_matter():
    backend = native("cpu")
    case = named.Case("threads", rows=131, dim=1536)
    args = inputs(case, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(residual_norm(*args, eps=EPS, backend=backend))
    finally:
        torch.set_num_threads(before)
    for x_new, h in results[1:]:
        assert torch.equal(x_new, results[0][0]) and torch.equal(h, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_survives(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(64, 1024)
    ours = residual(every, torch.zeros_like(every), backend=native("cpu"))
    torch.testing.assert_close(ours, every + 0, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=200)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    values=st.lists(st.floats(width=32), min_size=1, max_size=64),
)
def test_rounding_is_torchs(dtype, values):
    """Ties, overflow, subnormals and NaN: y * gate takes any float32 value before it is rounded."""
    gate = torch.tensor(values, dtype=torch.float32)
    ones = torch.ones(1, len(values), dtype=dtype)
    ours = residual(torch.zeros_like(ones), ones, gate, backend=native("cpu"))
    torch.testing.assert_close(ours[0], (gate + 0).to(dtype), rtol=0, atol=0, equal_nan=True)


X = torch.zeros(4, 6)
BAD = {
    "batch dimension": ((X[None],), "[1, 4, 6]"),
    "no columns": ((torch.zeros(4, 0),), "[4, 0]"),
    "integers": ((X.int(),), "torch.int32"),
    "not contiguous": ((torch.zeros(6, 4).T,), "(1, 4)"),
    "shape of y": ((X, torch.zeros(4, 5)), "[4, 5]"),
    "dtype of y": ((X, X.bfloat16()), "torch.bfloat16"),
    "device of y": ((X, X.to("meta")), "meta"),
    "gate without y": ((X, None, X[0]), "without y"),
    "dtype of gate": ((X, X, X[0].double()), "torch.float64"),
    "length of weight": ((X, None, None, torch.zeros(7)), "[7]"),
    "per-row bias": ((X, None, None, None, X), "[4, 6]"),
    "gradient": ((X.clone().requires_grad_(),), "inference_mode"),
}


@pytest.mark.parametrize("args, says", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(args, says):
    with pytest.raises(ValueError) as error:
        residual_norm(*args, eps=EPS)
    assert says in str(error.value)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match=r"eps=.*expected"):
        residual_norm(X, eps=eps, backend=native("cpu"))
