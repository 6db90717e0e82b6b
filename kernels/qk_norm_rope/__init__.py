"""From the QKV product to what attention reads, in one pass: norm, rotation, and keys and values in place.

WanAttnProcessor of diffusers (models/transformers/transformer_wan.py) does the same in a dozen passes. Here
keys and values go straight to their rows of an arena, beside those of the neighbours, and those that a neighbour
will read to the store of features as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import backend as backends
from . import reference
from .reference import Lend, rotate

__all__ = ["Lend", "qk_norm_rope", "rotate"]

MAX_LENDS = 2  # a block has two neighbours


def qk_norm_rope(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    *,
    heads: int,
    eps: float,
    lends: Sequence[Lend] = (),
    backend: str = "auto",
) -> torch.Tensor:
    """Normalises q and k over all heads, rotates them, writes k and v in place and returns q.

    Computed in float32 and rounded once at the end. Pairs (2i, 2i+1) of each head rotate by the angles. Rows that
    are lent go to their stores in the same pass: nothing reads them back.

    Args:
        qkv: [S, 3 * inner], q | k | v, float32, bfloat16 or float16, contiguous; inner = heads * head_dim.
        norm_q, norm_k: [inner], RMSNorm weights; float32, another dtype is converted on every call.
        cos, sin: [S, head_dim // 2] float32.
        k_out, v_out: [S, inner] of qkv's dtype; contiguous rows, any distance between rows: slices of an
            arena. They must not overlap qkv or each other.
        heads: head_dim = inner / heads is even.
        lends: up to two. Their stores are contiguous, of qkv's dtype, and overlap nothing else here; the rows lent
            may overlap. On a GPU a slot's number is known to the device alone, so nothing is raised here when the
            store has no such slot: "cuda" stops with a trap, "torch" with an assertion, "triton" writes elsewhere.
        backend: "auto", "cpp", "cuda", "triton" or "torch".

    Returns:
        q, [S, inner], like qkv.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, the backend cannot run, or on a CPU a slot is
            not one of its store's.
    """
    stores = [tensor for lend in lends for tensor in (lend.keys, lend.values)]
    if backends.recorded(qkv, norm_q, norm_k, cos, sin, k_out, v_out, *stores):
        columns = [list(column) for column in zip(*lends)] or [[]] * len(Lend._fields)
        return torch.ops.dualparal.qk_norm_rope(
            qkv, norm_q, norm_k, cos, sin, k_out, v_out, *columns, heads, eps, backend
        )
    inputs = _Inputs(qkv, norm_q.float(), norm_k.float(), cos, sin, k_out, v_out, lends, heads)
    return _qk_norm_rope(inputs, eps, backend)


class _Inputs(NamedTuple):
    """One call but its choices, so that the list stands once behind the public function and the op's schema."""

    qkv: torch.Tensor
    norm_q: torch.Tensor
    norm_k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    k_out: torch.Tensor
    v_out: torch.Tensor
    lends: Sequence[Lend]
    heads: int


def _qk_norm_rope(inputs: _Inputs, eps: float, backend: str) -> torch.Tensor:
    rows, inner, head_dim = _check_once(inputs)
    qkv, norm_q, norm_k, cos, sin, k_out, v_out, lends, heads = inputs
    if qkv.device.type == "cpu":
        for side, lend in enumerate(lends):
            slot, slots = int(lend.slot), len(lend.keys)
            if not 0 <= slot < slots:
                raise ValueError(f"slot of lends[{side}] is {slot}; its store has {slots}: give 0 to {slots - 1}")
    chosen = backends.choose("qk_norm_rope", qkv.device, backend)
    if chosen == "torch":
        return reference.qk_norm_rope(qkv, norm_q, norm_k, cos, sin, k_out, v_out, heads=heads, eps=eps, lends=lends)
    q = torch.empty((rows, inner), dtype=qkv.dtype, device=qkv.device)
    if chosen == "triton":
        from . import triton_kernel

        triton_kernel.launch(qkv, norm_q, norm_k, cos, sin, q, k_out, v_out, head_dim, eps, lends)
        return q
    backends._C.qk_norm_rope(
        qkv=backends.pointer(qkv),
        norm_q=backends.pointer(norm_q),
        norm_k=backends.pointer(norm_k),
        cos=backends.pointer(cos),
        sin=backends.pointer(sin),
        q=backends.pointer(q),
        k=backends.pointer(k_out),
        v=backends.pointer(v_out),
        rows=rows,
        heads=heads,
        head_dim=head_dim,
        k_stride=k_out.stride(0),
        v_stride=v_out.stride(0),
        lends=[
            (keys.data_ptr(), values.data_ptr(), slot.data_ptr(), *keys.shape[:2], first)
            for keys, values, slot, first in lends
        ],
        eps=eps,
        dtype=backends.DTYPES[qkv.dtype],
        **backends.where(qkv.device),
    )
    return q


def _check(inputs: _Inputs) -> tuple[int, int, int]:
    """Rows, inner and head_dim, when everything fits. Raises ValueError."""
    qkv, norm_q, norm_k, cos, sin, k_out, v_out, lends, heads = inputs
    if qkv.ndim != 2 or heads < 1 or qkv.shape[1] == 0 or qkv.shape[1] % (6 * heads):
        raise ValueError(
            f"qkv is {list(qkv.shape)} with heads={heads}; expected [S, 3 * heads * head_dim] with head_dim even"
        )
    rows, inner = qkv.shape[0], qkv.shape[1] // 3
    head_dim = inner // heads
    backends.check_dtype("qkv", qkv)
    backends.check("qkv", qkv, qkv.shape, qkv.dtype, qkv.device)
    for name, weight in (("norm_q", norm_q), ("norm_k", norm_k)):
        backends.check(name, weight, (inner,), torch.float32, qkv.device)
    for name, table in (("cos", cos), ("sin", sin)):
        backends.check(name, table, (rows, head_dim // 2), torch.float32, qkv.device)
    for name, out in (("k_out", k_out), ("v_out", v_out)):
        backends.check(name, out, (rows, inner), qkv.dtype, qkv.device, row_stride=True)
    if len(lends) > MAX_LENDS:
        raise ValueError(f"{len(lends)} lends: a block has {MAX_LENDS} neighbours; give at most {MAX_LENDS}")
    for side, lend in enumerate(lends):
        keys = lend.keys
        if keys.ndim != 3 or len(keys) == 0:
            raise ValueError(
                f"keys of lends[{side}] are {list(keys.shape)}; expected [slots, tokens, {inner}] with a slot or more"
            )
        for name, store in (("keys", keys), ("values", lend.values)):
            backends.check(f"{name} of lends[{side}]", store, (*keys.shape[:2], inner), qkv.dtype, qkv.device)
        backends.check(f"slot of lends[{side}]", lend.slot, (1,), torch.int64, qkv.device)
        if not 0 <= lend.first <= rows - lend.tokens:
            raise ValueError(
                f"lends[{side}] takes {lend.tokens} tokens from first={lend.first} on, and qkv has {rows} rows; "
                "lend rows that are there, or make the store's slots smaller"
            )
    return rows, inner, head_dim


_check_once = backends.once_per_layout(_check)


# What torch.compile and torch.export record: lends by column, since a schema has lists of tensors, not of tuples.


def _lends(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    firsts: Sequence[int],
) -> list[Lend]:
    return [Lend(*lend) for lend in zip(keys, values, slots, firsts, strict=True)]


@torch.library.custom_op("dualparal::qk_norm_rope", mutates_args=("k_out", "v_out", "lend_keys", "lend_values"))
def _qk_norm_rope_op(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    lend_keys: Sequence[torch.Tensor],
    lend_values: Sequence[torch.Tensor],
    lend_slots: Sequence[torch.Tensor],
    lend_firsts: Sequence[int],
    heads: int,
    eps: float,
    backend: str,
) -> torch.Tensor:
    lends = _lends(lend_keys, lend_values, lend_slots, lend_firsts)
    inputs = _Inputs(qkv, norm_q.float(), norm_k.float(), cos, sin, k_out, v_out, lends, heads)
    return _qk_norm_rope(inputs, eps, backend)


@_qk_norm_rope_op.register_fake
def _(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    lend_keys: Sequence[torch.Tensor],
    lend_values: Sequence[torch.Tensor],
    lend_slots: Sequence[torch.Tensor],
    lend_firsts: Sequence[int],
    heads: int,
    eps: float,
    backend: str,
) -> torch.Tensor:
    lends = _lends(lend_keys, lend_values, lend_slots, lend_firsts)
    rows, inner, _ = _check(_Inputs(qkv, norm_q.float(), norm_k.float(), cos, sin, k_out, v_out, lends, heads))
    return qkv.new_empty((rows, inner))
