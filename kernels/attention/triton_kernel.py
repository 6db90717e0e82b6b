"""Attention without a mask in Triton, over one run of keys and values or up to three that lie apart.

The algorithm is FlashAttention-2 (Dao, 2023): one program owns BLOCK_M queries of one head, walks the keys in tiles
of BLOCK_N with a running maximum and sum, and divides once at the end. Logits carry log2(e), so that exponentials
are single exp2 instructions. Products are of the input's dtype with float32 sums; everything else is float32.

No ``if`` stands around a loop: with guards ptxas gives up the asynchrony of wgmma on sm_90 for the whole function
(warning C7515). An empty segment and a segment without a ragged tail are loops of zero trips instead.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import backend as backends
from ..offline import ARCHS, OfflineCase, OfflineReport

LN2 = tl.constexpr(math.log(2))
MAX_SEGMENTS = 3
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Launch parameters; ``stages`` tiles of keys and values are in flight at once."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# The largest that compile without spills and fit the shared memory of a block: 163 KiB on sm_80, 99 KiB on sm_86,
# sm_89 and sm_120, 227 KiB on sm_90 and sm_100. Chosen from compiled code, not yet timed on any of these cards.
# The choice is fixed: an autotuner may change its mind between two runs, and then the bits of a video change.
TILES = {
    (80, 64): Tile(128, 64, 4, 3),
    (80, 128): Tile(128, 32, 8, 4),
    (89, 64): Tile(128, 64, 4, 3),
    (89, 128): Tile(128, 32, 8, 3),
    (90, 64): Tile(128, 128, 8, 3),
    (90, 128): Tile(128, 64, 8, 3),
    (100, 64): Tile(128, 128, 8, 3),
    (100, 128): Tile(128, 64, 8, 3),
    (120, 64): Tile(128, 64, 8, 3),
    (120, 128): Tile(128, 32, 8, 3),
}


def tile_for(architecture: int, head_dim: int) -> Tile:
    """The tile of a compute capability (86 for 8.6); cards without a row take that of a relative."""
    relatives = {86: 89, 87: 80, 103: 100}
    known = relatives.get(architecture, architecture)
    return TILES[known if (known, head_dim) in TILES else 120, head_dim]  # 120: fits the smallest shared memory


@triton.jit
def _tile(
    q,  # [BLOCK_M, HEAD_DIM]
    keys,
    values,  # pointers to the first row of the tile
    offsets_k,
    offsets_v,  # [BLOCK_N, HEAD_DIM]
    inside,  # [BLOCK_N], which rows exist; read with MASKED only
    top,
    total,  # [BLOCK_M], running maximum of the logits and sum of the weights
    out,  # [BLOCK_M, HEAD_DIM], float32
    scale,
    MASKED: tl.constexpr,
):
    if MASKED:
        k = tl.load(keys + offsets_k, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(keys + offsets_k)
    logits = tl.dot(q, tl.trans(k))
    if MASKED:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1) * scale)
    weights = tl.math.exp2(logits * scale - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)  # 0 at the first tile, where top is -inf
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None]
    if MASKED:
        v = tl.load(values + offsets_v, mask=inside[:, None], other=0.0)
    else:
        v = tl.load(values + offsets_v)
    out = tl.dot(weights.to(v.dtype), v, out)
    return new_top, total, out


@triton.jit
def _segment(
    q,
    top,
    total,
    out,
    keys,
    values,
    stride_k,
    stride_v,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, HEAD_DIM)
    offsets_k = rows[:, None] * stride_k + columns[None, :]
    offsets_v = rows[:, None] * stride_v + columns[None, :]
    whole = length // BLOCK_N * BLOCK_N
    for _ in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        top, total, out = _tile(q, keys, values, offsets_k, offsets_v, rows, top, total, out, scale, False)
        keys += BLOCK_N * stride_k
        values += BLOCK_N * stride_v
    for start in tl.range(whole, length, BLOCK_N, num_stages=1):  # the ragged tail: no trip, or one
        inside = rows < length - start
        top, total, out = _tile(q, keys, values, offsets_k, offsets_v, inside, top, total, out, scale, True)
    return top, total, out


# Lengths change with every request; a kernel per divisibility of each would be compiled in the middle of a video.
@triton.jit(do_not_specialize=["q_rows", "length_0", "length_1", "length_2"])
def attention_kernel(
    Q,
    K0,
    V0,
    K1,
    V1,
    K2,
    V2,
    OUT,
    LSE,
    stride_q,  # elements between rows
    stride_k0,
    stride_v0,
    stride_k1,
    stride_v1,
    stride_k2,
    stride_v2,
    stride_out,
    q_rows,
    length_0,
    length_1,
    length_2,
    scale,  # log2(e) / sqrt(head_dim)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr,  # 1 or 3
    WITH_LSE: tl.constexpr,
):
    # Programs of one head run together: they share its keys in the L2 cache.
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_DIM)
    inside = first + rows < q_rows
    at = head * HEAD_DIM

    Q += first.to(tl.int64) * stride_q + at
    q = tl.load(Q + rows[:, None] * stride_q + columns[None, :], mask=inside[:, None], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    top, total, out = _segment(
        q, top, total, out, K0 + at, V0 + at, stride_k0, stride_v0, length_0, scale, HEAD_DIM, BLOCK_N, STAGES
    )
    if SEGMENTS == 3:
        top, total, out = _segment(
            q, top, total, out, K1 + at, V1 + at, stride_k1, stride_v1, length_1, scale, HEAD_DIM, BLOCK_N, STAGES
        )
        top, total, out = _segment(
            q, top, total, out, K2 + at, V2 + at, stride_k2, stride_v2, length_2, scale, HEAD_DIM, BLOCK_N, STAGES
        )
    out = out / total[:, None]
    OUT += first.to(tl.int64) * stride_out + at
    tl.store(OUT + rows[:, None] * stride_out + columns[None, :], out.to(OUT.dtype.element_ty), mask=inside[:, None])
    if WITH_LSE:
        lse = (top + tl.math.log2(total)) * LN2
        tl.store(LSE + head.to(tl.int64) * q_rows + first + rows, lse, mask=inside)


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def attention(
    q: torch.Tensor,
    segments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    heads: int,
    with_lse: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launches the kernel; the arguments are checked by the public functions of this folder.

    Args:
        q: [S_q, inner], bfloat16 or float16, inner = heads * 64 or heads * 128, S_q of 1 or more.
        segments: one to three pairs of keys and values [S, inner]; S of 1 or more in at least one of them.
        tile: launch parameters; default: of the card.

    Returns:
        [S_q, inner] and, with ``with_lse``, float32 [heads, S_q]: log(sum(exp(logits))).
    """
    q_rows, inner = q.shape
    head_dim = inner // heads
    if tile is None:
        tile = tile_for(_architecture(q.device), head_dim)
    out = torch.empty(q_rows, inner, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, q_rows, dtype=torch.float32, device=q.device) if with_lse else None
    filled = [segment for segment in segments if segment[0].shape[0]]
    lengths = [keys.shape[0] for keys, _ in filled] + [0] * (MAX_SEGMENTS - len(filled))
    padded = [*filled, *filled[:1] * (MAX_SEGMENTS - len(filled))]  # never read: their length is 0
    tensors = [tensor for segment in padded for tensor in segment]
    with backends.current(q.device):
        attention_kernel[triton.cdiv(q_rows, tile.block_m), heads](
            q,
            *tensors,
            out,
            out if lse is None else lse,
            q.stride(0),
            *(tensor.stride(0) for tensor in tensors),
            out.stride(0),
            q_rows,
            *lengths,
            head_dim**-0.5 / math.log(2),
            HEAD_DIM=head_dim,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            STAGES=tile.stages,
            SEGMENTS=1 if len(filled) == 1 else MAX_SEGMENTS,
            WITH_LSE=with_lse,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,  # Triton 3.10 changes the default: it would change the bits
        )
    return out, lse


