"""Attention: every backend against the definition, the Triton kernel under the interpreter and the compiler."""

import functools
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.cli import doctor
from dualparal.kernels import environment
from dualparal.kernels.accuracy import assert_no_worse, nan_filled_memory
from dualparal.kernels.attention import attention, attention_segments, choice, implementations, merge, reference, table
from dualparal.kernels.attention import cases as named
from dualparal.models.keys_values import KeysValues
from kernel_common import DEVICES, DTYPES, cases, random

try:
    from dualparal.kernels.attention import triton_kernel
    from triton_interpreter import interpreted
except ImportError:
    triton_kernel = None
needs_triton = pytest.mark.skipif(triton_kernel is None, reason="triton is not installed")

HALVES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """Choices are made anew inside the test, and again after it."""
    choice.forget()
    yield monkeypatch
    monkeypatch.undo()
    choice.forget()


def inputs(case, dtype=torch.float32, device="cpu"):
    inner = case.heads * case.head_dim
    q = random(case.q_rows, inner, dtype=dtype, device=device, seed=1)
    k, v = random(2, case.k_rows, inner + case.padding, dtype=dtype, device=device, seed=2)
    return q, k[:, :inner], v[:, :inner]


def segmented(case, dtype, device="cpu"):
    inner = case.heads * case.head_dim
    q = random(case.q_rows, inner, dtype=dtype, device=device, seed=1)
    segments = []
    for index, length in enumerate(case.lengths):
        k, v = random(2, length, inner + case.padding, dtype=dtype, device=device, seed=2 + index)
        segments.append(KeysValues(k[:, :inner], v[:, :inner]))
    return q, segments, torch.cat([k for k, _ in segments]), torch.cat([v for _, v in segments])


def plainly(q, k, v, heads):
    """torch's own kernel on contiguous heads: views must cost nothing in accuracy."""
    args = [t.contiguous().unflatten(1, (heads, -1)).transpose(0, 1).contiguous()[None] for t in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*args)[0].transpose(0, 1).flatten(1)


def assert_right(out, lse, q, k, v, heads, name):
    truth, truth_lse = reference.attention_lse(*(t.double() for t in (q, k, v)), heads=heads)
    assert_no_worse(out, plainly(q, k, v, heads), truth, 2.0, name)
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    # torch's CPU kernel rounds the logits to the dtype; on float32 logits the sum is good to 1e-5.
    bound = 1e-5 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps
    torch.testing.assert_close(lse.double(), truth_lse, rtol=bound, atol=bound, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in cases(named) if c.values[0].elements <= 2**24])
def test_every_backend_is_near_the_truth(case, dtype, device):
    args = inputs(case, dtype, device)
    for backend in ["auto", "reference", *choice.available(args[0].device, dtype, case.head_dim)]:
        ours, lse = attention(*args, heads=case.heads, backend=backend, return_lse=True)
        assert ours.is_contiguous() and lse.shape == (case.heads, case.q_rows)
        if case.q_rows:
            assert_right(ours, lse, *args, case.heads, f"{case.name}, {backend}")
        alone = attention(*args, heads=case.heads, backend=backend)
        torch.testing.assert_close(alone, ours)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_how_torchs_cuda_kernels_are_called(backend, with_lse):
    """On tensors without data: arguments, shapes and layouts are torch's own, there is only no arithmetic."""
    q, k, v = inputs(named.Case("", 77, 130, heads=2, head_dim=128, padding=44), torch.bfloat16, "meta")
    out, lse = implementations.IMPLEMENTATIONS[backend](q, k, v, 2, with_lse)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert (lse is not None) == with_lse
    if with_lse:
        assert lse.shape == (2, 77) and lse.dtype == torch.float32 and lse.is_contiguous()


def test_cudnn_and_a_single_key():
    args = inputs(named.Case("", 5, 1, heads=2, head_dim=8))
    out, lse = implementations.IMPLEMENTATIONS["cudnn"](*args, 2, True)
    assert_right(out, lse, *args, 2, "one key")


