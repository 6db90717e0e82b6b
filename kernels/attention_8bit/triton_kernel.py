"""8-bit attention, and the pass that feeds it, in Triton. The contract is in the package, checked there.

Attention walks all full blocks of keys of all segments in one loop that asks nothing, and then the ragged ends
of segments in a second one that masks: a branch around wgmma would make ptxas wait for each of them. One scale per
tile of keys is a scalar: with the query's scale it goes into the multiply-add in front of exp2, where bias and
running maximum already are, so that a score costs one conversion, one maximum, one multiply-add and one exp2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..offline import OfflineCase
from .reference import LIMITS, SMALLEST, TILE, KeysValues8, Queries8

LOG2E = 1.4426950408889634
LOG2_448 = tl.constexpr(8.807354922057604)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 to an integer, to nearest even


@triton.jit
def attend(
    acc, total, top, v_before, q, q_scale, bias, k, v, k_scale, v_scale, valid, MASKED: tl.constexpr, P8: tl.constexpr
):
    """One block of keys of one segment. acc: [BM, D]; total, top, q_scale, bias: [BM]; k: [BN, D]; v: [BN, D]."""
    x = tl.dot(q, tl.trans(k)).to(tl.float32)
    if MASKED:
        x = tl.where(valid[None, :], x, float("-inf"))
    scale = q_scale * k_scale
    new_top = tl.maximum(top, tl.max(x, 1) * scale + bias)
    shift = new_top - bias
    if P8:
        shift -= LOG2_448  # weights in [0, 448], the range of fp8; the factor is in total as well
    p = tl.math.exp2(x * scale[:, None] - shift[:, None])
    fade = tl.math.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    if P8:
        # acc is in units of v_scale. The product is added by float32 units: those of Hopper's fp8 tensor cores
        # keep too few bits for a sum over thousands of keys.
        acc = acc * (fade * (v_before / v_scale))[:, None] + tl.dot(p.to(v.dtype), v)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return acc, total, new_top, v_scale


# Not specialised: lengths and places change with the block and the request, and a kernel per divisibility of each would
# be compiled in the middle of a video. Distances of rows are: they are fixed by the model, and keep loads wide.
@triton.jit(
    do_not_specialize=["S", "start0", "end0", "start1", "end1", "start2", "end2", "k_scale_stride", "v_scale_stride"]
)
def attention_kernel(
    Q,  # [S, inner] int8 or fp8
    Q_SCALE,  # [heads, S]
    BIAS,  # [segments - 1, heads, S]
    K_BLOCKS,  # K again; with TMA its descriptor
    V_BLOCKS,
    K,  # [rows, inner] like Q
    V,  # [rows, inner] bf16 or fp16; with P8 [inner, rows] fp8
    K_SCALE,  # [heads, tiles]
    V_SCALE,  # [heads, tiles], with P8
    OUT,  # [S, inner]
    S,
    start0,
    end0,
    start1,
    end1,
    start2,
    end2,
    score_scale,  # log2(e) / sqrt(D)
    q_stride,
    k_stride,
    v_stride,
    o_stride,
    k_scale_stride,
    v_scale_stride,
    heads,
    SEGMENTS: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    P8: tl.constexpr,
):
    head = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BN)
    d = tl.arange(0, D)
    inside = rows < S
    wide_rows = rows.to(tl.int64)[:, None]
    q = tl.load(Q + wide_rows * q_stride + head * D + d[None, :], mask=inside[:, None], other=0.0)
    q_scale = tl.load(Q_SCALE + head * S + rows, mask=inside, other=1.0) * score_scale
    zero = tl.zeros([BM], tl.float32)
    bias1 = zero
    bias2 = zero
    if SEGMENTS > 1:
        bias1 = tl.load(BIAS + head * S + rows, mask=inside, other=0.0) * score_scale
    if SEGMENTS > 2:
        bias2 = tl.load(BIAS + (heads + head) * S + rows, mask=inside, other=0.0) * score_scale
    k_scales = K_SCALE + head * k_scale_stride
    v_scales = V_SCALE + head * v_scale_stride
    K += head * D
    wide_d = d.to(tl.int64)
    V += head.to(tl.int64) * D * (v_stride if P8 else 1)

    acc = tl.zeros([BM, D], tl.float32)
    total = zero
    top = tl.full([BM], float("-inf"), tl.float32)
    v_before = 1.0
    v_scale = 1.0

    # Full blocks: the first of each segment, and how many
    first0 = (start0 + BN - 1) // BN
    first1 = (start1 + BN - 1) // BN
    first2 = (start2 + BN - 1) // BN
    until0 = tl.maximum(end0 // BN - first0, 0)
    until1 = until0 + tl.maximum(end1 // BN - first1, 0)
    until2 = until1 + tl.maximum(end2 // BN - first2, 0)
    for i in tl.range(0, until2, num_stages=STAGES):
        block = i + tl.where(i < until0, first0, tl.where(i < until1, first1 - until0, first2 - until1))
        row = block * BN
        if TMA:
            k = K_BLOCKS.load([row, head * D])
        else:
            k = tl.load(K + row.to(tl.int64) * k_stride + (columns[:, None] * k_stride + d[None, :]))
        if P8:
            v_scale = tl.load(v_scales + row // TILE)
            if TMA:
                v = tl.trans(V_BLOCKS.load([head * D, row]))
            else:
                v = tl.trans(tl.load(V + row + (wide_d[:, None] * v_stride + columns[None, :])))
        elif TMA:
            v = V_BLOCKS.load([row, head * D])
        else:
            v = tl.load(V + row.to(tl.int64) * v_stride + (columns[:, None] * v_stride + d[None, :]))
        bias = zero
        if SEGMENTS > 1:
            bias = tl.where(i < until0, zero, tl.where(i < until1, bias1, bias2))
        acc, total, top, v_before = attend(
            acc, total, top, v_before, q, q_scale, bias, k, v, tl.load(k_scales + row // TILE), v_scale, inside,
            False, P8,
        )  # fmt: skip

    # Ragged ends: the block in which a segment starts and the one in which it ends, where they are not full
    head0 = ((start0 % BN != 0) & (start0 < end0)).to(tl.int32)
    head1 = ((start1 % BN != 0) & (start1 < end1)).to(tl.int32)
    head2 = ((start2 % BN != 0) & (start2 < end2)).to(tl.int32)
    tail0 = ((end0 % BN != 0) & (start0 < end0) & ((head0 == 0) | (start0 // BN != end0 // BN))).to(tl.int32)
    tail1 = ((end1 % BN != 0) & (start1 < end1) & ((head1 == 0) | (start1 // BN != end1 // BN))).to(tl.int32)
    tail2 = ((end2 % BN != 0) & (start2 < end2) & ((head2 == 0) | (start2 // BN != end2 // BN))).to(tl.int32)
    ends0 = head0 + tail0
    ends1 = ends0 + head1 + tail1
    for i in tl.range(0, ends1 + head2 + tail2, num_stages=1):
        start = tl.where(i < ends0, start0, tl.where(i < ends1, start1, start2))
        end = tl.where(i < ends0, end0, tl.where(i < ends1, end1, end2))
        at_start = ((i < head0) | ((i >= ends0) & (i < ends0 + head1)) | ((i >= ends1) & (i < ends1 + head2))).to(
            tl.int32
        )
        row = tl.where(at_start != 0, start // BN, end // BN) * BN
        valid = (row + columns >= start) & (row + columns < end)
        k = tl.load(
            K + row.to(tl.int64) * k_stride + (columns[:, None] * k_stride + d[None, :]),
            mask=valid[:, None],
            other=0.0,
        )
        if P8:
            v_scale = tl.load(v_scales + row // TILE)
            at = row + (wide_d[:, None] * v_stride + columns[None, :])
            v = tl.trans(tl.load(V + at, mask=valid[None, :], other=0.0))
        else:
            at = row.to(tl.int64) * v_stride + (columns[:, None] * v_stride + d[None, :])
            v = tl.load(V + at, mask=valid[:, None], other=0.0)
        bias = zero
        if SEGMENTS > 1:
            bias = tl.where(i < ends0, zero, tl.where(i < ends1, bias1, bias2))
        acc, total, top, v_before = attend(
            acc, total, top, v_before, q, q_scale, bias, k, v, tl.load(k_scales + row // TILE), v_scale, valid,
            True, P8,
        )  # fmt: skip

    factor = 1.0 / total
    if P8:
        factor *= v_before
    out = (acc * factor[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + wide_rows * o_stride + head * D + d[None, :], out, mask=inside[:, None])


@triton.jit
def split_pairs(x, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] -> even and odd columns, [ROWS, D // 2] each. Loads stay wide: they are split afterwards."""
    return tl.split(tl.reshape(x, (ROWS, D // 2, 2)))


@triton.jit
def to_8bit(x, KIND: tl.constexpr):
    """Rounds to nearest even; x is within the limits."""
    if KIND == tl.int8:  # noqa: SIM300
        return ((x + ROUND) - ROUND).to(tl.int8)
    else:
        return x.to(KIND)


@triton.jit(do_not_specialize=["S", "k_scale_stride", "v_scale_stride"])
def norm_rope_kernel(
    QKV,  # [S, 3 * inner]
    NORM_Q,
    NORM_K,  # [inner]
    COS,
    SIN,  # [S, D // 2]
    MEANS,  # [SEGMENTS, inner]
    Q,  # [S, inner] 8-bit
    Q_SCALE,  # [heads, S]
    BIAS,  # [SEGMENTS - 1, heads, S]
    K,  # [S, inner] like Q
    K_SCALE,  # [heads, tiles]
    K_SUMS,  # [tiles, inner]
    V,  # [S, inner] like QKV, or [inner, tiles * ROWS] fp8
    V_SCALE,  # [heads, tiles]
    S,
    heads,
    inner,
    k_stride,
    v_stride,
    k_scale_stride,
    v_scale_stride,
    eps,
    SEGMENTS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    V8: tl.constexpr,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One program: one tile of rows of q, k or v, all heads one after the other."""
    tile = tl.program_id(0)
    which = tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < S
    wide_rows = rows.to(tl.int64)[:, None]
    d = tl.arange(0, D)
    i = tl.arange(0, D // 2)
    KIND: tl.constexpr = K.dtype.element_ty
    source = QKV + wide_rows * (3 * inner) + which * inner + d[None, :]
    if which == 2:
        for head in range(0, heads):
            raw = tl.load(source + head * D, mask=inside[:, None], other=0.0)
            if V8:
                v = raw.to(tl.float32)
                v_largest = tl.maximum(tl.max(tl.max(tl.abs(v), 1), 0), SMALLEST)
                # Maxima lose a NaN, and so would 8-bit integers; 0 * NaN and 0 * infinity are NaN.
                v_scale = v_largest / 448.0 + 0.0 * tl.sum(tl.sum(v, 1), 0)
                tl.store(V_SCALE + head * v_scale_stride + tile, v_scale)
                made = tl.trans((v * (448.0 / v_largest)).to(V.dtype.element_ty))  # zeros behind the end
                tl.store(V + ((head * D + d).to(tl.int64)[:, None] * v_stride + rows[None, :]), made)
            else:
                tl.store(V + wide_rows * v_stride + head * D + d[None, :], raw, mask=inside[:, None])
    else:
        squares = tl.zeros([ROWS, D], tl.float32)
        for head in range(0, heads):
            x = tl.load(source + head * D, mask=inside[:, None], other=0.0).to(tl.float32)
            squares += x * x
        rstd = tl.math.rsqrt(tl.sum(squares, 1) / inner + eps)
        angles = wide_rows * (D // 2) + i[None, :]
        cos = tl.load(COS + angles, mask=inside[:, None], other=0.0)
        sin = tl.load(SIN + angles, mask=inside[:, None], other=0.0)
        NORM = NORM_Q
        if which == 1:
            NORM = NORM_K
        for head in range(0, heads):
            # The second look at these rows: they come from L2
            x = tl.load(source + head * D, mask=inside[:, None], other=0.0).to(tl.float32)
            x = x * rstd[:, None] * tl.load(NORM + head * D + d)[None, :]
            even, odd = split_pairs(x, ROWS, D)
            y_even = even * cos - odd * sin
            y_odd = even * sin + odd * cos
            if which == 0:
                mean_even = tl.load(MEANS + head * D + 2 * i)
                mean_odd = tl.load(MEANS + head * D + 2 * i + 1)
                for other in tl.static_range(1, SEGMENTS):
                    delta_even = tl.load(MEANS + other * inner + head * D + 2 * i) - mean_even
                    delta_odd = tl.load(MEANS + other * inner + head * D + 2 * i + 1) - mean_odd
                    bias = tl.sum(y_even * delta_even[None, :] + y_odd * delta_odd[None, :], 1)
                    tl.store(BIAS + ((other - 1) * heads + head) * S + rows, bias, mask=inside)
                by_row = tl.maximum(tl.max(tl.maximum(tl.abs(y_even), tl.abs(y_odd)), 1), SMALLEST)
                q_scale = by_row / LIMIT + 0.0 * tl.sum(y_even + y_odd, 1)
                tl.store(Q_SCALE + head * S + rows, q_scale, mask=inside)
                q = tl.reshape(tl.join(y_even, y_odd), (ROWS, D)) * (LIMIT / by_row)[:, None]
                tl.store(Q + wide_rows * inner + head * D + d[None, :], to_8bit(q, KIND), mask=inside[:, None])
            else:
                k = tl.reshape(tl.join(y_even, y_odd), (ROWS, D))
                if HAS_SUMS:
                    tl.store(K_SUMS + tile * inner + head * D + d, tl.sum(k, 0))  # rows outside are zero
                k = tl.where(inside[:, None], k - tl.load(MEANS + head * D + d)[None, :], 0.0)
                largest = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), SMALLEST)
                k_scale = largest / LIMIT + 0.0 * tl.sum(tl.sum(k, 1), 0)
                tl.store(K_SCALE + head * k_scale_stride + tile, k_scale)
                k = to_8bit(k * (LIMIT / largest), KIND)
                tl.store(K + wide_rows * k_stride + head * D + d[None, :], k, mask=inside[:, None])


class Config(NamedTuple):
    """The launch parameters of a kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool


def attention_config(arch: int) -> Config:
    """The configuration for an architecture (compute capability times ten): from offline compilation, not timed."""
    if 90 <= arch < 120:
        return Config(128, 128, 8, 2, True)
    return Config(128, 64, 8, 3 if arch in (80, 89) else 2, False)


def arch_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, ``device`` is the one on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def aligned(x: torch.Tensor) -> bool:
    """True when TMA can read it."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def descriptor(x: torch.Tensor, rows: int, columns: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def attention_8bit(
    queries: Queries8,
    keys_values: KeysValues8,
    spans: Sequence[int],
    *,
    heads: int,
    dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    """The op that the package describes, for head_dim 64 or 128, and values in bfloat16, float16 or fp8.

    Rows that TMA cannot read (not a multiple of 16 bytes apart) are read without it.
    """
    (q, q_scale, bias), (k, k_scale, v, v_scale) = queries, keys_values
    rows, inner = q.shape
    head_dim = inner // heads
    config = config or attention_config(arch_of(q.device))
    config = config._replace(tma=config.tma and aligned(k) and aligned(v))
    assert TILE % config.block_n == 0, config
    out = torch.empty((rows, inner), dtype=dtype, device=q.device)
    k_blocks = descriptor(k, config.block_n, head_dim) if config.tma else k
    v_block = (config.block_n, head_dim) if v_scale is None else (head_dim, config.block_n)
    v_blocks = descriptor(v, *v_block) if config.tma else v
    six = [*spans, *([0] * (6 - len(spans)))]
    scales = k_scale if v_scale is None else v_scale
    with on(q.device):
        attention_kernel[(triton.cdiv(rows, config.block_m), heads)](
            q,
            q_scale,
            bias,
            k_blocks,
            v_blocks,
            k,
            v,
            k_scale,
            scales,
            out,
            rows,
            *six,
            LOG2E * head_dim**-0.5,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            out.stride(0),
            k_scale.stride(0),
            scales.stride(0),
            heads,
            SEGMENTS=len(spans) // 2,
            D=head_dim,
            BM=config.block_m,
            BN=config.block_n,
            TILE=TILE,
            STAGES=config.num_stages,
            TMA=config.tma,
            P8=v_scale is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def qk_norm_rope_8bit(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    out: KeysValues8,
    k_sums: torch.Tensor | None,
    *,
    heads: int,
    eps: float,
) -> Queries8:
    """The op that the package describes, for head_dim 64 or 128."""
    rows, inner = qkv.shape[0], qkv.shape[1] // 3
    k, k_scale, v, v_scale = out
    q = torch.empty((rows, inner), dtype=k.dtype, device=qkv.device)
    q_scale = torch.empty((heads, rows), dtype=torch.float32, device=qkv.device)
    bias = torch.empty((len(means) - 1, heads, rows), dtype=torch.float32, device=qkv.device)
    some_scale, some_sums = k_scale if v_scale is None else v_scale, k_scale if k_sums is None else k_sums
    with on(qkv.device):
        norm_rope_kernel[(triton.cdiv(rows, TILE), 3)](
            qkv,
            norm_q,
            norm_k,
            cos,
            sin,
            means,
            q,
            q_scale,
            bias,
            k,
            k_scale,
            some_sums,
            v,
            some_scale,
            rows,
            heads,
            inner,
            k.stride(0),
            v.stride(0),
            k_scale.stride(0),
            some_scale.stride(0),
            eps,
            SEGMENTS=len(means),
            D=inner // heads,
            ROWS=TILE,
            HAS_SUMS=k_sums is not None,
            V8=v_scale is not None,
            LIMIT=LIMITS[k.dtype],
            SMALLEST=SMALLEST,
            num_warps=8,
        )
    return Queries8(q, q_scale, bias)


# What tests and reports compile, per architecture

OFFLINE: list[OfflineCase] = []  # of one configuration for all architectures: none here, see offline_cases
_NAMES = {"int8": "i8", "fp8": "fp8e4nv", "bf16": "bf16"}


def attention_case(keys: str, values: str, head_dim: int, config: Config, segments: int = 3) -> OfflineCase:
    """keys: "int8" or "fp8"; values: "bf16" or "fp8"."""
    k, v, block = _NAMES[keys], _NAMES[values], [config.block_n, head_dim]
    signature = dict.fromkeys(("Q", "K", "K_BLOCKS"), f"*{k}") | dict.fromkeys(("V", "V_BLOCKS"), f"*{v}")
    if config.tma:
        signature["K_BLOCKS"] = f"tensordesc<{k}{block}>"
        signature["V_BLOCKS"] = f"tensordesc<{v}{block[::-1] if values == 'fp8' else block}>"
    signature |= dict.fromkeys(("Q_SCALE", "BIAS", "K_SCALE", "V_SCALE"), "*fp32") | {
        "OUT": "*bf16",
        "score_scale": "fp32",
    }
    signature |= dict.fromkeys(("S", "start0", "end0", "start1", "end1", "start2", "end2", "heads"), "i32")
    signature |= dict.fromkeys(("k_scale_stride", "v_scale_stride"), "i32")
    signature |= dict.fromkeys(("q_stride", "k_stride", "v_stride", "o_stride"), "i32:16")
    constexprs = dict(
        SEGMENTS=segments, D=head_dim, BM=config.block_m, BN=config.block_n, TILE=TILE, STAGES=config.num_stages,
        TMA=config.tma, P8=values == "fp8",
    )  # fmt: skip
    return OfflineCase(
        f"attention, keys {keys}, values {values}, head_dim {head_dim}",
        attention_kernel,
        signature,
        constexprs,
        config.num_warps,
        config.num_stages,
    )


def norm_rope_case(values: str, head_dim: int) -> OfflineCase:
    """int8 keys, values as they are ("bf16") or in "fp8"."""
    fp8 = values == "fp8"
    signature = {"QKV": "*bf16", "V": "*fp8e4nv" if fp8 else "*bf16"} | dict.fromkeys(("Q", "K"), "*i8")
    signature |= dict.fromkeys(("NORM_Q", "NORM_K", "COS", "SIN", "MEANS", "Q_SCALE", "BIAS"), "*fp32")
    signature |= dict.fromkeys(("K_SCALE", "K_SUMS", "V_SCALE"), "*fp32")
    signature |= dict.fromkeys(("S", "heads", "k_scale_stride", "v_scale_stride"), "i32") | {"eps": "fp32"}
    signature |= dict.fromkeys(("inner", "k_stride", "v_stride"), "i32:16")
    constexprs = dict(SEGMENTS=3, D=head_dim, ROWS=TILE, HAS_SUMS=True, V8=fp8, LIMIT=127.0, SMALLEST=SMALLEST)
    name = f"qk_norm_rope, keys int8, values {values}, head_dim {head_dim}"
    return OfflineCase(name, norm_rope_kernel, signature, constexprs, num_warps=8)


def offline_cases(arch: int) -> list[OfflineCase]:
    """Every kernel as it would be launched there; fp8 from compute capability 8.9 on."""
    kinds = [("int8", "bf16"), ("int8", "fp8"), ("fp8", "fp8")] if arch >= 89 else [("int8", "bf16")]
    config = attention_config(arch)
    cases = [attention_case(*kind, head_dim, config) for kind in kinds for head_dim in (128, 64)]
    return cases + [norm_rope_case(values, head_dim) for _, values in kinds[:2] for head_dim in (128, 64)]
