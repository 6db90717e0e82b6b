"""Drives a sanitized build of dualparal._C, alone in its process: ``python sanitized.py FOLDER good|bad|overflow``.

Without torch, whose libraries were not built for this. Every array is an allocation of exactly its size, so a read
or write beyond it is seen.
"""

import importlib
import sys
from typing import Any

import numpy as np

CODES = {np.float32: 0, np.uint16: 1, np.float16: 2}  # numpy has no bfloat16: 16 bits
EPS = 1e-6
keep: list[np.ndarray] = []  # pointers are numbers; somebody must own the memory


def pointer(array: np.ndarray) -> int:
    keep.append(array)
    return int(array.ctypes.data)


def data(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else values.astype(dtype)


def guidance(size: int, dtype: Any, threads: int = 1) -> dict[str, Any]:
    arrays = {name: pointer(data(size, dtype=dtype)) for name in ("cond", "uncond", "out")}
    return dict(**arrays, size=size, scale=5.0, dtype=CODES[dtype], device=-1, stream=0, threads=threads)


def norm(rows: int, dim: int, dtype: Any, threads: int = 1, absent: str = "") -> dict[str, Any]:
    shapes = {"x": (rows, dim), "y": (rows, dim), "x_new": (rows, dim), "h": (rows, dim)}
    arguments = {name: pointer(data(*shape, dtype=dtype)) for name, shape in shapes.items()}
    arguments |= {name: pointer(data(dim)) for name in ("gate", "weight", "bias")}
    arguments |= dict.fromkeys(absent.split(), 0)
    return dict(
        **arguments, rows=rows, dim=dim, eps=EPS, dtype=CODES[dtype], device=-1, stream=0, threads=threads
    )  # fmt: skip


def lend(tokens: int, inner: int, first: int, dtype: Any, slot: int = 2) -> tuple[int, ...]:
    """Stores of three slots, of which the last has nothing behind it."""
    keys, values = (pointer(data(3, tokens, inner, dtype=dtype)) for _ in range(2))
    return keys, values, pointer(np.array([slot])), 3, tokens, first


def rope(
    rows: int, heads: int, head_dim: int, dtype: Any, threads: int = 1, padding: int = 0, lent: int = 0
) -> dict[str, Any]:
    """lent: rows from the start and rows from the end."""
    inner, stride = heads * head_dim, heads * head_dim + padding
    arguments = {"qkv": pointer(data(rows, 3 * inner, dtype=dtype)), "q": pointer(data(rows, inner, dtype=dtype))}
    last = max(rows - 1, 0) * stride + (inner if rows else 0)  # nothing after the last row
    arguments |= {name: pointer(data(last, dtype=dtype)) for name in ("k", "v")}
    arguments |= {name: pointer(data(inner)) for name in ("norm_q", "norm_k")}
    arguments |= {name: pointer(data(rows, head_dim // 2)) for name in ("cos", "sin")}
    return dict(
        **arguments, rows=rows, heads=heads, head_dim=head_dim, k_stride=stride, v_stride=stride, eps=EPS,
        lends=[lend(lent, inner, first, dtype) for first in (0, rows - lent)],
        dtype=CODES[dtype], device=-1, stream=0, threads=threads,
    )  # fmt: skip


def good(native: Any) -> int:
    """Every op on sizes around the lanes, chunks and threads; returns the number of calls."""
    calls = 0
    for dtype in CODES:
        for size in (0, 1, 15, 2047, 2048, 2049, 70_001):
            native.combine_guidance(**guidance(size, dtype, threads=3))
            calls += 1
        for rows, dim in ((0, 5), (1, 1), (7, 3), (3, 515), (5, 1536), (40, 1024)):
            for absent in ("", "gate", "y x_new gate", "weight bias h", "y x_new gate weight bias"):
                native.residual_norm(**norm(rows, dim, dtype, threads=3, absent=absent))
                calls += 1
        for rows, heads, head_dim, padding, lent in (
            (0, 1, 2, 0, 0),
            (1, 1, 2, 0, 1),
            (5, 3, 6, 7, 3),
            (3, 12, 128, 64, 3),
            (24, 12, 128, 0, 5),
        ):
            native.qk_norm_rope(**rope(rows, heads, head_dim, dtype, threads=3, padding=padding, lent=lent))
            calls += 1
    # The arithmetic, once: the instrumented code is the code that is shipped.
    arguments = guidance(100, np.float32)
    native.combine_guidance(**arguments)
    cond, uncond, out = keep[-3:]
    assert np.array_equal(out, uncond + np.float32(5.0) * (cond - uncond))
    return calls + 1


def bad(native: Any) -> int:
    """Wrong arguments over right memory: each raises, and nothing is touched; returns the number of calls."""
    common = [
        *(dict(dtype=code) for code in (-1, 3, 1 << 20)),
        *(dict(threads=threads) for threads in (0, -1, 4097)),
        *(dict(device=device) for device in (-2, 0)),
        *(dict(stream="0"), dict(dtype=None), dict(threads=1.5)),
    ]
    sizes = [*(dict(rows=rows) for rows in (-1, 1 << 31, 1 << 63, 1 << 70)), dict(eps=-1.0), dict(eps=float("nan"))]
    right = lend(2, 12, 1, np.float32)
    changes = {
        "combine_guidance": [
            *({name: 0} for name in ("cond", "uncond", "out")),
            *(dict(size=size) for size in (-1, 1 << 40, 1 << 64)),
            *(dict(scale=scale) for scale in (float("inf"), float("nan"))),
        ],
        "residual_norm": [
            *sizes,
            *(dict(dim=dim) for dim in (0, -1, 1 << 24, 1 << 62)),
            *(dict(x=0), dict(y=0), dict(x_new=0), dict(y=0, x_new=0, h=0), dict(x=-8)),
            *({name: pointer(data(9)) + 2} for name in ("x", "y", "gate", "weight", "bias", "x_new", "h")),
        ],
        "qk_norm_rope": [
            *sizes,
            *({name: 0} for name in ("qkv", "norm_q", "norm_k", "cos", "sin", "q", "k", "v")),
            *(dict(heads=heads) for heads in (0, -1, 1 << 20)),
            *(dict(head_dim=head_dim) for head_dim in (0, 1, 3, -2, 1 << 20)),
            *(dict(heads=(1 << 20) - 1, head_dim=(1 << 20) - 2), dict(k_stride=11), dict(v_stride=-12)),
            *(dict(k_stride=1 << 31), dict(v_stride=1 << 62)),
            *({name: pointer(data(9)) + 2} for name in ("qkv", "norm_q", "norm_k", "cos", "sin", "q", "k", "v")),
            *(dict(lends=lends) for lends in (None, [right[:5]], [(*right, 0)], [None], [right] * 3)),
            *(
                dict(lends=[right, (*right[:at], value, *right[at + 1 :])])
                for at, values in enumerate(
                    [(0, -8, 1 << 64, "8"), (0,), (0,), (0, -1, 1 << 31), (-1, 4, 1 << 63), (-1, 2, 1 << 62)]
                )
                for value in values
            ),
            *(dict(lends=[lend(2, 12, 1, np.float32, slot=slot)]) for slot in (-1, 3, 1 << 62)),
        ],
    }
    calls = 0
    for op, given in (
        ("combine_guidance", guidance(64, np.float32)),
        ("residual_norm", norm(3, 8, np.float32)),
        ("qk_norm_rope", {**rope(3, 2, 6, np.float32), "lends": [right]}),
    ):
        getattr(native, op)(**given)
        for change in common + changes[op]:
            calls += 1
            try:
                getattr(native, op)(**{**given, **change})
            except (ValueError, TypeError):
                continue
            raise AssertionError(f"{op} took {change}")
        calls += 1
        try:
            getattr(native, op)(**dict(list(given.items())[1:]))
        except TypeError:
            continue
        raise AssertionError(f"{op} needs every argument")
    right = dict(
        q=16, k=16, v=16, out=16, lse=0, q_rows=3, k_rows=3, heads=2, head_dim=64, q_stride=128, k_stride=128,
        v_stride=128, dtype=1, device=0, stream=0,
    )  # fmt: skip
    for change in (
        dict(),  # this build has no CUDA
        *({name: pointer} for name in ("q", "k", "v", "out") for pointer in (0, 8, -16, 1 << 64)),
        *({name: size} for name in ("q_rows", "k_rows", "heads") for size in (0, -1, 1 << 30, 1 << 63)),
        *({name: stride} for name in ("q_stride", "k_stride", "v_stride") for stride in (0, -128, 132, 1 << 62)),
        *(dict(head_dim=head_dim) for head_dim in (0, 32, 96, 256)),
        *(dict(dtype=0), dict(dtype=3), dict(device=-1), dict(stream=None)),
    ):
        calls += 1
        try:
            native.attention_hopper(**{**right, **change})
        except (ValueError, TypeError):
            continue
        raise AssertionError(f"attention_hopper took {change}")
    return calls


def overflow(native: Any) -> int:
    """One row more than there is: the sanitizer has to see it, else its silence means nothing."""
    native.residual_norm(**{**norm(3, 8, np.float32), "rows": 4})
    return 1


if __name__ == "__main__":
    folder, what = sys.argv[1:]
    sys.path.insert(0, folder)
    count = {"good": good, "bad": bad, "overflow": overflow}[what](importlib.import_module("_C"))
    print(f"{count} calls")
