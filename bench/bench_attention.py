"""Attention: every backend that this machine has, side by side in one run, at the shapes of real models.

    python bench/bench_attention.py                # on a GPU: Wan shapes, bfloat16
    python bench/bench_attention.py --cpu          # small shapes, float32: shows that it works, proves nothing

Besides the backends of ``dualparal.kernels.attention``: FlashAttention 3 where one of its packages is installed, and
keys in three places (own, next, previous), read there by our Triton kernel or joined first for torch. Results are
checked against float64 before anything is timed; what is wrong is not timed. The share is that of the fastest matrix
product of this run in the same dtype.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from harness.options import parser
from harness.record import record

from dualparal.kernels.attention import attention_segments, choice
from dualparal.kernels.attention.calibrate import Function, Row, callable_backends, measure, time_together, trial
from dualparal.kernels.attention.cases import WAN, Case

CPU_CASES = [
    Case("cpu-self", 256, 512, heads=4, head_dim=64),
    Case("cpu-ragged", 77, 130, heads=2, head_dim=24, padding=16),
    Case("cpu-text", 256, 64, heads=4, head_dim=64),
]


def flash_attention_3() -> dict[str, Function]:
    """By the two packages that carry it: flash_attn_interface (built from source), fa3_fwd_interface (fa3-fwd)."""
    found: dict[str, Function] = {}

    def function(call: Any) -> Function:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
            made = call(*(x.unflatten(1, (heads, -1))[None] for x in (q, k, v)))  # [1, S, heads, head_dim]
            out: torch.Tensor = made[0] if isinstance(made, (tuple, list)) else made
            return out[0].flatten(1)

        return run

    for module, name in (("flash_attn_interface", "flash_attn_func"), ("fa3_fwd_interface", "_flash_attn_forward")):
        try:
            found[f"fa3 ({module})"] = function(getattr(importlib.import_module(module), name))
        except Exception as error:
            print(f"without {module}: {error}", flush=True)
    return found


def in_three_places(case: Case, backend: str) -> Function:
    """Half of the keys are the block's own, a quarter each its neighbours'; joined first unless ``backend`` can."""
    own, lent = case.k_rows - 2 * (case.k_rows // 4), case.k_rows // 4

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        segments = list(zip(k.split([own, lent, lent]), v.split([own, lent, lent])))
        return attention_segments(q, segments, heads=heads, backend=backend)

    return run


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of the fastest large matrix product."""
    best = 0.0
    for size in (512,) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = time_together({"matmul": lambda a=a, b=b: a @ b}, device, 10)["matmul"]  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds / 1e12)
    return best


def to_record(row: Row, sdpa: float | None, cudnn: float | None, peak: float) -> dict[str, object]:
    timed = row.milliseconds is not None and row.tflops is not None
    return {
        "case": row.case,
        "dtype": row.dtype,
        "backend": row.backend,
        "ms": round(row.milliseconds, 4) if timed else "",
        "tflops": round(row.tflops, 3) if timed else "",
        "times_sdpa": round(sdpa / row.milliseconds, 3) if timed and sdpa is not None else "",
        "times_cudnn": round(cudnn / row.milliseconds, 3) if timed and cudnn is not None else "",
        "of_peak": round(row.tflops / peak, 3) if timed else "",
        "peak_tflops": round(peak, 3),
        "problem": row.problem,
    }


def main() -> None:
    options = parser(__doc__, cpu=True, seconds=70.0)
    arguments = options.parse_args()
    cpu = arguments.cpu or not torch.cuda.is_available()
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float32 if cpu else torch.bfloat16
    if cpu:
        torch.set_num_threads(1)
    cases = [case for case in (CPU_CASES if cpu else WAN) if arguments.only in case.name]
    if not cases:
        options.error(f"--only {arguments.only}: no shape has this in its name")
    others = {} if cpu else flash_attention_3()
    started = time.monotonic()
    with torch.inference_mode():
        peak = peak_tflops(device, dtype)
        print(f"matrix product: {peak:.2f} TFLOP/s", flush=True)
        for name in choice.UNTRIED:
            kind = (name, device, dtype, cases[0].head_dim)
            if problem := choice.absent(*kind) or trial(*kind):
                print(f"without {name}: {problem}", flush=True)
        for case in cases:
            if time.monotonic() - started > arguments.seconds:
                print(f"{case.name}: left out, time is up", flush=True)
                continue
            functions = {**callable_backends(device, dtype, case.head_dim), **others}
            for backend in ("sdpa", "triton"):
                if not choice.absent(backend, device, dtype, case.head_dim):
                    functions[f"{backend}, 3 places"] = in_three_places(case, backend)
            try:
                rows = measure(case, dtype, device, functions)
            except torch.OutOfMemoryError:
                print(f"{case.name}: left out, it does not fit this card", flush=True)
                continue
            times = {row.backend: row.milliseconds for row in rows}
            records = [to_record(row, times["sdpa"], times.get("cudnn"), peak) for row in rows]
            for row in records:
                print(f"attention {row['case']:20s} {row['backend']:28s} " + (
                    f"not timed: {row['problem']}" if row["problem"] else
                    f"{row['ms']:9.4f} ms | {row['tflops']:8.2f} TFLOP/s, {100 * row['of_peak']:3.0f} % of matmul | "  # type: ignore[operator]
                    f"{row['times_sdpa']:.2f}x sdpa" + (
                        f", {row['times_cudnn']:.2f}x cudnn" if row["times_cudnn"] else "")), flush=True)  # fmt: skip
            if not arguments.no_record:  # at once: a run that is cut off keeps what it has
                record("attention_cpu" if cpu else "attention", records, device.type)


if __name__ == "__main__":
    main()