def test_how_the_flash_attn_package_is_called(monkeypatch):
    def flash_attn_func(q, k, v, return_attn_probs=False):
        assert q.shape == (1, 5, 2, 8) and k.shape == v.shape == (1, 7, 2, 8)
        out, lse = reference.attention_lse(*(x[0].flatten(1) for x in (q, k, v)), heads=2)
        return (
            (out.unflatten(1, (2, 8))[None], lse[None], None) if return_attn_probs else out.unflatten(1, (2, 8))[None]
        )

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    args = inputs(named.Case("", 5, 7, heads=2, head_dim=8))
    run = implementations.IMPLEMENTATIONS["flash-attn"]
    out, lse = run(*args, 2, True)
    assert_right(out, lse, *args, 2, "flash-attn")
    alone, nothing = run(*args, 2, False)
    assert torch.equal(alone, out) and nothing is None


# The Triton kernel ------------------------------------------------------------------------------------------------


def interpret(q, segments, heads, with_lse=True, tile=(32, 32, 4, 2)):
    with interpreted(triton_kernel), nan_filled_memory():
        return triton_kernel.attention(q, segments, heads, with_lse, triton_kernel.Tile(*tile))


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", named.SEGMENTS, ids=lambda case: case.name)
def test_triton_over_segments(case, dtype):
    q, segments, k, v = segmented(case, dtype)
    out, lse = interpret(q, segments, case.heads)
    assert out.is_contiguous()
    assert_right(out, lse, q, k, v, case.heads, case.name)


@needs_triton
@pytest.mark.parametrize("lengths", [(64, 32, 32), (32, 0, 64), (0, 0, 96), (77, 19, 33)], ids=str)
def test_triton_over_segments_is_the_concatenation(lengths):
    q, segments, k, v = segmented(named.SegmentsCase("", 48, lengths, heads=2, head_dim=64), torch.bfloat16)
    apart, joined = (interpret(q, s, 2) for s in (segments, [(k, v)]))
    if any(length % 32 for length in lengths):  # other tiles, other roundings
        assert_right(*apart, q, k, v, 2, "segments")
    else:
        assert torch.equal(apart[0], joined[0]) and torch.equal(apart[1], joined[1])


@needs_triton
@pytest.mark.parametrize("tile", [(64, 64, 4, 3), (128, 32, 8, 3)], ids=str)
def test_triton_with_the_tiles_of_real_cards(tile):
    """Rows of queries, keys and of one arena lie apart; keys before and after the run are not read."""
    arena = torch.full((2, 130, 3 * 128), torch.nan, dtype=torch.bfloat16)
    k, v = arena[:, 11:111, 128:256]
    k.copy_(random(100, 128, seed=1))
    v.copy_(random(100, 128, seed=2))
    q = random(75, 160, dtype=torch.bfloat16)[:, :128]
    out, lse = interpret(q, [(k, v)], 1, tile=tile)
    assert_right(out, lse, q, k, v, 1, "arena")
    alone, nothing = interpret(q, [(k, v)], 1, with_lse=False, tile=tile)
    assert nothing is None and torch.equal(alone, out)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the NaN at the end
def test_triton_with_logits_of_every_size():
    """A running maximum that starts far off, and weights that vanish."""
    q, k, v = inputs(named.Case("", q_rows=20, k_rows=70, heads=1, head_dim=64), torch.bfloat16)
    for scale in (0.0, 1.0, 30.0, -30.0):
        steep = (k.float() * torch.linspace(0, scale, 70)[:, None]).bfloat16()
        out, lse = interpret(q, [(steep, v)], 1)
        assert_right(out, lse, q, steep, v, 1, f"scale {scale}")
    out, _ = interpret(q.index_fill(0, torch.tensor([3]), torch.nan), [(k, v)], 1)
    assert out[3].isnan().all() and out.isnan().sum() == 64  # what is broken stays visible, and where it is


