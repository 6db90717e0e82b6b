"""8-bit attention: smoothing is exact, the definition is near the truth, the kernels are as near as the definition."""

from importlib.util import find_spec

import pytest
import torch

from dualparal.kernels import attention_8bit as family
from dualparal.kernels.accuracy import assert_no_worse, rms
from dualparal.kernels.attention import reference as attention_reference
from dualparal.kernels.attention_8bit import (
    FP8,
    TILE,
    KeysValues8,
    Queries8,
    attention_8bit,
    key_mean,
    lent,
    place,
    qk_norm_rope_8bit,
    quantise_features,
    reference,
    restore_features,
    tiles_of,
)
from dualparal.kernels.attention_8bit import cases as named
from dualparal.kernels.qk_norm_rope import reference as norm_reference
from kernel_common import cases, random
from pairwise import pairwise

EPS = 1e-6
KINDS = {"int8": (torch.int8, False), "fp8 values": (torch.int8, True), "fp8": (FP8, True)}
kinds = pytest.mark.parametrize("kind", KINDS)


class Inputs:
    """Keys of an arena, each segment less its own mean, in 8 bits, with junk in the rows that do not count."""

    def __init__(self, case, kind, junk=True):
        self.case, (dtype, fp8) = case, KINDS[kind]
        self.spans, rows = case.spans, tiles_of(case.spans[-1]) * TILE
        self.segments = list(zip(self.spans[::2], self.spans[1::2]))
        q = random(case.q_rows, case.inner, seed=1)
        self.means = random(len(self.segments), case.inner, seed=2)
        self.keys, self.values = torch.zeros(2, rows, case.inner)
        wide = case.inner + case.padding
        k = torch.zeros(rows, wide).to(dtype)[:, : case.inner]
        k_scale = torch.full((case.heads, tiles_of(rows)), torch.nan)
        v = torch.full((rows, wide), torch.nan, dtype=torch.bfloat16)[:, : case.inner]
        if fp8:
            v = torch.full((case.inner, rows + case.padding), torch.nan).to(FP8)[:, :rows]
        self.arena = KeysValues8(k, k_scale, v, k_scale.clone() if fp8 else None)
        for i, ((length, skip), (start, end)) in enumerate(zip(case.segments, self.segments)):
            first = start - skip
            keys, values = random(2, length, case.inner, seed=3 + i)
            keys += 2 * self.means[i]
            self.keys[first:end], self.values[first:end] = keys, values
            made = quantise_features(keys, values, self.means[i], heads=case.heads, fp8=fp8, dtype=dtype)
            for target, source in zip(self.arena.rows(first, length), made):
                if target is not None:
                    target.copy_(source)
            if junk and not fp8:
                v[first:start] = torch.nan
            elif junk:
                v[:, first:start] = torch.nan
                v[:, end : first + tiles_of(length) * TILE] = torch.nan
        bias = reference.key_bias(q, self.means, case.heads)
        self.queries = Queries8(*reference.quantise_rows(q, case.heads, dtype), bias)
        self.raw_q = q

    @property
    def args(self):
        return self.queries, self.arena, self.spans

    def truth(self):
        """Attention over what was quantised, float64."""
        rows = torch.cat([torch.arange(*segment) for segment in self.segments])
        q, k, v = self.raw_q.double(), self.keys[rows].double(), self.values[rows].double()
        return attention_reference.attention(q, k, v, heads=self.case.heads)

    def exact(self):
        """Attention over what quantising made of it, float64, weights not rounded."""
        return reference.attention_8bit(*self.args, heads=self.case.heads, dtype=torch.bfloat16, exact=True)

    def run(self, backend="auto"):
        return attention_8bit(*self.args, heads=self.case.heads, dtype=torch.bfloat16, backend=backend)


def small(module=named):
    return [case for case in cases(module) if case.values[0].elements <= 2**20]


