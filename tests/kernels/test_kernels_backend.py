import logging

import numpy
import pytest
import torch

from dualparal.kernels import backend
from dualparal.kernels.accuracy import assert_no_worse
from dualparal.kernels.attention import attention, attention_segments
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope
from dualparal.kernels.residual_norm import residual, residual_norm
from kernel_common import native, random

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """Choices are made anew inside the test, and again after it."""
    backend.absent.cache_clear()
    backend._auto.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    backend.absent.cache_clear()
    backend._auto.cache_clear()


def test_auto_is_native_and_logged_once(fresh, caplog):
    native("cpu")
    with caplog.at_level(logging.INFO, "dualparal"):
        assert [backend.choose("an_op", CPU, "auto") for _ in range(3)] == ["cpp"] * 3
    assert [record.getMessage() for record in caplog.records] == ["an_op on cpu: cpp"]


def test_without_the_extension(fresh, caplog):
    fresh.setattr(backend, "NOT_BUILT", "dualparal._C does not import (no such module)")
    cond, uncond = random(2, 10)
    with caplog.at_level(logging.INFO, "dualparal"):
        assert torch.equal(combine_guidance(cond, uncond, 2.0), uncond + 2.0 * (cond - uncond))
    assert "combine_guidance on cpu: torch; not cpp: dualparal._C does not import" in caplog.text
    with pytest.raises(ValueError, match=r"backend='cpp' cannot run: dualparal\._C does not import.*reinstall"):
        combine_guidance(cond, uncond, 2.0, backend="cpp")


def test_backend_of_another_device():
    with pytest.raises(ValueError, match="backend='cuda' cannot run: it takes tensors on cuda, not on cpu"):
        backend.choose("an_op", CPU, "cuda")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='fast' is unknown; use 'auto' or one of cpp, cuda, triton, torch"):
        backend.choose("an_op", CPU, "fast")


def test_cuda_build_without_a_card(fresh):
    native("cpu")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    fresh.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run: dualparal\._C (was|has no kernel)"):
        backend.choose("an_op", torch.device("cuda"), "cuda")


def test_build_info():
    native("cpu")
    info = backend._C.build_info()
    assert set(info) == {"compiler", "cuda", "archs", "openmp"}
    assert bool(info["archs"]) == info["cuda"]
    assert backend._C.cuda_problem.__doc__


# The extension checks what it is given even when Python did not: a wrong number must not reach a pointer.
PLACE = dict(dtype=0, device=-1, stream=0, threads=1)
GUIDANCE = dict(cond=8, uncond=8, out=8, size=0, scale=1.0, **PLACE)
NORM = dict(x=8, y=8, gate=0, weight=0, bias=0, x_new=8, h=8, rows=0, dim=4, eps=1e-6, **PLACE)
SLOT = numpy.array([7])
ROPE = dict(
    **dict.fromkeys(("qkv", "norm_q", "norm_k", "cos", "sin", "q", "k", "v"), 8),
    **dict(rows=0, heads=2, head_dim=4, k_stride=8, v_stride=8, lends=[], eps=1e-6, **PLACE),
)
RAW = [
    ("combine_guidance", GUIDANCE, dict(size=-1), "size=-1"),
    ("combine_guidance", GUIDANCE, dict(size=1, out=0), "out is a null pointer, with rows=1"),
    ("combine_guidance", GUIDANCE, dict(dtype=3), "dtype code 3"),
    ("combine_guidance", GUIDANCE, dict(device=-2), "device=-2"),
    ("combine_guidance", GUIDANCE, dict(threads=0), "threads=0"),
    ("combine_guidance", GUIDANCE, dict(scale=float("inf")), "scale=inf"),
    ("residual_norm", NORM, dict(rows=-5), "rows=-5"),
    ("residual_norm", NORM, dict(dim=0), "dim=0"),
    ("residual_norm", NORM, dict(dim=1 << 40), "dim=1099511627776"),
    ("residual_norm", NORM, dict(rows=1, x=0), "x is a null pointer"),
    ("residual_norm", NORM, dict(rows=1, x_new=0), "come together"),
    ("residual_norm", NORM, dict(rows=1, y=0, x_new=0, h=0), "nothing to do"),
    ("residual_norm", NORM, dict(eps=-1.0), "eps=-1"),
    ("qk_norm_rope", ROPE, dict(head_dim=3), "head_dim=3"),
    ("qk_norm_rope", ROPE, dict(heads=0), "heads=0"),
    ("qk_norm_rope", ROPE, dict(rows=2, k_stride=7), "stride 7 is less than its row of 8"),
    ("qk_norm_rope", ROPE, dict(rows=1, v=0), "v_out is a null pointer"),
    ("qk_norm_rope", ROPE, dict(lends=[(0, 0, 0, 1, 0, 0)] * 3), "3 lends: at most 2"),
    ("qk_norm_rope", ROPE, dict(lends=[(8, 8, 8, 0, 0, 0)]), "slots=0"),
    ("qk_norm_rope", ROPE, dict(lends=[(8, 8, 8, 1, 1, 0)]), "tokens=1: 0 to rows=0"),
    ("qk_norm_rope", ROPE, dict(rows=2, lends=[(8, 8, 8, 1, 1, 2)]), "first=2: 0 to 1 expected"),
    ("qk_norm_rope", ROPE, dict(rows=2, lends=[(8, 0, 8, 1, 1, 1)]), "a lend's values is a null pointer"),
    ("qk_norm_rope", ROPE, dict(rows=2, lends=[(8, 8, SLOT.ctypes.data, 7, 1, 1)]), "slot is 7: 0 to 6 expected"),
]


