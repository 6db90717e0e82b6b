"""The backends behind one signature: (q, k, v, heads, with_lse) -> (out, lse or None).

q, k, v are [S, inner] with S of 1 or more and contiguous rows; out is contiguous [S_q, inner], lse float32
[heads, S_q]. torch's kernels are called by their own names, not through torch.nn.attention.sdpa_kernel: that sets
flags of the whole process, and an attention of the VAE on the decode thread would find its kernels forbidden.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from .. import backend as backends
from . import reference

aten = torch.ops.aten
Result = tuple[torch.Tensor, torch.Tensor | None]
Implementation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, bool], Result]


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[S, inner] -> [1, heads, S, head_dim], a view."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)[None]


def _rows(out: torch.Tensor) -> torch.Tensor:
    """[1, heads, S, head_dim] -> [S, inner], contiguous; torch's kernels lay it out so that this is a view."""
    return out[0].transpose(0, 1).flatten(1).contiguous()


def _result(out: torch.Tensor, lse: torch.Tensor | None) -> Result:
    """lse: [1, heads, S or padded S] or [1, heads, S, 1], as the kernels of torch have it."""
    if lse is None:
        return _rows(out), None
    heads, rows = out.shape[1:3]
    return _rows(out), lse[0].reshape(heads, -1)[:, :rows].float().contiguous()


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    out, lse = reference.attention_lse(q, k, v, heads=heads)
    return out, lse if with_lse else None


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    if len(k) == 1:  # cuDNN takes two keys or more
        return _reference(q, k, v, heads, with_lse)
    args = (_heads(q, heads), _heads(k, heads), _heads(v, heads))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*args, None, with_lse)
    return _result(out, lse if with_lse else None)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    args = (_heads(q, heads), _heads(k, heads), _heads(v, heads))
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*args)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*args)
    return _result(out, lse if with_lse else None)


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    args = (_heads(q, heads), _heads(k, heads), _heads(v, heads))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(*args, None, with_lse)
    return _result(out, lse if with_lse else None)


_NAMED = {
    SDPBackend.FLASH_ATTENTION: _flash,
    SDPBackend.EFFICIENT_ATTENTION: _efficient,
    SDPBackend.CUDNN_ATTENTION: _cudnn,
}


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    args = (_heads(q, heads), _heads(k, heads), _heads(v, heads))
    if not with_lse:
        return _rows(F.scaled_dot_product_attention(*args)), None
    # The public function keeps the log-sum-exp to itself: ask which kernel it would take, and take that.
    chosen = SDPBackend(torch._fused_sdp_choice(*args))
    padded = q.is_cuda and q.shape[1] // heads % 8 != 0  # torch pads such heads before it calls the kernel
    if padded or chosen is SDPBackend.MATH:
        return _reference(q, k, v, heads, True)
    return _NAMED[chosen](q, k, v, heads, True)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    args = (x.unflatten(1, (heads, -1))[None] for x in (q, k, v))  # [1, S, heads, head_dim]
    if not with_lse:
        return flash_attn_func(*args)[0].flatten(1), None
    out, lse, *_ = flash_attn_func(*args, return_attn_probs=True)
    return out[0].flatten(1), lse[0][:, : len(q)].contiguous()


def _for_tma(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy where its rows do not all begin at multiples of 16 bytes."""
    if x.data_ptr() % 16 == 0 and (len(x) == 1 or x.stride(0) * x.element_size() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    q, k, v = map(_for_tma, (q, k, v))  # kept until the launch: copies of the caching allocator may go after it
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, len(q), dtype=torch.float32, device=q.device) if with_lse else None
    where = backends.where(q.device)
    backends._C.attention_hopper(
        q=backends.pointer(q),
        k=backends.pointer(k),
        v=backends.pointer(v),
        out=backends.pointer(out),
        lse=backends.pointer(lse),
        q_rows=len(q),
        k_rows=len(k),
        heads=heads,
        head_dim=q.shape[1] // heads,
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        dtype=backends.DTYPES[q.dtype],
        device=where["device"],
        stream=where["stream"],
    )
    return out, lse


def _triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, with_lse: bool) -> Result:
    from . import triton_kernel

    return triton_kernel.attention(q, [(k, v)], heads, with_lse)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "flash-attn": _flash_attn,
    "hopper": _hopper,
    "triton": _triton,
    "reference": _reference,
}
