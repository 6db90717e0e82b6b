"""fp8 linears: the definition against float64 and torch's own, the Triton pass against the definition."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from dualparal.kernels import linear_8bit as package
from dualparal.kernels.accuracy import rms
from dualparal.kernels.linear_8bit import Rows8, absent, linear_8bit, quantise_rows, restore_rows, rows_absent
from dualparal.kernels.linear_8bit.cases import CASES, Case
from kernel_common import random

BY_NAME = {"ids": lambda case: case.name}
SOME = Case("some", 33, 64, 48)


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and bias in bfloat16, weight in float32."""
    x = random(case.rows, case.width, dtype=torch.bfloat16)
    return x, random(case.out, case.width, seed=1), random(case.out, dtype=torch.bfloat16, seed=2)


@pytest.mark.parametrize("case", CASES, **BY_NAME)
def test_error_against_float64(case: Case) -> None:
    x, weight, bias = inputs(case)
    truth = F.linear(x.double(), weight.double(), bias.double())
    made = linear_8bit(x, quantise_rows(weight), bias)
    assert made.shape == truth.shape and made.dtype == torch.bfloat16
    if case.rows:
        # Two factors, each rounded by at most 2^-4 of itself and 1 / 448 / 2^10 of its row's largest: rms 2.6 % each.
        assert 1e-3 < rms(made.double() - truth) / rms(truth) < 0.05


@pytest.mark.parametrize("case", CASES, **BY_NAME)
def test_the_definition_is_torchs_own_product(case: Case) -> None:
    """Operands and scales go to ``torch._scaled_mm`` as a GPU gets them; torch's CPU has the row-wise kind, too."""
    x, weight, bias = inputs(case)
    rows, made = quantise_rows(x), quantise_rows(weight)
    if case.rows:
        theirs = torch._scaled_mm(
            rows.values, made.values.T, scale_a=rows.scale, scale_b=made.scale.T, bias=bias, out_dtype=torch.bfloat16
        )
        assert torch.equal(linear_8bit(x, made, bias), theirs)


def test_rows_do_not_know_each_other() -> None:
    """The same bits however tokens are cut, also beside a row that is a thousand times larger."""
    x, weight, bias = inputs(SOME)
    x[5] *= 1000
    whole = quantise_rows(x)
    for cut in (slice(0, 5), slice(5, 6), slice(6, 33)):
        assert all(torch.equal(a[cut].float(), b.float()) for a, b in zip(whole, quantise_rows(x[cut].contiguous())))
    made = quantise_rows(weight)
    assert torch.equal(linear_8bit(x, made, bias)[:5], linear_8bit(x[:5], made, bias))


def test_weights_by_output_channel() -> None:
    """A channel a thousand times larger costs the others nothing."""
    x, weight, bias = inputs(SOME)
    before = linear_8bit(x, quantise_rows(weight), bias)
    weight[3] *= 1000
    after = linear_8bit(x, quantise_rows(weight), bias)
    others = torch.arange(SOME.out) != 3
    assert torch.equal(before[:, others], after[:, others]) and not torch.equal(before[:, 3], after[:, 3])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_none_shows_in_its_row_alone(bad: float) -> None:
    x, weight, bias = inputs(SOME)
    x[7, 3] = bad
    made = linear_8bit(x, quantise_rows(weight), bias)
    assert made[7].isnan().all() and made[torch.arange(SOME.rows) != 7].isfinite().all()


def test_rows_restored_are_near_and_keep_their_own(dtype: torch.dtype = torch.bfloat16) -> None:
    """e4m3 has a relative error of 2^-4 at most, for numbers that are not far below their row's largest."""
    x = random(33, 64, dtype=dtype)
    back = torch.full_like(x, torch.nan)
    restore_rows(quantise_rows(x), back)
    assert ((back - x).abs() <= 2.0**-4 * x.abs() + x.abs().amax(1, keepdim=True) * 2.0**-15).all()
    assert rms(back - x) > 1e-3 * rms(x)
    with pytest.raises(ValueError, match="out is"):
        restore_rows(quantise_rows(x), back[:5])


def test_zeros_stay_zeros() -> None:
    made = quantise_rows(torch.zeros(3, 16))
    assert made.scale.gt(0).all() and made.values.float().eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 192, 640, 1536])
