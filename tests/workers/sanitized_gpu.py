"""Every op on a GPU, at sizes so small that compute-sanitizer ends: ``compute-sanitizer python sanitized_gpu.py``."""

from __future__ import annotations

import torch

from dualparal.kernels import attention_8bit as eight_bit
from dualparal.kernels.attention import attention, attention_segments
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.kernels.linear_8bit import quantise_rows, restore_rows
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope
from dualparal.kernels.residual_norm import residual_norm

ROWS, HEADS, HEAD_DIM = 133, 2, 64
INNER = HEADS * HEAD_DIM


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


for dtype in (torch.bfloat16, torch.float32):
    for backend in ("cuda", "triton"):
        x, y = random(2, ROWS, INNER, dtype=dtype)
        weight, shift, gate = random(3, INNER)
        residual_norm(x, y, gate, weight, shift, eps=1e-6, backend=backend)
        combine_guidance(x, y, 5.0, backend=backend)
        store = random(2, 3, 40, INNER, dtype=dtype)
        lends = [Lend(*store, torch.tensor([slot], device="cuda"), first) for slot, first in ((2, 0), (0, ROWS - 40))]
        arena = random(2, ROWS + 80, INNER, dtype=dtype)
        tables = random(2, ROWS, HEAD_DIM // 2)
        qkv = random(ROWS, 3 * INNER, dtype=dtype)
        own = arena[:, :ROWS]
        qk_norm_rope(
            qkv, weight, shift, *tables, *own, heads=HEADS, eps=1e-6, lends=lends, backend=backend
        )  # fmt: skip

q, k, v = (random(rows, INNER, dtype=torch.bfloat16) for rows in (ROWS, 201, 201))
attention(q, k, v, heads=HEADS, backend="triton", return_lse=True)
attention_segments(q, [(k[:77], v[:77]), (k[77:77], v[77:77]), (k[77:], v[77:])], heads=HEADS, backend="triton")

qkv = random(ROWS, 3 * INNER, dtype=torch.bfloat16)
for fp8 in (False, True) if torch.cuda.get_device_capability() >= (8, 9) else (False,):
    values = eight_bit.FP8 if fp8 else torch.bfloat16
    columns = eight_bit.tiles_of(ROWS) * eight_bit.TILE
    arena8 = eight_bit.KeysValues8.empty(columns, INNER, HEADS, values, torch.device("cuda"))
    own8, means = arena8.rows(0, ROWS), random(1, INNER)
    queries = eight_bit.qk_norm_rope_8bit(
        qkv, *random(2, INNER), *random(2, ROWS, HEAD_DIM // 2), means, own8, heads=HEADS, eps=1e-6, backend="triton"
    )
    eight_bit.attention_8bit(queries, arena8, [0, ROWS], heads=HEADS, backend="triton")
    if fp8:
        rows = quantise_rows(qkv, backend="triton")
        restore_rows(rows, torch.empty_like(qkv), backend="triton")
torch.cuda.synchronize()