# Smoothing


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_any_means_leave_softmax_as_it_is(segments):
    """The scores of smoothed keys and bias are those of the keys, less one number per query: float64, no rounding."""
    heads, rows, length, inner = 2, 7, 11, 16
    q = random(rows, inner, seed=1).double()
    keys = random(segments, length, inner, seed=2).double()
    means = 5 * random(segments, inner, seed=3).double()
    bias = reference.key_bias(q, means, heads)  # [segments - 1, heads, rows]
    by_head = [t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, keys.flatten(0, 1))]
    plain = by_head[0] @ by_head[1].mT  # [heads, rows, segments * length]
    smooth = (keys - means[:, None]).flatten(0, 1).unflatten(1, (heads, -1)).transpose(0, 1)
    shift = torch.cat([bias.new_zeros(1, heads, rows), bias]).repeat_interleave(length, 0).permute(1, 2, 0)
    scores = by_head[0] @ smooth.mT + shift
    difference = plain - scores
    assert (difference - difference[..., :1]).abs().max() < 1e-12  # the same for every key of a query
    own = means[0].unflatten(0, (heads, -1))
    lost = torch.einsum("hsd,hd->hs", by_head[0], own)
    torch.testing.assert_close(difference[..., 0], lost, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.softmax(-1), plain.softmax(-1), rtol=0, atol=1e-13)
    if segments > 1:  # without the bias it is not
        assert (difference + shift - (difference + shift)[..., :1]).abs().max() > 1