@pytest.mark.sampled(2)
@needs_triton
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_triton_compiles_well(arch):
    shared = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}[arch]  # KiB that a block may have
    for case in triton_kernel.OFFLINE:
        report = case.compile(arch)
        assert not report.spills, report
        assert not report.serialised, report
        assert report.loads.get(16, 0) == sum(report.loads.values()), report
        assert report.stores.get(16, 0) > 0 and report.shared <= shared * 1024, report
        assert (report.gmma > 0) == (arch == 90)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a made-up driver")
def test_one_kernel_for_all_lengths(monkeypatch):
    """What Triton's JIT makes of a launch, on a card that is made up: nothing is compiled in the middle of a video."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 120, 32)

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args, **options: made.append(kernel.warmup(*args, grid=grid, **options))

    made, kernel = [], triton_kernel.attention_kernel
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.device_caches.default_factory))
    monkeypatch.setattr(triton_kernel, "attention_kernel", Compiled())
    q = random(300, 256, dtype=torch.bfloat16)
    k, v = random(2, 300, 256 + 48, dtype=torch.bfloat16)[..., :256]
    for q_rows, cut in ((300, 100), (16, 16), (1, 1), (77, 160)):
        triton_kernel.attention(q[:q_rows], [(k[:cut], v[:cut])], 2, tile=triton_kernel.tile_for(120, 128))
    assert len({id(one) for one in made}) == 1
    copies = set(re.findall(r"cp\.async\.c[ag]\S*", made[0].asm["ptx"]))
    assert {copy.split(".")[2] for copy in copies} == {"cg"}  # 16 bytes each; narrower ones are .ca


@needs_triton
def test_tiles():
    tile_for = triton_kernel.tile_for
    for head_dim in triton_kernel.HEAD_DIMS:
        assert tile_for(86, head_dim) == tile_for(89, head_dim)
        assert tile_for(103, head_dim) == tile_for(100, head_dim)
        assert tile_for(999, head_dim) == tile_for(120, head_dim)  # the smallest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", named.SEGMENTS, ids=lambda case: case.name)
def test_segments_on_a_card(case, dtype):
    q, segments, k, v = segmented(case, dtype, "cuda")
    for backend in choice.available(q.device, dtype, case.head_dim):
        out, lse = attention_segments(q, segments, heads=case.heads, backend=backend, return_lse=True)
        assert_right(out, lse, q, k, v, case.heads, f"{case.name}, {backend}")


# Segments on any backend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["new", "workspace", "in place"])
@pytest.mark.parametrize("case", named.SEGMENTS, ids=lambda case: case.name)
def test_segments_are_the_concatenation(case, place):
    q, segments, k, v = segmented(case, torch.float32)
    workspace = None
    if place != "new":
        workspace = KeysValues(*(torch.full((len(k) + 3, k.shape[1]), torch.nan) for _ in range(2)))
    if place == "in place":
        own = workspace.rows(0, len(segments[0].keys))
        own.keys.copy_(segments[0].keys)
        own.values.copy_(segments[0].values)
        segments[0] = own
    out, lse = attention_segments(q, segments, heads=case.heads, workspace=workspace, return_lse=True)
    expected = attention(q, k, v, heads=case.heads, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(attention_segments(q, segments, heads=case.heads, workspace=workspace), expected[0])


@needs_triton
def test_triton_takes_segments_where_they_are(fresh):
    fresh.setattr(choice, "absent", lambda *args: "")
    fresh.setattr(triton_kernel, "_architecture", lambda device: 80)
    q, segments, k, v = segmented(named.SEGMENTS[0], torch.bfloat16)
    workspace = KeysValues(torch.zeros_like(k), torch.zeros_like(v))
    with interpreted(triton_kernel):
        out = attention_segments(q, segments, heads=2, backend="triton", workspace=workspace)
        joined, lse = attention(q, k, v, heads=2, backend="triton", return_lse=True)
    assert not workspace.keys.any() and not workspace.values.any()
    assert_right(out, lse, q, k, v, 2, "segments")
    assert_right(joined, lse, q, k, v, 2, "joined")


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0.1, 30), st.integers(0, 1000))
def test_merged_parts_are_the_whole(lengths, scale, seed):
    q = random(5, 16, seed=seed).double() * scale
    k, v = random(2, sum(lengths), 16, seed=seed + 1).double()
    parts = [
        reference.attention_lse(q, keys, values, heads=2) for keys, values in zip(k.split(lengths), v.split(lengths))
    ]
    for order in (parts, parts[::-1]):
        out, lse = merge(order)
        whole = reference.attention_lse(q, k, v, heads=2)
        torch.testing.assert_close(out, whole[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, whole[1], rtol=1e-12, atol=1e-12)


def test_merging_narrow_parts():
    q, k, v = inputs(named.Case("", q_rows=9, k_rows=30, heads=2, head_dim=8), torch.bfloat16)
    parts = [attention(q, k[a:b], v[a:b], heads=2, return_lse=True) for a, b in ((0, 10), (10, 30))]
    out, lse = merge(parts)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    truth = reference.attention(*(t.double() for t in (q, k, v)), heads=2)
    assert_no_worse(out, plainly(q, k, v, 2), truth, 2.0, "merged")


# torch.compile ----------------------------------------------------------------------------------------------------


def ops():
    q, k, v = inputs(named.Case("", q_rows=5, k_rows=7, heads=2, head_dim=8))
    segments = ([k, k[:0], k[:3]], [v, v[:0], v[:3]])
    library = torch.ops.dualparal
    return [
        (library.attention, (q, k, v, 2, "auto")),
        (library.attention_lse, (q, k, v, 2, "auto")),
        (library.attention_segments, (q, *segments, 2, "auto")),
        (library.attention_segments_lse, (q, *segments, 2, "auto")),
    ]


@pytest.mark.parametrize("which", range(4))
def test_opcheck(which):
    op, args = ops()[which]
    torch.library.opcheck(op.default, args)


def test_compiles_in_one_graph():
    def both(q, k, v, k2, v2):
        out, lse = attention(q * 2, k, v, heads=2, return_lse=True)
        out = attention(out, k, v, heads=2) + 1
        more, more_lse = attention_segments(out, [KeysValues(k, v), KeysValues(k2, v2)], heads=2, return_lse=True)
        return attention_segments(more, [(k, v)], heads=2), lse + more_lse

    q, k, v = inputs(named.Case("", q_rows=5, k_rows=7, heads=2, head_dim=8))
    args = (q, k, v, k[:4] * 2, v[:4] * 3)
    with torch.inference_mode():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*args)
        for ours, plain in zip(compiled, both(*args)):
            assert torch.equal(ours, plain)


# Which backend ----------------------------------------------------------------------------------------------------


class Card:
    """A machine with this card, as far as ``choice`` looks."""

    def __init__(self, patch, architecture, torch_version="2.11.0", cudnn=91900, missing=("flash_attn",)):
        self.device = torch.device("cuda", 0)
        patch.setattr(choice, "architecture", lambda device: architecture if device.type == "cuda" else 0)
        patch.setattr(choice, "_absent_package", lambda name, cure: f"no {name}; {cure}" if name in missing else "")
        patch.setattr(torch, "__version__", torch_version)
        patch.setattr(torch.version, "hip", None)
        patch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        patch.setattr(choice, "_refused_by_torch", lambda backend, *kind: f"no {backend}" if backend in missing else "")
        self.measured = {}
        patch.setattr(table, "measured_for", functools.cache(lambda device: self.measured))

    def auto(self, dtype=torch.bfloat16, head_dim=128, k_rows=24960):
        return choice.choose(self.device, dtype, head_dim, k_rows, "auto")


@pytest.mark.parametrize(
    "architecture, torch_version, cudnn, expected",
    [
        (90, "2.11.0+cu130", 91900, "sdpa"),
        (100, "2.12.0", 91501, "sdpa"),
        (90, "2.11.0", 91500, "flash"),
        (90, "2.10.1", 91900, "flash"),
        (90, "2.9.0", None, "flash"),
        (80, "2.11.0", 91900, "flash"),
        (89, "2.11.0", 91900, "flash"),
        (120, "2.11.0", 91900, "flash"),
        (75, "2.11.0", 91900, "sdpa"),
        (130, "3.0.0", 100000, "sdpa"),
    ],
)
def test_the_table(fresh, architecture, torch_version, cudnn, expected):
    card = Card(fresh, architecture, torch_version, cudnn)
    assert card.auto() == card.auto(torch.float16, 64, 512) == expected
    assert card.auto(torch.float32) == "sdpa"


def test_choices_are_made_once_and_logged_once(fresh, caplog):
    card = Card(fresh, 89)
    with caplog.at_level(logging.INFO, "dualparal"):
        assert [card.auto() for _ in range(3)] == ["flash"] * 3
        card.measured[("bfloat16", 128, "long")] = "cudnn"
        assert card.auto() == "flash"  # until the process ends
        assert card.auto(head_dim=80) == card.auto(head_dim=80) == "sdpa"
        assert choice.choose(CPU, torch.float32, 64, 9, "auto") == "sdpa"
    assert [record.getMessage() for record in caplog.records] == [
        "attention on sm_89, bfloat16, head dimension 128, 2048 or more keys: flash (prediction)",
        "attention on sm_89, bfloat16, head dimension 80, 2048 or more keys: sdpa (the table has no row for this kind)",
        "attention on cpu, float32, head dimension 64, fewer than 2048 keys: sdpa (nothing else is made for it)",
    ]


def test_a_measured_choice_comes_first_if_it_can_run(fresh, caplog):
    card = Card(fresh, 90)
    card.measured |= {("bfloat16", 128, "long"): "triton", ("bfloat16", 128, "short"): "flash-attn"}
    card.measured |= {("float16", 128, "long"): "faster"}
    with caplog.at_level(logging.INFO, "dualparal"):
        assert card.auto() == "triton"
        assert card.auto(k_rows=512) == "sdpa"  # flash-attn is gone since
        assert card.auto(torch.float16) == "sdpa"
    assert "2048 or more keys: triton (measured on this machine)" in caplog.text


def test_the_environment_has_the_last_word(fresh, caplog):
    card = Card(fresh, 90)
    fresh.setenv(environment.ATTENTION_BACKEND, "triton")
    with caplog.at_level(logging.INFO, "dualparal"):
        assert card.auto() == "triton"
    assert "DUALPARAL_ATTENTION_BACKEND asks for it" in caplog.text
    with pytest.raises(ValueError, match="DUALPARAL_ATTENTION_BACKEND=triton cannot run: it takes head dimensions 64"):
        card.auto(head_dim=80)
    with pytest.raises(ValueError, match="or unset DUALPARAL_ATTENTION_BACKEND"):
        choice.choose(CPU, torch.bfloat16, 128, 9, "auto")
    choice._auto.cache_clear()
    fresh.setenv(environment.ATTENTION_BACKEND, "quick")
    with pytest.raises(ValueError, match="DUALPARAL_ATTENTION_BACKEND=quick is unknown; use 'auto' or one of sdpa"):
        choice._auto(card.device, torch.bfloat16, 128, "long")


def test_doctor_tells_the_choice(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._attention() == ["attention      sdpa (nothing else is made for it)"]
    card = Card(fresh, 120)
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._attention() == [
        "attention      flash (prediction)",
        "               'dualparal calibrate' measures what is the fastest here",
    ]
    card.measured["bfloat16", 128, "long"] = "triton"
    assert doctor._attention() == ["attention      triton (measured on this machine)"]
    fresh.setenv(environment.ATTENTION_BACKEND, "cudnn")
    assert doctor._attention()[0] == "attention      cudnn (DUALPARAL_ATTENTION_BACKEND asks for it)"


@pytest.mark.parametrize(
    "backend, architecture, dtype, head_dim, says",
    [
        ("triton", 90, torch.bfloat16, 128, "no triton; pip install triton; or use backend='auto'"),
        ("flash-attn", 90, torch.bfloat16, 128, "no flash_attn; pip install flash-attn"),
        ("flash-attn", 90, torch.float32, 128, "takes torch.bfloat16, torch.float16, not torch.float32"),
        ("cudnn", 90, torch.bfloat16, 136, "multiples of 8 up to 128, not 136"),
        ("flash", 90, torch.bfloat16, 20, "multiples of 8 up to 256, not 20"),
        ("efficient", 90, torch.bfloat16, 128, "no efficient; or use backend='auto'"),
        ("flash", 75, torch.float16, 64, "capability 8.0 or more, this one has 7.5"),
    ],
)
def test_what_is_missing_is_named(fresh, backend, architecture, dtype, head_dim, says):
    card = Card(fresh, architecture, missing=("flash_attn", "triton", "efficient"))
    with pytest.raises(ValueError, match=f"backend={backend!r} cannot run") as error:
        choice.choose(card.device, dtype, head_dim, 100, backend)
    assert says in str(error.value)


@needs_triton
def test_what_triton_takes(fresh):
    card = Card(fresh, 90, missing=())
    assert choice.available(card.device, torch.bfloat16, 128) == [
        "sdpa", "cudnn", "flash", "efficient", "flash-attn", "triton",
    ]  # fmt: skip
    assert choice.available(card.device, torch.float32, 128) == ["sdpa", "efficient"]
    for dtype, head_dim, says in ((torch.float32, 128, "not torch.float32"), (torch.bfloat16, 80, "64, 128, not 80")):
        with pytest.raises(ValueError, match=says):
            choice.choose(card.device, dtype, head_dim, 100, "triton")


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_torch_is_asked_for_its_own_kernels(monkeypatch, backend):
    asked = []

    def ask(params, debug):
        asked.append(params.query)
        return len(asked) > 1

    ask.__name__ = f"can_use_{backend}_attention"
    monkeypatch.setattr(torch.backends.cuda, ask.__name__, ask)
    reasons = [choice._refused_by_torch(backend, CPU, torch.bfloat16, 64) for _ in range(2)]
    assert f"torch.backends.cuda.{ask.__name__} with debug=True" in reasons[0] and reasons[1] == ""
    assert asked[0].dtype == torch.bfloat16 and asked[0].shape[-1] == 64


def test_backends_of_another_device():
    assert choice.available(CPU, torch.float32, 24) == ["sdpa", "flash"]
    for backend in ("cudnn", "efficient", "flash-attn", "triton"):
        with pytest.raises(ValueError, match="cannot run: it takes tensors on cuda, not on cpu"):
            attention(X, X, X, heads=2, backend=backend)


# Mistakes ---------------------------------------------------------------------------------------------------------

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


BAD_SEGMENTS = {
    "none": ([], None, "there are 0 segments; use 1 to 3"),
    "four": ([(X, X)] * 4, None, "there are 4 segments"),
    "all empty": ([(X[:0], X[:0])] * 2, None, "all segments are empty"),
    "width": ([(X, X), (X[:, :6], X)], None, "k of segment 1 is torch.float32 [4, 6]"),
    "rows of v": ([(X, X[:2])], None, "v of segment 0 is torch.float32 [2, 12]"),
    "batch dimension": ([(X[None], X)], None, "k of segment 0 is [1, 4, 12]"),
    "workspace": ([(X, X)] * 2, (X, X), "keys of the workspace have 4 rows; expected 8"),
    "dtype of workspace": ([(X, X)], (X, X.half()), "values of the workspace is torch.float16"),
}


@pytest.mark.parametrize("segments, workspace, says", BAD_SEGMENTS.values(), ids=BAD_SEGMENTS.keys())
def test_bad_segments_are_named(segments, workspace, says):
    with pytest.raises(ValueError) as error:
        attention_segments(X, segments, heads=2, workspace=workspace)
    assert says in str(error.value)


def test_no_queries():
    out, lse = attention_segments(X[:0], [(X, X)], heads=2, return_lse=True)
    assert out.shape == (0, 12) and lse.shape == (2, 0)


def test_unknown_backend():
    with pytest.raises(ValueError, match="'cpp' is unknown; use 'auto' or one of sdpa, cudnn"):
        attention(X, X, X, heads=2, backend="cpp")