RAW_IDS = [f"{op} {change}".replace(str(SLOT.ctypes.data), "SLOT") for op, _, change, _ in RAW]  # alike in all workers


@pytest.mark.parametrize("op, good, change, says", RAW, ids=RAW_IDS)
def test_the_extension_checks_too(op, good, change, says):
    native("cpu")
    function = getattr(backend._C, op)
    function(**good)
    with pytest.raises(ValueError) as error:
        function(**{**good, **change})
    assert says in str(error.value)


def test_the_metric_sees_what_it_should():
    truth = random(10, 10).double()
    plain = truth.float()
    assert_no_worse(plain, plain, truth, 2.0, "same")
    for spoil, says in ((1e-3, "largest error"), (float("nan"), "1 of 100 elements are not finite")):
        ours = plain.clone()
        ours[3, 7] += spoil
        with pytest.raises(AssertionError, match=says) as error:
            assert_no_worse(ours, plain, truth, 2.0, "spoiled")
        assert "spoiled" in str(error.value) and "[3, 7]" in str(error.value)


def _calls():
    """By name, a call of each op that a stage runs (x -> None), in which ``x`` [24, 64] may not be transposed."""
    y, ones, angles = torch.zeros(24, 64), torch.ones(64), torch.zeros(24, 2)
    qkv, arena = torch.zeros(24, 3 * 64), torch.zeros(48, 64)
    store, slot = torch.zeros(2, 24, 64), torch.zeros(1, dtype=torch.int64)
    own, lends = (arena[:24], arena[24:]), [Lend(store, store.clone(), slot, 0)]
    return {
        "residual_norm": lambda x: residual_norm(x, y, ones, ones, ones, eps=1e-6),
        "residual": lambda x: residual(y, x, ones),
        "qk_norm_rope": lambda x: qk_norm_rope(
            qkv, ones, ones, angles, angles, x, own[1], heads=16, eps=1e-6, lends=lends
        ),
        "combine_guidance": lambda x: combine_guidance(y, x, 2.0),
        "attention": lambda x: attention(x, y, y, heads=4),
        "attention_segments": lambda x: attention_segments(y, [own, (y, x)], heads=4, workspace=(arena, arena.clone())),
    }


@pytest.mark.parametrize("name", _calls())
@torch.inference_mode()
def test_a_layout_is_checked_once(name, monkeypatch):
    call, looked_at, check = _calls()[name], [], backend.check
    call(torch.zeros(24, 64))
    monkeypatch.setattr(backend, "check", lambda *args, **more: (looked_at.append(args[0]), check(*args, **more)))
    call(torch.ones(24, 64))  # another tensor, the same layout
    assert looked_at == []
    others = (
        torch.zeros(64, 24).T,
        torch.zeros(24, 64, dtype=torch.float64),
        torch.zeros(24, 63),
        torch.zeros(24, 64, 1),
    )
    for other in others:  # the first has the same shape
        with pytest.raises(ValueError):
            call(other)
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(ValueError, match="requires a gradient"):
        _calls()[name](torch.zeros(24, 64, requires_grad=True))


def test_a_check_that_raises_is_not_remembered_and_numbers_count():
    seen = []

    @backend.once_per_layout
    def check(x, pairs, number):
        seen.append(number)
        if number < 0:
            raise ValueError("negative")
        return len(pairs)

    a, b = torch.zeros(2, 3), torch.zeros(3)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(ValueError):
                check(a, [(a, b)], -1)
            assert check(a, [(a, b)], 1) == 1
            assert check(a, [(a, b), (a, b)], 1) == 2
            assert check(a, [(a, b)], 2) == 1
            assert check(b, [(a, a)], 2) == 1
        assert seen == [-1, 1, 1, 2, 2, -1]
        check(a, [], True)  # of another kind than 1
        check(a, [], True)
        assert seen[6:] == [True, True]
    assert check(a, [(a, b)], 1) == 1
    assert seen[8:] == [1]  # gradients are recorded
