from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, Any]: ...
def cuda_problem(device: int) -> str: ...
def residual_norm(
    *,
    x: int,
    y: int,
    gate: int,
    weight: int,
    bias: int,
    x_new: int,
    h: int,
    rows: int,
    dim: int,
    eps: float,
    dtype: int,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def qk_norm_rope(
    *,
    qkv: int,
    norm_q: int,
    norm_k: int,
    cos: int,
    sin: int,
    q: int,
    k: int,
    v: int,
    rows: int,
    heads: int,
    head_dim: int,
    k_stride: int,
    v_stride: int,
    lends: Sequence[tuple[int, int, int, int, int, int]],  # keys, values, slot, slots, tokens, first
    eps: float,
    dtype: int,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
def attention_hopper(
    *,
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    q_rows: int,
    k_rows: int,
    heads: int,
    head_dim: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def combine_guidance(
    *,
    cond: int,
    uncond: int,
    out: int,
    size: int,
    scale: float,
    dtype: int,
    device: int,
    stream: int,
    threads: int,
) -> None: ...
