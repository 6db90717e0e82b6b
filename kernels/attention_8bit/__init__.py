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
The mean to use is the block's own of the step before (from ``k_sums``, zeros at first): known before the pass
starts, so that qkv crosses memory once, and a function of the block and its step alone, so that the video does not
depend on the number of GPUs. It is part of a block's state. A mean after rotation does nothing for channels that
rotate fast; that is true of every scheme that smooths rotated keys.

**Layout.** An arena [rows, inner] holds one or up to three segments (own, next, previous), each from a row that is
a multiple of TILE on. ``spans`` says which rows count. Keys lent from the middle of a block are copied from the
start of their tile on, and the span starts behind it: ``lent`` has the rows, ``place`` the spans. fp8 values lie
transposed, [inner, rows]: tensor cores read 8-bit operands along the keys, and the kernel would otherwise turn
them byte by byte.

A NaN or an infinity in qkv makes its scale NaN, and so the output: integers would have hidden it.

Ideas from SageAttention (int8 queries and keys, smoothing of keys: arXiv:2410.02367), SageAttention2 (fp8 values,
sums outside of the tensor cores: 2411.10958), FlashAttention-3 (fp8 layouts: 2407.08608). All code is ours.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import backend as backends
from . import reference
from .reference import FP8, TILE, tiles_of

__all__ = [
    "FP8",
    "TILE",
    "Lent",
    "attention_8bit",
    "key_mean",
    "lent",
    "place",
    "qk_norm_rope_8bit",
    "quantise_features",
    "restore_keys",
    "restore_values",
    "tiles_of",
]

BACKENDS = ("triton", "torch")
HEAD_DIMS = (64, 128)  # of the Triton kernels
MAX_SEGMENTS = 3
KEY_DTYPES = (torch.int8, FP8)


class Lent(NamedTuple):
    """What to copy to lend rows of an arena: whole tiles of scales, and rows from the start of a tile on."""

    first: int  # row, a multiple of TILE
    rows: int  # from there on
    skip: int  # of them: the reader's span starts behind these
    tiles: slice  # of the scales

    @property
    def columns(self) -> slice:
        """Of transposed values: whole tiles."""
        return slice(self.first, self.first + tiles_of(self.rows) * TILE)


