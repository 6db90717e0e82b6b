"""Attention without a mask, over whatever keys the caller has: side by side, or in up to three places.

Softmax does not care about the order of keys, so a neighbour's keys may lie anywhere. ``attention`` takes one run of
keys; ``attention_segments`` takes several, which the Triton kernel reads where they are and every other backend
needs side by side. Backends:

| name | what it is |
|---|---|
| sdpa | torch.nn.functional.scaled_dot_product_attention, which picks a kernel of its own |
| cudnn, flash, efficient | that kernel of torch |
| flash-attn | the package of that name |
| hopper | ours in CUDA (``csrc/attention_hopper_kernel.h``), for compute capability 9.0 |
| triton | ours for every card (``triton_kernel``) |
| reference | the definition, in float32; needs memory for heads * S_q * S_k logits |

"auto" is a table (``table``), decided once per process and kind (``choice``).
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch

from .. import backend as backends
from . import choice, implementations
from .choice import BACKENDS
from .implementations import IMPLEMENTATIONS
from .reference import merge

__all__ = ["BACKENDS", "attention", "attention_segments", "merge"]

MAX_SEGMENTS = 3  # own, next, previous

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values; dualparal.models.keys_values.KeysValues is one


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, backend: str = ..., return_lse: Literal[True]
) -> Pair: ...
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, backend: str = "auto", return_lse: bool = False
) -> torch.Tensor | Pair:
    """``softmax(q k^T / sqrt(head_dim)) v`` for every head.

    Args:
        q: [S_q, inner], float32, bfloat16 or float16; inner = heads * head_dim.
        k, v: [S_k, inner] of q's dtype, S_k of 1 or more. Rows of all three are contiguous and may lie apart.
            For "triton" a distance that is a multiple of 16 elements; others are right, but slow. For "hopper"
            a multiple of 8, and tensors that begin at a multiple of 16 bytes; others are copied first.
        backend: "auto" or one of ``BACKENDS``.
        return_lse: also the log-sum-exp of the logits, for ``merge``.

    Returns:
        [S_q, inner], contiguous; with ``return_lse`` a pair of that and float32 [heads, S_q] (natural logarithm).

    Raises:
        ValueError: a shape, dtype, device or layout is not as above; the backend is unknown, or cannot run here.
    """
    if backends.recorded(q, k, v):
        if return_lse:
            return torch.ops.dualparal.attention_lse(q, k, v, heads, backend)
        return torch.ops.dualparal.attention(q, k, v, heads, backend)
    out, lse = _attention(q, k, v, heads, backend, return_lse)
    return out if lse is None else (out, lse)


@overload
def attention_segments(
    q: torch.Tensor,
    segments: Sequence[Pair],
    *,
    heads: int,
    backend: str = ...,
    return_lse: Literal[False] = ...,
    workspace: Pair | None = ...,
) -> torch.Tensor: ...
@overload
def attention_segments(
    q: torch.Tensor,
    segments: Sequence[Pair],
    *,
    heads: int,
    backend: str = ...,
    return_lse: Literal[True],
    workspace: Pair | None = ...,
) -> Pair: ...
def attention_segments(
    q: torch.Tensor,
    segments: Sequence[Pair],
    *,
    heads: int,
    backend: str = "auto",
    return_lse: bool = False,
    workspace: Pair | None = None,
) -> torch.Tensor | Pair:
    """``attention`` over the keys and values of all ``segments``, in this order.

    "triton" reads them where they lie. Its result has the bits of the concatenated one where the lengths are
    multiples of its tile, and differs by roundings where they are not. The others copy them side by side first.

    Args:
        segments: one to three pairs of keys and values, [S, inner] each, as for ``attention``; S may be 0 in all
            but one.
        workspace: keys and values of at least the total length, to copy into; new memory without. A segment that
            lies there already, at its place, is not copied; no other may overlap with it. torch.compile makes
            no use of it.

    Returns:
        As ``attention``.

    Raises:
        ValueError: as ``attention``; no segments, more than three, or a workspace that is too short.
    """
    if backends.recorded(q, *(tensor for pair in segments for tensor in pair)):
        keys, values = [k for k, _ in segments], [v for _, v in segments]
        if return_lse:
            return torch.ops.dualparal.attention_segments_lse(q, keys, values, heads, backend)
        return torch.ops.dualparal.attention_segments(q, keys, values, heads, backend)
    out, lse = _attention_segments(q, segments, heads, backend, return_lse, workspace)
    return out if lse is None else (out, lse)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: str, return_lse: bool
) -> implementations.Result:
    _check_once(q, k, v, heads)
    chosen = choice.choose(q.device, q.dtype, q.shape[1] // heads, k.shape[0], backend)
    if q.shape[0] == 0:
        return _nothing(q, heads, return_lse)
    return IMPLEMENTATIONS[chosen](q, k, v, heads, return_lse)


def _attention_segments(
    q: torch.Tensor,
    segments: Sequence[Pair],
    heads: int,
    backend: str,
    return_lse: bool,
    workspace: Pair | None = None,
) -> implementations.Result:
    total = _check_segments_once(q, segments, heads, workspace)
    chosen = choice.choose(q.device, q.dtype, q.shape[1] // heads, total, backend)
    if q.shape[0] == 0:
        return _nothing(q, heads, return_lse)
    if chosen == "triton":
        from . import triton_kernel

        return triton_kernel.attention(q, segments, heads, return_lse)
    k, v = _side_by_side(segments, total, workspace)
    return IMPLEMENTATIONS[chosen](q, k, v, heads, return_lse)


def _side_by_side(segments: Sequence[Pair], total: int, workspace: Pair | None) -> Pair:
    filled = [segment for segment in segments if segment[0].shape[0]]
    if len(filled) == 1:
        return filled[0][0], filled[0][1]
    if workspace is None:
        return torch.cat([k for k, _ in filled]), torch.cat([v for _, v in filled])
    k, v = (tensor[:total] for tensor in workspace)
    at = 0
    for pair in filled:
        rows = pair[0].shape[0]
        for source, target in zip(pair, (k[at : at + rows], v[at : at + rows])):
            if source.data_ptr() != target.data_ptr() or source.stride() != target.stride():
                target.copy_(source)
        at += rows
    return k, v


def _check_queries(q: torch.Tensor, heads: int) -> None:
    if q.ndim != 2 or heads < 1 or q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(f"q is {list(q.shape)} with heads={heads}; expected [S_q, heads * head_dim]")
    backends.check_dtype("q", q)
    backends.check("q", q, q.shape, q.dtype, q.device, row_stride=True)


def _check_pair(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, which: str) -> None:
    shape = (k.shape[0], q.shape[1])
    backends.check(f"k{which}", k, shape, q.dtype, q.device, row_stride=True)
    backends.check(f"v{which}", v, shape, q.dtype, q.device, row_stride=True)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> None:
    """Raises ValueError unless everything fits ``q``."""
    _check_queries(q, heads)
    if k.ndim != 2 or k.shape[0] == 0:
        raise ValueError(f"k is {list(k.shape)}; expected [S_k, {q.shape[1]}] with S_k of 1 or more")
    _check_pair(q, k, v, "")


def _check_segments(q: torch.Tensor, segments: Sequence[Pair], heads: int, workspace: Pair | None) -> int:
    """The number of keys, when everything fits ``q``. Raises ValueError."""
    _check_queries(q, heads)
    if not 1 <= len(segments) <= MAX_SEGMENTS:
        raise ValueError(f"there are {len(segments)} segments; use 1 to {MAX_SEGMENTS}")
    for index, (k, v) in enumerate(segments):
        if k.ndim != 2:
            raise ValueError(f"k of segment {index} is {list(k.shape)}; expected [S, {q.shape[1]}]")
        _check_pair(q, k, v, f" of segment {index}")
    total = sum(k.shape[0] for k, _ in segments)
    if total == 0:
        raise ValueError("all segments are empty; expected 1 key or more")
    if workspace is not None:
        for name, tensor in zip(("keys", "values"), workspace):
            rows = tensor.shape[0] if tensor.ndim else 0
            if rows < total:
                raise ValueError(f"{name} of the workspace have {rows} rows; expected {total} or more")
            shape = (rows, q.shape[1])
            backends.check(f"{name} of the workspace", tensor, shape, q.dtype, q.device, row_stride=True)
    return total


_check_once = backends.once_per_layout(_check)
_check_segments_once = backends.once_per_layout(_check_segments)


def _nothing(q: torch.Tensor, heads: int, return_lse: bool) -> implementations.Result:
    lse = q.new_empty(heads, 0, dtype=torch.float32) if return_lse else None
    return q.new_empty(q.shape), lse


# For torch.compile: opaque, so that the choice of a backend is not part of a graph. ---------------------------------


@torch.library.custom_op("dualparal::attention", mutates_args=())
def _attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: str) -> torch.Tensor:
    return _attention(q, k, v, heads, backend, False)[0]


@torch.library.custom_op("dualparal::attention_lse", mutates_args=())
def _attention_lse_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _both(_attention(q, k, v, heads, backend, True))


@torch.library.custom_op("dualparal::attention_segments", mutates_args=())
def _attention_segments_op(
    q: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], heads: int, backend: str
) -> torch.Tensor:
    return _attention_segments(q, list(zip(keys, values)), heads, backend, False)[0]


@torch.library.custom_op("dualparal::attention_segments_lse", mutates_args=())
def _attention_segments_lse_op(
    q: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], heads: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _both(_attention_segments(q, list(zip(keys, values)), heads, backend, True))


def _both(result: implementations.Result) -> Pair:
    out, lse = result
    assert lse is not None
    return out, lse


@_attention_op.register_fake
@_attention_segments_op.register_fake
def _fake(q: torch.Tensor, k: object, v: object, heads: int, backend: str) -> torch.Tensor:
    return q.new_empty(q.shape)


@_attention_lse_op.register_fake
@_attention_segments_lse_op.register_fake
def _fake_lse(q: torch.Tensor, k: object, v: object, heads: int, backend: str) -> Pair:
    return q.new_empty(q.shape), q.new_empty(heads, q.shape[0], dtype=torch.float32)
