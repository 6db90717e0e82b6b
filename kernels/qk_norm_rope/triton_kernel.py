"""qk_norm_rope in Triton: one thread block each for q, k and v of a row, which is read once and written once, and
once more for each neighbour it is lent to.

A pair to rotate lies in neighbouring elements. Loading every second element would take the loads apart to two
bytes, so a tile is loaded whole and split in registers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import backend as backends
from ..offline import OfflineCase
from ..rows import Tiles, inverse_root, load, store, tiles
from .reference import Lend


@triton.jit
def pairs(P, at, DIM: tl.constexpr, FULL: tl.constexpr, SIZE: tl.constexpr):
    """The even and the odd elements of a tile, as float32."""
    even, odd = tl.split(tl.reshape(load(P, at, DIM, FULL), (SIZE // 2, 2)))
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def rotated(
    WEIGHT, COS, SIN, at, pair, a, b, factor,
    DIM: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Norm, weight and rotation of one tile; ``pair`` numbers its pairs within the row."""
    weight_a, weight_b = pairs(WEIGHT, at, DIM, FULL, SIZE)
    a = a * factor * weight_a
    b = b * factor * weight_b
    angle = pair % HALF  # in bounds also where the tile is not
    cos = tl.load(COS + angle)
    sin = tl.load(SIN + angle)
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (SIZE,))


@triton.jit
def lend(STORE, slot, first, tokens, row, at, x, DIM: tl.constexpr, FULL: tl.constexpr):
    """Writes one tile of a row to the store as well, if the row is among those lent. STORE may be None."""
    if STORE is not None:  # noqa: SIM102  decided by the compiler, the rest by each row
        if (row >= first) & (row < first + tokens):
            store(STORE + (slot * tokens + row - first) * DIM, at, x, DIM, FULL)