def test_smoothing_lowers_the_error_of_common_parts():
    case = named.Case("common part", 64, ((128, 0), (96, 0)), heads=1, head_dim=64)
    errors = {}
    for name, scale in (("smooth", 1.0), ("plain", 0.0)):
        x = Inputs(case, "int8")
        offset = 8 * random(case.inner, seed=9)
        for (start, end), mean in zip(x.segments, x.means):
            x.keys[start:end] += offset
            mean.copy_((2 * mean + offset) * scale)
        for i, (start, end) in enumerate(x.segments):
            tiles = slice(start // TILE, start // TILE + tiles_of(end - start))
            x.arena.k[start:end], x.arena.k_scale[:, tiles] = reference.quantise_tiles(
                x.keys[start:end] - x.means[i], 1, torch.int8
            )
        x.queries = x.queries._replace(bias=reference.key_bias(x.raw_q, x.means, 1))
        errors[name] = rms(x.run().double() - x.truth())
    assert errors["smooth"] < 0.3 * errors["plain"], errors


# The definition


@kinds
@pytest.mark.parametrize("case", small())
def test_definition_is_near_the_truth(case, kind):
    """Gaussian inputs, the worst case: no scores stand out, so nothing hides the rounding."""
    x = Inputs(case, kind)
    ours = x.run()
    assert ours.dtype == torch.bfloat16 and ours.is_contiguous() and ours.isfinite().all()
    if ours.numel():
        truth = x.truth()
        limit = {"int8": 0.02, "fp8 values": 0.045, "fp8": 0.07}[kind]
        assert rms(ours.double() - truth) < limit * rms(truth)


# Attention, the kernel


def triton_kernel():
    pytest.importorskip("triton")
    from dualparal.kernels.attention_8bit import triton_kernel

    return triton_kernel


def interpreted():
    module = triton_kernel()
    from triton_interpreter import interpreted

    return interpreted(module)


CONFIGS = {"pointers": (32, 64, False), "tma": (64, 128, True)}


@pytest.mark.parametrize(
    "case, config, kind",
    pairwise([param.values[0] for param in small() if param.values[0].q_rows], CONFIGS, KINDS),
    ids=lambda value: getattr(value, "name", value),
)
def test_kernel_is_as_near_as_the_definition(case, config, kind):
    kernel, x = triton_kernel(), Inputs(case, kind)
    block_m, block_n, tma = CONFIGS[config]
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
        ours = kernel.attention_8bit(
            *x.args,
            heads=case.heads,
            dtype=torch.bfloat16,
            config=kernel.Config(block_m, block_n, 4, 1, tma),
        )
    assert_no_worse(ours, x.run(), x.exact(), 1.5, f"{case.name} {kind} {config}")


@kinds
def test_kernel_on_other_dtypes(kind):
    kernel, case = triton_kernel(), named.Case("dtypes", 18, ((70, 0), (40, 10)), heads=1, head_dim=64)
    x = Inputs(case, kind)
    if x.arena.v_scale is None:
        x.arena = x.arena._replace(v=x.arena.v.half())
    for dtype in (torch.float16, torch.float32):
        with interpreted():
            ours = kernel.attention_8bit(*x.args, heads=1, dtype=dtype, config=kernel.Config(32, 64, 4, 1, False))
        want = attention_8bit(*x.args, heads=1, dtype=dtype)
        assert_no_worse(ours, want, x.exact(), 1.5, f"{kind} {dtype}")


def test_unaligned_rows_are_read_without_tma():
    kernel, case = triton_kernel(), named.Case("unaligned", 18, ((70, 0),), heads=1, head_dim=64, padding=7)
    x = Inputs(case, "int8")
    assert not kernel.aligned(x.arena.k) and kernel.aligned(x.queries.q)
    with interpreted():
        ours = kernel.attention_8bit(*x.args, heads=1, dtype=torch.bfloat16, config=kernel.Config(32, 64, 4, 1, True))
    assert_no_worse(ours, x.run(), x.exact(), 1.5, "unaligned")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the NaN
@kinds
def test_a_nan_is_not_hidden(kind):
    """As a scale it reaches the output, in the definition and in the kernel."""
    kernel, case = triton_kernel(), named.Case("nan", 18, ((70, 0),), heads=2, head_dim=64)
    for which in ("q", "k"):
        x = Inputs(case, kind)
        (x.queries.scale if which == "q" else x.arena.k_scale)[1, 0] = torch.nan
        with interpreted():
            ours = kernel.attention_8bit(
                *x.args, heads=2, dtype=torch.bfloat16, config=kernel.Config(32, 64, 4, 1, False)
            )
        for out in (ours, x.run()):
            rows = slice(0, 1) if which == "q" else slice(None)
            assert out[rows, 64:].isnan().all() and not out[:, :64].isnan().any()


# Norm, rotation, quantising


class Pass:
    """Inputs of qk_norm_rope_8bit, and outputs full of NaN or junk."""

    def __init__(self, rows=150, heads=2, head_dim=64, segments=3, dtype=torch.bfloat16, kind="int8", padding=0):
        self.rows, self.heads, self.inner = rows, heads, heads * head_dim
        self.key_dtype, fp8 = KINDS[kind]
        inner, tiles = self.inner, tiles_of(rows)
        angles = 100 * random(rows, head_dim // 2, seed=4)
        self.given = [
            random(rows, 3 * inner, dtype=dtype, seed=1),
            random(inner, seed=2),
            random(inner, seed=3),
            angles.cos(),
            angles.sin(),
            random(segments, inner, seed=5),
        ]
        k_scale = torch.full((heads, tiles + 3), torch.nan)[:, :tiles]
        v = torch.full((rows, inner + padding), torch.nan, dtype=dtype)[:, :inner]
        if fp8:
            v = torch.full((inner, (tiles + 1) * TILE), torch.nan).to(FP8)[:, : tiles * TILE]
        k = torch.full((rows, inner + padding), 99.0).to(self.key_dtype)[:, :inner]
        self.out = KeysValues8(k, k_scale, v, k_scale.clone() if fp8 else None)
        self.k_sums = torch.full((tiles, inner), torch.nan)

    def run(self):
        made = qk_norm_rope_8bit(*self.given, self.out, k_sums=self.k_sums, heads=self.heads, eps=EPS, backend="torch")
        return [*made, *self.out, self.k_sums]

    def interpret(self):
        kernel = triton_kernel()
        with interpreted():
            made = kernel.qk_norm_rope_8bit(*self.given, self.out, self.k_sums, heads=self.heads, eps=EPS)
        return [*made, *self.out, self.k_sums]


NAMES = ("q", "q_scale", "bias", "k", "k_scale", "v", "v_scale", "k_sums")


@kinds
def test_pass_against_norm_and_rotation(kind):
    """What comes out, scaled back, is what qk_norm_rope makes, to one rounding."""
    x = Pass(kind=kind)
    qkv, means = x.given[0], x.given[5]
    true_k, true_v = torch.empty(2, x.rows, x.inner, dtype=torch.float64)
    true_q = norm_reference.qk_norm_rope(*(t.double() for t in x.given[:5]), true_k, true_v, heads=x.heads, eps=EPS)
    q, q_scale, bias, *_, k_sums = x.run()
    step = 1 / 254 if x.key_dtype == torch.int8 else 1 / 28  # half a step of the largest
    by_head = true_q.unflatten(1, (x.heads, -1))
    got = q.float().unflatten(1, (x.heads, -1)) * q_scale.T[..., None]
    assert ((got - by_head).abs() <= by_head.abs().amax(-1, keepdim=True) * step * 1.01).all()
    restored, values = restore_features(x.out, means[0], torch.float32)
    assert (restored - true_k).abs().max() <= (true_k - means[0]).abs().max() * step * 1.01
    if x.out.v_scale is None:
        assert torch.equal(values, qkv[:, 2 * x.inner :].float())
    else:
        assert (values - true_v).abs().max() <= true_v.abs().max() / 28 * 1.01
        assert not x.out.v[:, x.rows :].float().any()
    torch.testing.assert_close(key_mean(k_sums, x.rows).double(), true_k.mean(0), rtol=0, atol=1e-5)
    wanted = reference.key_bias(true_q, means.double(), x.heads)
    torch.testing.assert_close(bias.double(), wanted, rtol=0, atol=1e-3)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(rows=128, heads=1, head_dim=128, segments=1),
        dict(rows=1, segments=2, padding=16),
        dict(rows=130, heads=3, dtype=torch.float32, padding=7),
        dict(rows=40, dtype=torch.float16),
    ],
    ids=["ragged", "one-tile", "one-row", "strided-fp32", "fp16"],
)
def test_kernel_of_the_pass(options, kind):
    x, y = Pass(kind=kind, **options), Pass(kind=kind, **options)
    for name, ours, want in zip(NAMES, x.interpret(), y.run()):
        if want is None:
            continue
        if name in ("q", "k") or ours.dtype == FP8:  # sums in another order may tip a tie
            same = ours.float() == want.float()
            assert same.float().mean() > 0.999, name
            steps = ours.view(torch.int8).int() - want.view(torch.int8).int()
            assert steps[~same].abs().max().item() <= 1 if not same.all() else True, name
        elif name == "v":
            assert torch.equal(ours, want)
        else:
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_sums_are_optional():
    x, y = Pass(), Pass()
    x.k_sums = None
    for ours, want in zip(x.interpret()[:-1], y.interpret()):
        assert (ours is None and want is None) or torch.equal(ours, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the NaN
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_shows_in_its_scale(bad):
    for run in (Pass.run, Pass.interpret):
        x = Pass(kind="fp8 values")
        x.given[0][140, 3] = bad  # q, head 0
        x.given[0][5, x.inner] = bad  # k
        x.given[0][5, 3 * x.inner - 1] = bad  # v, head 1
        made = dict(zip(NAMES, run(x)))
        # An infinity makes the norm of the whole row infinite, and the other heads zeros, as in any RMSNorm
        assert made["q_scale"][0, 140].isnan() and made["q_scale"][:, :140].isfinite().all()
        assert made["k_scale"][0, 0].isnan() and made["k_scale"][:, 1].isfinite().all()
        assert made["v_scale"][1, 0].isnan() and made["v_scale"].isnan().sum() == 1


def test_a_whole_layer_of_two_blocks():
    """Two blocks, one lends the other rows from the middle of a tile: the pass, the arena, attention; no cheating."""
    heads, head_dim, rows, borrowed = 2, 64, 200, 90
    inner = heads * head_dim
    start = rows - borrowed
    blocks = [Pass(rows=rows, heads=heads, head_dim=head_dim, segments=1, kind="fp8 values") for _ in range(2)]
    blocks[0].given[0] = random(rows, 3 * inner, dtype=torch.bfloat16, seed=8)
    blocks[1].given[5] = torch.cat([random(1, inner, seed=6), blocks[0].given[5]])  # another mean of its own
    blocks[0].run()
    share = lent(start, borrowed)
    spans = place([(rows, 0), (share.rows, share.skip)])
    arena = KeysValues8.empty(tiles_of(spans[-1]) * TILE, inner, heads, FP8)
    for tensor in arena:
        tensor.view(torch.int8).fill_(-1)  # as floats: NaN
    made = Pass(rows=rows, heads=heads, head_dim=head_dim, segments=2, kind="fp8 values")
    made.given = blocks[1].given
    made.out = arena.rows(0, rows)
    q, q_scale, bias, *_ = made.run()
    borrowed_rows = blocks[0].out.rows(share.first, share.rows)
    for target, source in zip(arena.rows(tiles_of(rows) * TILE, share.rows), borrowed_rows):
        target.copy_(source)
    ours = attention_8bit(Queries8(q, q_scale, bias), arena, spans, heads=heads)

    true = []
    for block in (blocks[0], made):
        true_k, true_v = torch.empty(2, rows, inner, dtype=torch.float64)
        true_q = norm_reference.qk_norm_rope(
            *(t.double() for t in block.given[:5]), true_k, true_v, heads=heads, eps=EPS
        )
        true.append((true_q, true_k, true_v))
    keys, values = (torch.cat([true[1][i], true[0][i][start:]]) for i in (1, 2))
    truth = attention_reference.attention(true[1][0], keys, values, heads=heads)
    assert rms(ours.double() - truth) < 0.045 * rms(truth)


# The way between 16 and 8 bits, and layouts


def test_features_there_and_back():
    k, v = random(2, 200, 128, seed=1)
    mean = random(128, seed=2)
    for fp8, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        made = quantise_features(k, v.to(dtype), mean, heads=2, fp8=fp8)
        keys, values = restore_features(made, mean, dtype)
        assert keys.dtype == values.dtype == dtype
        assert (restore_features(made, mean, torch.float32)[0] - k).abs().max() < (k - mean).abs().max() / 254 * 1.01
        assert (values - v).abs().max() < v.abs().max() / 28 * 1.01 if fp8 else torch.equal(values, v.to(dtype))
    empty = quantise_features(k[:0], v[:0], mean, heads=2, fp8=True)
    assert [list(t.shape) for t in empty] == [[0, 128], [2, 0], [128, 0], [2, 0]]


def test_lent_rows():
    assert lent(0, 200) == (0, 200, 0)
    assert lent(300, 100) == (256, 144, 44)
    for values in (torch.bfloat16, FP8):
        part = KeysValues8.empty(400, 12, 2, values).rows(256, 144)
        shapes = [None if t is None else list(t.shape) for t in part]
        assert shapes == [[144, 12], [2, 2], *([[12, 256], [2, 2]] if values == FP8 else [[144, 12], None])]
        assert [t.storage_offset() for t in part if t is not None] == [
            256 * 12,
            2,
            *([256, 2] if values == FP8 else [256 * 12]),
        ]
    assert place([(200, 0), (144, 44), (0, 0)]) == [0, 200, 300, 400, 512, 512]


# Arguments


X = Inputs(named.Case("good", 5, ((130, 0), (20, 5)), heads=2, head_dim=6), "int8")
V8 = Inputs(named.Case("good", 5, ((130, 0), (20, 5)), heads=2, head_dim=6), "fp8")
BAD = {  # parts of the arguments
    "batch dimension": (dict(q=X.queries.q[None]), "[1, 5, 12]"),
    "heads": (dict(heads=5), "heads=5"),
    "dtype of q": (dict(q=X.queries.q.float()), "torch.float32"),
    "k unlike q": (dict(k=X.arena.k.to(FP8)), "float8_e4m3fn"),
    "tiles": (dict(k_scale=X.arena.k_scale[:, :1]), "[2, 1]"),
    "heads of q_scale": (dict(scale=X.queries.scale[:1]), "[1, 5]"),
    "bias of another number of segments": (dict(bias=X.queries.bias[:0]), "[0, 2, 5]"),
    "fp32 values": (dict(v=X.arena.v.float()), "torch.float32"),
    "fp8 values, not transposed": (dict(v=V8.arena.v.T, v_scale=V8.arena.v_scale), "[384, 12]"),
    "fp8 values, no scale": (dict(v=V8.arena.v), "fp8 with v_scale"),
    "dtype": (dict(dtype=torch.float64), "torch.float64"),
    "odd spans": (dict(spans=[0, 3, 4]), "[0, 3, 4]"),
    "four segments": (dict(spans=[0, 1, 128, 129, 256, 256, 256, 256]), "1 to 3 segments"),
    "backwards": (dict(spans=[4, 3, 128, 140]), "0 <= start <= end"),
    "behind the end": (dict(spans=[0, 3, 128, 999]), "<= 384"),
    "no key": (dict(spans=[3, 3, 128, 128]), "at least one key"),
    "one tile for two": (dict(spans=[0, 100, 100, 120]), "share no tile"),
    "backend": (dict(backend="cpp"), "'auto' or one of triton, torch"),
    "triton on a CPU": (dict(backend="triton"), "not on cpu"),
}


def put(struct, change):
    """The struct with those of its fields that ``change`` has, which are taken from there."""
    return struct._replace(**{name: change.pop(name) for name in struct._fields if name in change})


@pytest.mark.parametrize("change, says", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(change, says):
    change = dict(change)
    queries, arena, spans = put(X.queries, change), put(X.arena, change), change.pop("spans", X.spans)
    attention_8bit(*X.args, heads=2)
    with pytest.raises(ValueError) as error:
        attention_8bit(queries, arena, spans, **{"heads": 2, **change})
    assert says in str(error.value)


P = Pass(rows=5, head_dim=6, kind="fp8 values")
ARGUMENTS = ("qkv", "norm_q", "norm_k", "cos", "sin", "means")
GOOD_PASS = dict(zip(ARGUMENTS, P.given)) | dict(out=P.out, k_sums=P.k_sums, heads=2, eps=EPS)
BAD_PASS = {
    "heads": (dict(heads=4), "heads=4"),
    "integers": (dict(qkv=P.given[0].int()), "torch.int32"),
    "norm_q": (dict(norm_q=P.given[1][:6]), "[6]"),
    "full-width cos": (dict(cos=torch.zeros(5, 6)), "[5, 6]"),
    "one mean": (dict(means=P.given[5][0]), "[12]"),
    "four means": (dict(means=torch.zeros(4, 12)), "1 to 3"),
    "float keys": (dict(k=torch.zeros(5, 12)), "torch.float32"),
    "tiles": (dict(k_scale=torch.zeros(2, 2)), "[2, 2]"),
    "values of another dtype": (dict(v=torch.zeros(5, 12), v_scale=None), "torch.float32"),
    "fp8 values as rows": (dict(v=torch.zeros(5, 12).to(FP8)), "[5, 12]"),
    "fp8 values alone": (dict(v_scale=None), "expected torch.bfloat16"),
    "k_sums": (dict(k_sums=torch.zeros(12)), "[12]"),
    "gradient": (dict(qkv=P.given[0].clone().requires_grad_()), "gradient"),
    "backend": (dict(backend="cuda"), "'cuda' is unknown"),
}


@pytest.mark.parametrize("change, says", BAD_PASS.values(), ids=BAD_PASS.keys())
def test_bad_arguments_of_the_pass_are_named(change, says):
    qk_norm_rope_8bit(**GOOD_PASS)
    change = dict(change)
    with pytest.raises(ValueError) as error:
        qk_norm_rope_8bit(**{**GOOD_PASS, "out": put(P.out, change), **change})
    assert says in str(error.value)


def test_where_triton_runs(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not family.absent(cuda, 128, fp8=False)
    assert "8.9" in family.absent(cuda, 128, fp8=True)
    assert "head_dim is 24" in family.absent(cuda, 24, fp8=False)
    with pytest.raises(ValueError, match="slow and exact"):  # "auto" does not run the definition on a GPU unasked
        family._choose("attention_8bit", cuda, "auto", 24, False)
    assert family._choose("attention_8bit", cuda, "auto", 64, False) == "triton"


# torch.library


@kinds
def test_opcheck(kind):
    x = Inputs(named.Case("opcheck", 5, ((130, 0), (20, 5)), heads=2, head_dim=6), kind, junk=False)
    p = Pass(rows=5, head_dim=6, kind=kind)
    for tensor in (*x.arena, *p.out, p.k_sums):
        if tensor is not None and tensor.dtype.itemsize > 1:  # opcheck compares; NaN equals nothing
            tensor.nan_to_num_(0.5)
    ops = torch.ops.dualparal
    # torch cannot compare two tensors in fp8, so opcheck's other tests end in an error of its own
    tests = {} if kind == "int8" else {"test_utils": "test_faketensor"}
    torch.library.opcheck(
        ops.attention_8bit.default, (*x.queries, *x.arena, x.spans, 2, torch.bfloat16, "torch"), **tests
    )
    torch.library.opcheck(ops.qk_norm_rope_8bit.default, (*p.given, *p.out, p.k_sums, 2, EPS, "torch"), **tests)


def test_schemas_say_what_is_written():
    written = [
        argument.name
        for argument in torch.ops.dualparal.qk_norm_rope_8bit.default._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    assert written == ["k", "k_scale", "v", "v_scale", "k_sums"]
    assert not torch.ops.dualparal.attention_8bit.default._schema.is_mutable


@kinds
def test_full_graph(kind):
    """The pass and attention after it in one graph: the arena is written before it is read."""

    def layer(p):
        queries = qk_norm_rope_8bit(*p.given, p.out, k_sums=p.k_sums, heads=2, eps=EPS)
        return attention_8bit(queries, p.out, [0, 5], heads=2) * 2

    plain, traced = (Pass(rows=5, head_dim=6, segments=1, kind=kind) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(layer(plain), compiled(traced))
    assert torch.equal(plain.out.k.float(), traced.out.k.float()) and torch.equal(plain.k_sums, traced.k_sums)


# Machine code


def sample():
    """What needs watching: `bench/attention_8bit_error.py --machine-code` compiles everything, in minutes."""
    kernel = triton_kernel()
    for arch in (80, 89, 90, 100, 120):
        for case in kernel.offline_cases(arch):
            wide = case.constexprs["D"] == 128
            if case.kernel is kernel.norm_rope_kernel:
                wanted = wide and (arch == 80 or (arch == 90 and "values fp8" in case.name))
            elif "keys fp8" in case.name:
                wanted = wide and arch in (90, 100)
            else:
                wanted = wide or arch == 90
            if wanted:
                yield pytest.param(arch, case, id=f"{arch} {case.name}")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("arch, case", list(sample()) if find_spec("triton") else [])
def test_machine_code(arch, case):
    """Nothing spills, and on Hopper the tensor cores work on while the next product is asked for."""
    report = case.compile(arch)
    assert not report.spills and not report.serialised
    assert report.stores.get(16)
    if case.kernel is triton_kernel().attention_kernel:
        assert (report.gmma > 0) == (arch == 90)
        assert (report.tma_loads > 0) == (arch in (90, 100))
        assert report.shared <= 99 * 1024 or arch in (80, 90, 100)
