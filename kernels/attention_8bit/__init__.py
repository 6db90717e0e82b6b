"""Attention over 8-bit keys, and the norm-and-rotate pass that makes them. Off by default everywhere.

Two kinds. "int8": queries and keys in int8, values and weights in bfloat16 or float16: 1.5 to 4 times the error
of bfloat16 on normed queries and keys, half of the memory of keys. "fp8": values and weights in fp8 (e4m3)
besides: up to 2.6 % more error and twice the rate of tensor cores (docs/attention-8bit.md has the figures). Keys
may be e4m3, too, for cards without int8 units; int8 is the more accurate of the two.

**Scales.** One per query and head: a row of the score matrix has its own factor for nothing. Keys: one per TILE
tokens and head. In front of exp2 it is then a scalar, and a score costs one multiply-add; one scale per token
would cost one more multiplication per score, which by instruction count is 5 to 8 % of the kernel (not timed),
and lowers the error by a sixth. 64 or 128 tokens differ by 2 %, and 128 lets the kernel take 128 keys at a time.
fp8 values have a scale per TILE and head for their range only: e4m3 is a floating type, its error does not
depend on the scale, and one per channel measured the same. Weights are scaled by 448, the range of e4m3, against
the running maximum: a block of keys whose weights are all small rounds them in the relative precision of e4m3
down to 2^-6 / 448 of the largest weight, which no scale of its own would improve.

**Smoothing.** Keys share a large common part in some channels, which costs bits and means nothing: a constant
vector taken from all keys changes all scores of a query by the same number, and softmax drops it. But the keys of
a neighbour come from another block, with another constant. So: whoever makes keys takes away a mean of its choice
and says which, and it need not be the true one. For a query q, own mean m and a neighbour's mean n, the neighbour's
scores differ from the own ones by q . (n - m): one number per query and neighbour, the ``bias``, which
qk_norm_rope_8bit makes from the queries before they are rounded. This is exact for any means (a test says so in
float64), costs 1 / keys of the product of queries and keys, and no neighbour has to be read again or re-centred.
The mean to use is the block's own of the step before (from ``k_sums``): known before the pass starts, so that qkv
crosses memory once (at a block's first step twice), and a function of the block and its step alone, so that the video
does not depend on the number of GPUs. It is part of a block's state. A mean after rotation does nothing for channels
that rotate fast; that is true of every scheme that smooths rotated keys.

**Layout.** An arena (``KeysValues8``) holds one or up to three segments (own, next, previous), each from a row that
is a multiple of TILE on. ``spans`` says which rows count. Keys lent from the middle of a block are copied from the
start of their tile on, and the span starts behind it: ``lent`` has the rows, ``KeysValues8.rows`` the tensors,
``place`` the spans. fp8 values lie transposed, [inner, rows]: tensor cores read 8-bit operands along the keys, and the
kernel would otherwise turn them byte by byte.

A NaN or an infinity in qkv makes its scale NaN, and so the output: integers would have hidden it.

Ideas from SageAttention (int8 queries and keys, smoothing of keys: arXiv:2410.02367), SageAttention2 (fp8 values,
sums outside of the tensor cores: 2411.10958), FlashAttention-3 (fp8 layouts: 2407.08608). All code is ours.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import backend as backends
from . import reference
from .reference import FP8, TILE, KeysValues8, Queries8, tiles_of

__all__ = [
    "FP8",
    "TILE",
    "KeysValues8",
    "Lent",
    "Queries8",
    "attention_8bit",
    "key_mean",
    "lent",
    "place",
    "qk_norm_rope_8bit",
    "quantise_features",
    "restore_features",
    "tiles_of",
]

BACKENDS = ("triton", "torch")
HEAD_DIMS = (64, 128)  # of the Triton kernels
MAX_SEGMENTS = 3
KEY_DTYPES = (torch.int8, FP8)


class Lent(NamedTuple):
    """The rows of an arena to copy to lend some of them: ``arena.rows(first, rows)``."""

    first: int  # row, a multiple of TILE
    rows: int  # from there on
    skip: int  # of them: the reader's span starts behind these


def lent(start: int, count: int) -> Lent:
    """The share of an arena to copy so that a neighbour can read ``count`` rows from row ``start`` on."""
    first = start // TILE * TILE
    return Lent(first, start + count - first, start - first)


def place(segments: Sequence[tuple[int, int]]) -> list[int]:
    """Lays segments one after the other, each from a multiple of TILE on.

    Args:
        segments: (rows, skip) of each; skip of the rows are there for their tile only.

    Returns:
        spans: the first row that counts and the one behind the last, of each segment. The arena needs
        ``tiles_of(spans[-1]) * TILE`` rows.
    """
    spans, at = [], 0
    for rows, skip in segments:
        spans += [at + skip, at + rows]
        at += tiles_of(rows) * TILE
    return spans


def key_mean(k_sums: torch.Tensor, rows: int) -> torch.Tensor:
    """The mean of keys, [inner], from the sums that qk_norm_rope_8bit leaves, always in the same order."""
    return k_sums.sum(0) / rows


def quantise_features(
    k: torch.Tensor,
    v: torch.Tensor,
    mean: torch.Tensor,
    *,
    heads: int,
    fp8: bool = False,
    dtype: torch.dtype = torch.int8,
) -> KeysValues8:
    """Features stored in 16 bits, as this family reads them: for the step at which 8-bit attention begins.

    Args:
        k, v: [S, inner]. mean: [inner], what to take from the keys; any will do, the true one is best.
        fp8: values, too; otherwise they stay as they are. dtype: of the keys.
    """
    keys, k_scale = reference.quantise_tiles(k.float() - mean, heads, dtype)
    return KeysValues8(keys, k_scale, *(reference.quantise_values(v.float(), heads) if fp8 else (v, None)))


def restore_features(lent: KeysValues8, mean: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [S, inner] as 16-bit attention reads them: for the step at which 8-bit attention ends."""
    rows, heads = len(lent.k), len(lent.k_scale)

    def widened(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # x: [S, inner]
        by_row = scale.T.repeat_interleave(TILE, 0)[:rows, :, None]  # [S, heads, 1]
        return (x.float().unflatten(1, (heads, -1)) * by_row).flatten(1)

    values = lent.v if lent.v_scale is None else widened(lent.v[:, :rows].T, lent.v_scale)
    return widened(lent.k, lent.k_scale).add(mean).to(dtype), values.to(dtype)


def qk_norm_rope_8bit(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    out: KeysValues8,
    *,
    k_sums: torch.Tensor | None = None,
    heads: int,
    eps: float,
    backend: str = "auto",
) -> Queries8:
    """qk_norm_rope (see there), with queries and keys in 8 bits: norm, rotation, smoothing, scales in one pass.

    Computed in float32 and rounded once, to nearest even.

    Args:
        qkv: [S, 3 * inner], q | k | v, float32, bfloat16 or float16, contiguous; inner = heads * head_dim.
        norm_q, norm_k: [inner], RMSNorm weights; float32, another dtype is converted on every call.
        cos, sin: [S, head_dim // 2] float32.
        means: [segments, inner] float32, one to three rows: what is taken from the own keys, and what was taken
            from those of each neighbour, in the order of the spans.
        out: S rows of an arena, written: keys; values, of qkv's dtype as they are, or fp8, transposed, with zeros
            behind S. Rows are contiguous, any distance apart.
        k_sums: [tiles_of(S), inner] float32, written: sums of the keys of each tile before smoothing; or None.
        backend: "auto" (Triton on a GPU, the definition on a CPU), "triton" (head_dim 64 or 128) or "torch".

    Returns:
        The queries, q of the keys' dtype.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or the backend cannot run.
    """
    if qkv.ndim != 2 or heads < 1 or qkv.shape[1] == 0 or qkv.shape[1] % (6 * heads):
        raise ValueError(
            f"qkv is {list(qkv.shape)} with heads={heads}; expected [S, 3 * heads * head_dim] with head_dim even"
        )
    rows, inner, device = qkv.shape[0], qkv.shape[1] // 3, qkv.device
    tiles = tiles_of(rows)
    norm_q, norm_k = norm_q.float(), norm_k.float()
    backends.check_dtype("qkv", qkv)
    backends.check("qkv", qkv, qkv.shape, qkv.dtype, device)
    for name, weight in (("norm_q", norm_q), ("norm_k", norm_k)):
        backends.check(name, weight, (inner,), torch.float32, device)
    for name, table in (("cos", cos), ("sin", sin)):
        backends.check(name, table, (rows, inner // heads // 2), torch.float32, device)
    if means.ndim != 2 or not 1 <= len(means) <= MAX_SEGMENTS:
        raise ValueError(
            f"means is {list(means.shape)}; expected [segments, {inner}] with 1 to {MAX_SEGMENTS} segments"
        )
    backends.check("means", means, (len(means), inner), torch.float32, device)
    _check_keys_values(out, rows, inner, heads, out.k.dtype, qkv.dtype, device)
    if k_sums is not None:
        backends.check("k_sums", k_sums, (tiles, inner), torch.float32, device)
    fp8 = out.v_scale is not None or out.k.dtype == FP8
    chosen = _choose("qk_norm_rope_8bit", device, backend, inner // heads, fp8)
    run = torch.ops.dualparal.qk_norm_rope_8bit if _recorded(qkv) else _qk_norm_rope_8bit
    return Queries8(*run(qkv, norm_q, norm_k, cos, sin, means, *out, k_sums, heads, eps, chosen))


def attention_8bit(
    queries: Queries8,
    keys_values: KeysValues8,
    spans: Sequence[int],
    *,
    heads: int,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """``softmax((q k^T + bias) / sqrt(head_dim)) v`` for every head, over the rows of an arena that ``spans`` names.

    Scores and sums are float32; weights are rounded to the dtype of v. Rows outside of the spans may hold anything.

    Args:
        queries: q [S, inner] int8 or float8_e4m3fn, contiguous; inner = heads * head_dim. The bias is added to the
            scores of the second and third segment before they are scaled by sqrt(head_dim).
        keys_values: of an arena; keys of q's dtype, values in bfloat16 or float16, or fp8: whole tiles, then.
            Rows of all its tensors are contiguous and may lie apart.
        spans: start and end of one to three segments, as ``place`` makes them: ascending, in separate tiles, empty
            ones allowed (their start is their end), at least one row in all.
        dtype: of the result, bfloat16, float16 or float32.
        backend: "auto" (Triton on a GPU, the definition on a CPU), "triton" (head_dim 64 or 128; fp8 from compute
            capability 8.9 on) or "torch" (the definition; needs memory for heads * S * rows scores).

    Returns:
        [S, inner], contiguous.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or the backend cannot run.
    """
    q, q_scale, bias = queries
    k, v = keys_values.k, keys_values.v
    if q.ndim != 2 or heads < 1 or q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(f"q is {list(q.shape)} with heads={heads}; expected [S, heads * head_dim]")
    if k.ndim != 2 or v.ndim != 2:
        raise ValueError(
            f"k is {list(k.shape)} and v {list(v.shape)}; expected [rows, {q.shape[1]}], no batch dimension"
        )
    rows, inner, device = k.shape[0], q.shape[1], q.device
    _check_spans(spans, rows)
    backends.check("q", q, q.shape, q.dtype, device)
    backends.check("q_scale", q_scale, (heads, len(q)), torch.float32, device)
    backends.check("bias", bias, (len(spans) // 2 - 1, heads, len(q)), torch.float32, device)
    if keys_values.v_scale is None and v.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"v is {v.dtype}; expected torch.bfloat16 or torch.float16, or fp8 with v_scale")
    _check_keys_values(keys_values, rows, inner, heads, q.dtype, v.dtype, device)
    if dtype not in backends.DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, backends.DTYPES))}")
    fp8 = keys_values.v_scale is not None or q.dtype == FP8
    chosen = _choose("attention_8bit", device, backend, inner // heads, fp8)
    run = torch.ops.dualparal.attention_8bit if _recorded(q) else _attention_8bit
    _, k_scale, _, v_scale = keys_values
    return run(q, q_scale, bias, k, k_scale, v, v_scale, list(spans), heads, dtype, chosen)


def absent(device: torch.device, head_dim: int, fp8: bool) -> str:
    """Why the Triton kernels cannot run there; empty when they can."""
    if device.type != "cuda":
        return f"it takes tensors on cuda, not on {device.type}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, and it knows {' and '.join(map(str, HEAD_DIMS))}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import ({error})"
    needed = (8, 9) if fp8 else (8, 0)
    if torch.cuda.get_device_capability(device) < needed:
        return f"{'fp8' if fp8 else 'it'} needs compute capability {needed[0]}.{needed[1]}, see {device}"
    return ""


def _choose(op: str, device: torch.device, backend: str, head_dim: int, fp8: bool) -> str:
    """Nobody wants the definition on a GPU by accident: "auto" raises there rather than fall back."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: backend={backend!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return "torch"
    reason = absent(device, head_dim, fp8)
    if reason:
        raise ValueError(f"{op}: backend={backend!r} cannot run: {reason}; or use backend='torch', slow and exact")
    return "triton"


def _recorded(tensor: torch.Tensor) -> bool:
    """True for a call that torch.compile or torch.export records. Others need not pay for the dispatcher."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def _check_keys_values(
    given: KeysValues8,
    rows: int,
    inner: int,
    heads: int,
    keys: torch.dtype,
    values: torch.dtype,
    device: torch.device,
) -> None:
    """keys, values: the dtypes expected of them; of values unless they are fp8."""
    if keys not in KEY_DTYPES:
        raise ValueError(f"keys are {keys}; expected {' or '.join(map(str, KEY_DTYPES))}")
    scales = (heads, tiles_of(rows))
    backends.check("k", given.k, (rows, inner), keys, device, row_stride=True)
    backends.check("k_scale", given.k_scale, scales, torch.float32, device, row_stride=True)
    if given.v_scale is None:
        backends.check("v", given.v, (rows, inner), values, device, row_stride=True)
    else:
        backends.check("v", given.v, (inner, scales[1] * TILE), FP8, device, row_stride=True)
        backends.check("v_scale", given.v_scale, scales, torch.float32, device, row_stride=True)


def _check_spans(spans: Sequence[int], rows: int) -> None:
    pairs = list(zip(spans[::2], spans[1::2]))
    problem = ""
    if len(spans) % 2 or not 1 <= len(pairs) <= MAX_SEGMENTS:
        problem = f"a start and an end for each of 1 to {MAX_SEGMENTS} segments"
    elif any(not 0 <= start <= end <= rows for start, end in pairs):
        problem = f"0 <= start <= end <= {rows}, the rows of k"
    elif all(start == end for start, end in pairs):
        problem = "at least one key"
    else:
        filled = [(start, end) for start, end in pairs if start < end]
        if any(tiles_of(end) * TILE > start for (_, end), (start, _) in itertools.pairwise(filled)):
            problem = f"ascending segments that share no tile of {TILE} rows"
    if problem:
        raise ValueError(f"spans={list(spans)}: expected {problem}; dualparal.kernels.attention_8bit.place makes them")


# Below the dispatcher tensors come one by one: what torch.compile and torch.export record.


def _qk_norm_rope_8bit(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor | None,
    k_sums: torch.Tensor | None,
    heads: int,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    run = reference.qk_norm_rope_8bit
    if backend == "triton" and len(qkv) > 0:
        from . import triton_kernel

        run = triton_kernel.qk_norm_rope_8bit
    out = KeysValues8(k, k_scale, v, v_scale)
    return run(qkv, norm_q, norm_k, cos, sin, means, out, k_sums, heads=heads, eps=eps)


_qk_norm_rope_8bit_op = torch.library.custom_op(
    "dualparal::qk_norm_rope_8bit", _qk_norm_rope_8bit, mutates_args=("k", "k_scale", "v", "v_scale", "k_sums")
)


@_qk_norm_rope_8bit_op.register_fake
def _(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    *rest: object,
) -> Queries8:
    heads, rows = k_scale.shape[0], qkv.shape[0]
    return Queries8(
        k.new_empty(k.shape), k_scale.new_empty((heads, rows)), k_scale.new_empty((means.shape[0] - 1, heads, rows))
    )


def _attention_8bit(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    bias: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor | None,
    spans: Sequence[int],
    heads: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    if len(q) == 0:
        return q.new_empty(q.shape, dtype=dtype)
    queries, keys_values = Queries8(q, q_scale, bias), KeysValues8(k, k_scale, v, v_scale)
    if backend == "triton":
        from . import triton_kernel

        return triton_kernel.attention_8bit(queries, keys_values, spans, heads=heads, dtype=dtype)
    return reference.attention_8bit(queries, keys_values, spans, heads=heads, dtype=dtype).contiguous()


_attention_8bit_op = torch.library.custom_op("dualparal::attention_8bit", _attention_8bit, mutates_args=())


@_attention_8bit_op.register_fake
def _(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=rest[-2])