class _Offline(NamedTuple):
    """One launch as ``kernels.offline`` would compile it, with the tile of the architecture it is compiled for."""

    name: str
    dtype: str  # of Triton
    head_dim: int
    segments: int
    with_lse: bool
    archs: Sequence[int] = ARCHS

    def compile(self, arch: int) -> OfflineReport:
        tile = tile_for(arch, self.head_dim)
        pointers = ("Q", "K0", "V0", "K1", "V1", "K2", "V2", "OUT")
        strides = [name for name in attention_kernel.arg_names if name.startswith("stride")]
        lengths = ("q_rows", "length_0", "length_1", "length_2")
        case = OfflineCase(
            self.name,
            attention_kernel,
            {
                **dict.fromkeys(pointers, f"*{self.dtype}"),
                "LSE": "*fp32" if self.with_lse else f"*{self.dtype}",
                **dict.fromkeys(strides, "i32:16"),
                **dict.fromkeys(lengths, "i32"),
                "scale": "fp32",
            },
            {
                "HEAD_DIM": self.head_dim,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "STAGES": tile.stages,
                "SEGMENTS": self.segments,
                "WITH_LSE": self.with_lse,
            },
            tile.warps,
            tile.stages,
        )
        return case.compile(arch)


OFFLINE = [
    _Offline("arena-128", "bf16", 128, 1, False),
    _Offline("segments-128-lse", "bf16", 128, 3, True),
    _Offline("segments-64-lse", "fp16", 64, 3, True),
]