def lent(start: int, count: int) -> Lent:
    """What to copy of an arena so that a neighbour can read ``count`` rows from row ``start`` on."""
    first = start // TILE * TILE
    rows = start + count - first
    return Lent(first, rows, start - first, slice(first // TILE, first // TILE + tiles_of(rows)))


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
    k: torch.Tensor, v: torch.Tensor, mean: torch.Tensor, *, heads: int, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features stored in 16 bits, as this family reads them: for the step at which 8-bit attention begins.

    Args:
        k, v: [S, inner]. mean: [inner], what to take from the keys; any will do, the true one is best.

    Returns:
        keys [S, inner] of dtype, their scales [heads, tiles], fp8 values [inner, tiles * TILE], their scales.
    """
    return *reference.quantise_tiles(k.float() - mean, heads, dtype), *reference.quantise_values(v.float(), heads)


def restore_keys(k: torch.Tensor, k_scale: torch.Tensor, mean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys [S, inner] as 16-bit attention reads them: for the step at which 8-bit attention ends."""
    heads = len(k_scale)
    scale = k_scale.T.repeat_interleave(TILE, 0)[: len(k), :, None]  # [S, heads, 1]
    return (k.float().unflatten(1, (heads, -1)) * scale).flatten(1).add(mean).to(dtype)


def restore_values(v: torch.Tensor, v_scale: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """fp8 values [inner, columns] as [rows, inner] of ``dtype``."""
    scale = v_scale.repeat_interleave(TILE, 1)[:, None, :rows]  # [heads, 1, rows]
    return (v[:, :rows].float().unflatten(0, (len(v_scale), -1)) * scale).flatten(0, 1).T.to(dtype).contiguous()


def qk_norm_rope_8bit(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    k_out: torch.Tensor,
    k_scale: torch.Tensor,
    *,
    v_out: torch.Tensor | None = None,
    v8_out: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_sums: torch.Tensor | None = None,
    heads: int,
    eps: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qk_norm_rope (see there), with queries and keys in 8 bits: norm, rotation, smoothing, scales in one pass.

    Computed in float32 and rounded once, to nearest even.

    Args:
        qkv: [S, 3 * inner], q | k | v, float32, bfloat16 or float16, contiguous; inner = heads * head_dim.
        norm_q, norm_k: [inner], RMSNorm weights; float32, another dtype is converted on every call.
        cos, sin: [S, head_dim // 2] float32.
        means: [segments, inner] float32, one to three rows: what is taken from the own keys, and what was taken
            from those of each neighbour, in the order of the spans.
        k_out: [S, inner], int8 or float8_e4m3fn: rows of an arena from a multiple of TILE on, contiguous, any
            distance apart.
        k_scale: [heads, tiles_of(S)] float32, rows any distance apart: part of the arena's.
        v_out: [S, inner] of qkv's dtype, rows any distance apart: where values go as they are; or None.
        v8_out: [inner, tiles_of(S) * TILE] float8_e4m3fn, rows any distance apart: values, transposed, with zeros
            behind S; or None. It comes with v_scale, like k_scale.
        k_sums: [tiles_of(S), inner] float32: sums of the keys of each tile before smoothing; or None.
        backend: "auto" (Triton on a GPU, the definition on a CPU), "triton" (head_dim 64 or 128) or "torch".

    Returns:
        q [S, inner] of k_out's dtype, its scales [heads, S] float32, and bias [segments - 1, heads, S] float32.

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
    _check_key_dtype("k_out", k_out)
    backends.check("k_out", k_out, (rows, inner), k_out.dtype, device, row_stride=True)
    backends.check("k_scale", k_scale, (heads, tiles), torch.float32, device, row_stride=True)
    if v_out is not None:
        backends.check("v_out", v_out, (rows, inner), qkv.dtype, device, row_stride=True)
    if (v8_out is None) != (v_scale is None):
        raise ValueError("v8_out and v_scale come together: give both or neither")
    if v8_out is not None and v_scale is not None:
        backends.check("v8_out", v8_out, (inner, tiles * TILE), FP8, device, row_stride=True)
        backends.check("v_scale", v_scale, (heads, tiles), torch.float32, device, row_stride=True)
    if k_sums is not None:
        backends.check("k_sums", k_sums, (tiles, inner), torch.float32, device)
    fp8 = v8_out is not None or k_out.dtype == FP8
    chosen = _choose("qk_norm_rope_8bit", device, backend, inner // heads, fp8)
    run = torch.ops.dualparal.qk_norm_rope_8bit if _recorded(qkv) else _qk_norm_rope_8bit
    return run(qkv, norm_q, norm_k, cos, sin, means, k_out, k_scale, v_out, v8_out, v_scale, k_sums, heads, eps, chosen)


def attention_8bit(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    bias: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    spans: Sequence[int],
    *,
    v_scale: torch.Tensor | None = None,
    heads: int,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """``softmax((q k^T + bias) / sqrt(head_dim)) v`` for every head, over the rows of an arena that ``spans`` names.

    Scores and sums are float32; weights are rounded to the dtype of v. Rows outside of the spans may hold anything.

    Args:
        q: [S, inner] int8 or float8_e4m3fn, contiguous; inner = heads * head_dim.
        q_scale: [heads, S] float32. bias: [segments - 1, heads, S] float32, added to the scores of the second and
            third segment before they are scaled by sqrt(head_dim).
        k: [rows, inner] of q's dtype. k_scale: [heads, tiles_of(rows)] float32.
        v: [rows, inner], bfloat16 or float16; or with v_scale (like k_scale) [inner, rows] float8_e4m3fn.
            Rows of k, v and scales are contiguous and may lie apart.
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
    if q.ndim != 2 or heads < 1 or q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(f"q is {list(q.shape)} with heads={heads}; expected [S, heads * head_dim]")
    if k.ndim != 2 or v.ndim != 2:
        raise ValueError(
            f"k is {list(k.shape)} and v {list(v.shape)}; expected [rows, {q.shape[1]}], no batch dimension"
        )
    rows, inner, device = k.shape[0], q.shape[1], q.device
    _check_spans(spans, rows)
    segments = len(spans) // 2
    _check_key_dtype("q", q)
    backends.check("q", q, q.shape, q.dtype, device)
    backends.check("q_scale", q_scale, (heads, len(q)), torch.float32, device)
    backends.check("bias", bias, (segments - 1, heads, len(q)), torch.float32, device)
    backends.check("k", k, (rows, inner), q.dtype, device, row_stride=True)
    backends.check("k_scale", k_scale, (heads, tiles_of(rows)), torch.float32, device, row_stride=True)
    if v_scale is not None:
        backends.check("v", v, (inner, rows), FP8, device, row_stride=True)
        backends.check("v_scale", v_scale, (heads, tiles_of(rows)), torch.float32, device, row_stride=True)
    else:
        if v.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"v is {v.dtype}; expected torch.bfloat16 or torch.float16, or fp8 with v_scale")
        backends.check("v", v, (rows, inner), v.dtype, device, row_stride=True)
    if dtype not in backends.DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, backends.DTYPES))}")
    fp8 = v_scale is not None or q.dtype == FP8
    chosen = _choose("attention_8bit", device, backend, inner // heads, fp8)
    run = torch.ops.dualparal.attention_8bit if _recorded(q) else _attention_8bit
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
    """Is this call one to record, by torch.compile or torch.export? Others need not pay for the dispatcher."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def _check_key_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in KEY_DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, KEY_DTYPES))}")


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


def _qk_norm_rope_8bit(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    k_out: torch.Tensor,
    k_scale: torch.Tensor,
    v_out: torch.Tensor | None,
    v8_out: torch.Tensor | None,
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
    return run(
        qkv, norm_q, norm_k, cos, sin, means, k_out, k_scale, v_out, v8_out, v_scale, k_sums, heads=heads, eps=eps
    )


_qk_norm_rope_8bit_op = torch.library.custom_op(
    "dualparal::qk_norm_rope_8bit",
    _qk_norm_rope_8bit,
    mutates_args=("k_out", "k_scale", "v_out", "v8_out", "v_scale", "k_sums"),
)


@_qk_norm_rope_8bit_op.register_fake
def _(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    k_out: torch.Tensor,
    k_scale: torch.Tensor,
    v_out: torch.Tensor | None,
    v8_out: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    k_sums: torch.Tensor | None,
    heads: int,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, inner = qkv.shape[0], qkv.shape[1] // 3
    return (
        k_out.new_empty((rows, inner)),
        k_scale.new_empty((heads, rows)),
        k_scale.new_empty((means.shape[0] - 1, heads, rows)),
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
    if backend == "triton":
        from . import triton_kernel

        return triton_kernel.attention_8bit(q, q_scale, bias, k, k_scale, v, v_scale, spans, heads=heads, dtype=dtype)
    return reference.attention_8bit(
        q, q_scale, bias, k, k_scale, v, v_scale, spans, heads=heads, dtype=dtype
    ).contiguous()


_attention_8bit_op = torch.library.custom_op("dualparal::attention_8bit", _attention_8bit, mutates_args=())


@_attention_8bit_op.register_fake
def _(
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
    return q.new_empty(q.shape, dtype=dtype)
