"""The fused passes beside attention: every backend that this machine has against plain PyTorch, in one run.

    python bench/bench_ops.py            # on a GPU: Wan's shapes, bfloat16
    python bench/bench_ops.py --cpu      # an eighth of the rows, float32

They move bytes and compute little, so the measure is the share of what a copy reaches in this run: bytes that must be
read and written once, over the time. "torch" is the plain definition, pass after pass, as diffusers does it. Results
are checked against float64 before anything is timed. bench_attention.py has attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness.options import parser
from harness.record import record

from dualparal.kernels import backend as backends
from dualparal.kernels.accuracy import assert_no_worse
from dualparal.kernels.attention.calibrate import time_together
from dualparal.kernels.combine_guidance import cases as guidance_cases
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope
from dualparal.kernels.qk_norm_rope import cases as rope_cases
from dualparal.kernels.qk_norm_rope import reference as rope_reference
from dualparal.kernels.residual_norm import cases as norm_cases
from dualparal.kernels.residual_norm import reference as norm_reference
from dualparal.kernels.residual_norm import residual_norm

EPS = 1e-6
NAMES = ("wan1.3b-480p", "wan14b-480p", "wan1.3b-480p-lends", "wan-480p-8-frames")
CPU_SHARE = 8  # of the rows


class Op(NamedTuple):
    """run(backend, double): the outputs, in float64 when double (the definition only). moved: elements of dtype."""

    name: str
    run: Callable[[str, bool], tuple[torch.Tensor, ...]]
    moved: int


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def ops(dtype: torch.dtype, device: torch.device, only: str) -> list[Op]:
    share = 1 if device.type == "cuda" else CPU_SHARE
    found = []
    for module, build in ((rope_cases, _rope), (norm_cases, _norm), (guidance_cases, _guidance)):
        for case in module.CASES:
            if case.name in NAMES:
                found.append(build(case, share, dtype, device))
    return [op for op in found if only in op.name]


def _rope(case: Any, share: int, dtype: torch.dtype, device: torch.device) -> Op:
    rows = case.rows // share
    qkv = draw(rows, 3 * case.inner, dtype=dtype, device=device)
    weights = [draw(case.inner, dtype=torch.float32, device=device) for _ in range(2)]
    angles = 100 * draw(rows, case.head_dim // 2, dtype=torch.float32, device=device)
    args = [qkv, *weights, angles.cos(), angles.sin()]
    outs = [torch.empty(rows, case.inner, dtype=dtype, device=device) for _ in range(2)]
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    lends = [
        Lend(*torch.empty(2, 1, tokens // share, case.inner, dtype=dtype, device=device), slot, first // share)
        for first, tokens in case.lends
    ]

    def run(backend: str, double: bool) -> tuple[torch.Tensor, ...]:
        if double:
            k, v = (out.double() for out in outs)
            return rope_reference.qk_norm_rope(*(x.double() for x in args), k, v, heads=case.heads, eps=EPS), k
        return qk_norm_rope(*args, *outs, heads=case.heads, eps=EPS, backend=backend, lends=lends), outs[0]

    cos_sin = rows * case.head_dim * 4 // dtype.itemsize
    lent = 2 * sum(lend.tokens for lend in lends) * case.inner
    return Op(f"qk_norm_rope {case.name}", run, 6 * rows * case.inner + lent + cos_sin)


def _norm(case: Any, share: int, dtype: torch.dtype, device: torch.device) -> Op:
    rows = case.rows // share
    x, y = (draw(rows, case.dim, dtype=dtype, device=device) for _ in range(2))
    vectors = [draw(case.dim, dtype=torch.float32, device=device) for _ in range(3)]

    def run(backend: str, double: bool) -> tuple[torch.Tensor, ...]:
        if double:
            return norm_reference.residual_norm(x.double(), y.double(), *(v.double() for v in vectors), eps=EPS)
        return residual_norm(x, y, *vectors, eps=EPS, backend=backend)

    return Op(f"residual_norm {case.name}", run, 4 * rows * case.dim)


def _guidance(case: Any, share: int, dtype: torch.dtype, device: torch.device) -> Op:
    pair = [draw(*case.shape, dtype=torch.float32, device=device) for _ in range(2)]  # latents stay float32

    def run(backend: str, double: bool) -> tuple[torch.Tensor, ...]:
        if double:
            cond, uncond = (x.double() for x in pair)
            return (uncond + 5.0 * (cond - uncond),)
        return (combine_guidance(*pair, 5.0, backend=backend),)

    return Op(f"combine_guidance {case.name}", run, 3 * math.prod(case.shape) * 4 // dtype.itemsize)


def measure(op: Op, dtype: torch.dtype, device: torch.device, copy: float, repeats: int) -> list[dict[str, object]]:
    """copy: bytes per second that a copy reads and writes."""
    truth, plain = op.run("torch", True), [x.clone() for x in op.run("torch", False)]
    some = [name for name in backends.NATIVE if not backends.absent(name, device.type)]
    for name in some:
        for made, than, true in zip(op.run(name, False), plain, truth):
            assert_no_worse(made, than, true, 2.0, f"{op.name}, {name}")
    functions: dict[str, Callable[[], object]] = {name: lambda name=name: op.run(name, False) for name in some}  # type: ignore[misc]
    seconds = time_together(functions, device, repeats)
    moved = op.moved * dtype.itemsize
    return [
        {
            "op": op.name,
            "dtype": str(dtype).split(".")[1],
            "backend": name,
            "ms": round(1e3 * took, 4),
            "gb_per_s": round(moved / took / 1e9, 1),
            "of_copy": round(moved / took / copy, 3),
            "times_torch": round(seconds["torch"] / took, 3),
        }
        for name, took in seconds.items()
    ]


def main() -> None:
    arguments = parser(__doc__, cpu=True, repeats=30).parse_args()
    cpu = arguments.cpu or not torch.cuda.is_available()
    device, dtype = torch.device("cpu" if cpu else "cuda"), torch.float32 if cpu else torch.bfloat16
    if cpu:
        torch.set_num_threads(1)
    with torch.inference_mode():
        memory = torch.empty((64 if cpu else 1024) << 20, dtype=torch.uint8, device=device)
        half = len(memory) // 2
        took = time_together({"copy": lambda: memory[:half].copy_(memory[half:])}, device, arguments.repeats)["copy"]
        copy = len(memory) / took
        print(f"copy: {copy / 1e9:.1f} GB/s read and written", flush=True)
        for op in ops(dtype, device, arguments.only):
            rows = measure(op, dtype, device, copy, arguments.repeats)
            for row in rows:
                print(f"op {row['op']:40s} {row['backend']:7s} {row['ms']:9.4f} ms | {row['gb_per_s']:7.1f} GB/s, "
                      f"{100 * row['of_copy']:3.0f} % of a copy | {row['times_torch']:.2f}x torch",  # type: ignore[operator]
                      flush=True)  # fmt: skip
            if not arguments.no_record:
                record("ops_cpu" if cpu else "ops", rows, device.type)


if __name__ == "__main__":
    main()