def test_triton_equals_the_definition(width: int, dtype: torch.dtype) -> None:
    """Bit by bit, with a row of zeros, one that holds a NaN, and one of the smallest numbers."""
    pytest.importorskip("triton")
    from dualparal.kernels.linear_8bit import triton_kernel
    from triton_interpreter import interpreted

    x = random(6, width, dtype=dtype)
    x[1], x[2, 3], x[3, 1], x[4] = 0.0, torch.nan, torch.inf, x[4] * 1e-6
    with interpreted(triton_kernel):
        made = Rows8(*triton_kernel.quantise_rows(x))
    want = quantise_rows(x, backend="torch")
    assert torch.equal(made.scale.nan_to_num(-1), want.scale.nan_to_num(-1))
    finite = [0, 1, 4, 5]
    assert torch.equal(made.values[finite].float(), want.values[finite].float())
    assert made.scale[2:4].isnan().all()
    back, wanted = torch.empty_like(x), torch.empty_like(x)
    with interpreted(triton_kernel):
        triton_kernel.restore_rows(*made, back)
    restore_rows(want, wanted, backend="torch")
    assert torch.equal(back[finite], wanted[finite]) and not back[2:4].isfinite().any()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(x=torch.zeros(3, 64)), "x is torch.float32"),
        (dict(x=torch.zeros(3, 32, dtype=torch.bfloat16)), r"expected torch.bfloat16 \[3, 64\]"),
        (dict(weight=quantise_rows(torch.zeros(24, 64))), "multiples of 16"),
        (dict(bias=torch.zeros(48)), "bias is torch.float32"),
        (dict(backend="cutlass"), "unknown"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], says: str) -> None:
    x, weight, bias = inputs(SOME)
    given = {"x": x, "weight": quantise_rows(weight), "bias": bias, **change}
    with pytest.raises(ValueError, match=says):
        linear_8bit(**given)  # type: ignore[arg-type]


CARD = torch.device("cuda", 0)


def test_cards_without_fp8_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert absent(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(package, "_refused", lambda device: "")
    for capability, reason in (((8, 0), "fp8 needs compute capability 8.9"), ((8, 9), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, at=capability: at)
        for found in (absent(CARD), rows_absent(CARD)):
            assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`\nand more"),
            "NOT_SUPPORTED",
        ),
        (torch.zeros(32, 32, dtype=torch.bfloat16), "makes wrong fp8 products"),
        (None, ""),
    ],
    ids=["refuses", "wrong", "right"],
)
def test_a_card_whose_library_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, answer: Exception | torch.Tensor | None, says: str
) -> None:
    """The capability alone does not say it: compute capability 12.0 with torch 2.10, pytorch issue 192707."""
    tries, real, refused = [], torch._scaled_mm, package._refused.__wrapped__

    def product(*args: torch.Tensor, **options: object) -> torch.Tensor:
        tries.append(args)
        if isinstance(answer, Exception):
            raise answer
        return real(*args, **options) if answer is None else answer  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(package, "_refused", functools.cache(lambda device: refused(torch.device("cpu"))))
    for _ in range(2):
        reason = absent(CARD)
    assert says in reason and bool(reason) == bool(says) and "\n" not in reason
    assert len(tries) == 1, "once per device"
    assert rows_absent(CARD) == "", "features need no product"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [*CASES, Case("wan1.3b-ffn", 1560, 1536, 8960)], **BY_NAME)
def test_on_a_card(case: Case) -> None:
    """Rows to the bit; the product near that of the dequantised rows.

    Besides bfloat16's rounding: 14 bits are kept within a run of 128 terms, and float32 between runs.
    """
    if reason := absent(CARD):
        pytest.skip(reason)
    x, weight, bias = (tensor.to(CARD) for tensor in inputs(case))
    made, wanted = quantise_rows(x), quantise_rows(x.cpu())
    assert all(torch.equal(a.cpu().float(), b.float()) for a, b in zip(made, wanted))
    back = torch.empty_like(x)
    restore_rows(made, back)
    rest = torch.empty_like(x.cpu())
    restore_rows(wanted, rest)
    assert torch.equal(back.cpu(), rest)
    eight = quantise_rows(weight)
    rows, columns = (each.values.double() * each.scale.double() for each in (made, eight))
    found, truth = linear_8bit(x, eight, bias).double(), rows @ columns.T + bias.double()
    terms = rows.abs() @ columns.abs().T + bias.double().abs()
    assert ((found - truth).abs() <= 2.0**-8 * truth.abs() + 2.0**-13 * terms).all()


def test_as_a_torch_op() -> None:
    x, weight, bias = inputs(SOME)
    torch.library.opcheck(torch.ops.dualparal.quantise_rows, (x, "auto"))
    # Not `test_schema`, which multiplies its arguments: torch does not multiply fp8.
    some = ("test_autograd_registration", "test_faketensor")
    given = (*quantise_rows(x), torch.empty_like(x), "auto")
    torch.library.opcheck(torch.ops.dualparal.restore_rows, given, test_utils=some)
    made = quantise_rows(weight)
    exported = torch.export.export(Module(made, bias), (x,))
    assert torch.equal(exported.module()(x), linear_8bit(x, made, bias))


class Module(torch.nn.Module):
    def __init__(self, weight: Rows8, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_8bit(x, self.weight, self.bias)