# Not specialised: they change with the block, and knowing them to be 1 or a multiple of 16 aligns no address better.
# A slot is one of many numbers side by side, so every second one begins at a multiple of 16 bytes.
@triton.jit(
    do_not_specialize=["first_0", "tokens_0", "first_1", "tokens_1"],
    do_not_specialize_on_alignment=["SLOT_0", "SLOT_1"],
)
def qk_norm_rope_kernel(
    QKV, NORM_Q, NORM_K, COS, SIN, Q, K, V, k_stride, v_stride, eps,
    KEYS_0, VALUES_0, SLOT_0, first_0, tokens_0, KEYS_1, VALUES_1, SLOT_1, first_1, tokens_1,
    DIM: tl.constexpr, HALF: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Row program_id(0); part program_id(1): q, k or v. QKV: [rows, 3 * DIM]; Q: [rows, DIM]; K, V: strided rows.

    NORM_Q, NORM_K: [DIM]; COS, SIN: [rows, HALF]; all float32. HALF pairs make a head. KEYS_*, VALUES_*: stores
    [slots, tokens, DIM], whose slot SLOT_*[0] takes rows from first on; None where nothing is lent.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    full: tl.constexpr = HIGH + LOW == DIM
    high = tl.arange(0, HIGH)
    low = HIGH + tl.arange(0, LOW if LOW > 0 else 1)
    source = QKV + (row * 3 + part) * DIM
    slot_0 = 0 if SLOT_0 is None else tl.load(SLOT_0)  # before the row, so that nothing waits for it
    slot_1 = 0 if SLOT_1 is None else tl.load(SLOT_1)
    if part == 2:
        target = V + row * v_stride
        v_high = load(source, high, DIM, True)
        store(target, high, v_high, DIM, True)
        lend(VALUES_0, slot_0, first_0, tokens_0, row, high, v_high, DIM, True)
        lend(VALUES_1, slot_1, first_1, tokens_1, row, high, v_high, DIM, True)
        if LOW > 0:
            v_low = load(source, low, DIM, full)
            store(target, low, v_low, DIM, full)
            lend(VALUES_0, slot_0, first_0, tokens_0, row, low, v_low, DIM, full)
            lend(VALUES_1, slot_1, first_1, tokens_1, row, low, v_low, DIM, full)
    else:
        if part == 0:
            target = Q + row * DIM
            weight = NORM_Q
        else:
            target = K + row * k_stride
            weight = NORM_K
        cos = COS + row * HALF
        sin = SIN + row * HALF
        a, b = pairs(source, high, DIM, True, HIGH)
        total = tl.sum(a * a, 0) + tl.sum(b * b, 0)
        if LOW > 0:
            c, d = pairs(source, low, DIM, full, LOW)
            total += tl.sum(c * c, 0) + tl.sum(d * d, 0)
        factor = inverse_root(total, eps, DIM)
        pair = tl.arange(0, HIGH // 2)
        turned_high = rotated(weight, cos, sin, high, pair, a, b, factor, DIM, HALF, True, HIGH)
        store(target, high, turned_high, DIM, True)
        if part == 1:
            lend(KEYS_0, slot_0, first_0, tokens_0, row, high, turned_high, DIM, True)
            lend(KEYS_1, slot_1, first_1, tokens_1, row, high, turned_high, DIM, True)
        if LOW > 0:
            pair = HIGH // 2 + tl.arange(0, LOW // 2)
            turned_low = rotated(weight, cos, sin, low, pair, c, d, factor, DIM, HALF, full, LOW)
            store(target, low, turned_low, DIM, full)
            if part == 1:
                lend(KEYS_0, slot_0, first_0, tokens_0, row, low, turned_low, DIM, full)
                lend(KEYS_1, slot_1, first_1, tokens_1, row, low, turned_low, DIM, full)


ABSENT = (None, None, None, 0, 0)  # arguments of a lend that there is not


def max_registers(row: Tiles) -> int:
    """Registers per thread. Left alone, ptxas (of Triton 3.7) aims at 48 for occupancy and spills two of them."""
    return 128 if row.high + row.low <= 40 * 32 * row.num_warps else 255


def launch(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    head_dim: int,
    eps: float,
    lends: Sequence[Lend] = (),
) -> None:
    """Fills q, k_out, v_out and the slots of lends. Shapes as in qk_norm_rope, already checked.

    Raises:
        ValueError: the rows are too long for this backend, or eps is negative or not finite.
    """
    rows, inner = q.shape
    row = tiles(inner, q.element_size())
    backends.check_eps(eps)
    if rows == 0:
        return
    given = [argument for one in lends for argument in (one.keys, one.values, one.slot, one.first, one.tokens)]
    with backends.current(q.device):
        qk_norm_rope_kernel[(rows, 3)](
            *(qkv, norm_q, norm_k, cos, sin, q, k_out, v_out, k_out.stride(0), v_out.stride(0), eps),
            *(*given, *ABSENT * (2 - len(lends))),
            **dict(DIM=inner, HALF=head_dim // 2, HIGH=row.high, LOW=row.low),
            num_warps=row.num_warps,
            maxnreg=max_registers(row),
            enable_fp_fusion=False,  # a product is rounded before it is added, as in PyTorch
        )


def offline_case(
    name: str, inner: int, head_dim: int, dtype: str = "bf16", stride: str = "i32:16", lends: int = 0
) -> OfflineCase:
    """The variant that ``launch`` would compile. ``stride``: the type of the arena's row strides."""
    row = tiles(inner, 4 if dtype == "fp32" else 2)
    signature = dict.fromkeys(("QKV", "Q", "K", "V"), f"*{dtype}")
    signature |= dict.fromkeys(("NORM_Q", "NORM_K", "COS", "SIN"), "*fp32")
    signature |= dict(k_stride=stride, v_stride=stride, eps="fp32")
    constexprs: dict[str, int | None] = dict(DIM=inner, HALF=head_dim // 2, HIGH=row.high, LOW=row.low)
    for side in range(2):
        pointers = {f"KEYS_{side}": f"*{dtype}", f"VALUES_{side}": f"*{dtype}", f"SLOT_{side}": "*i64"}
        signature |= {f"first_{side}": "i32", f"tokens_{side}": "i32"}
        if side < lends:
            signature |= pointers
        else:
            constexprs |= dict.fromkeys(pointers)
    return OfflineCase(
        *(name, qk_norm_rope_kernel, signature, constexprs, row.num_warps),
        fp_fusion=False,
        maxnreg=max_registers(row),
    )


OFFLINE = [
    *(offline_case(f"{heads} heads of 128", heads * 128, 128) for heads in (12, 24, 40)),
    *(offline_case(f"{heads} heads of 128, lent twice", heads * 128, 128, lends=2) for heads in (12, 40)),
]
