"""A layer and a block-step against diffusers' layers and the authors' way, on the same weights, in one run.

    python bench/bench_layer.py            # on a GPU: the real shapes, bfloat16
    python bench/bench_layer.py --cpu      # small shapes, float32

layer: the same queries and keys (B frames, no neighbours) through ours, diffusers eager, and torch.compile of it.
block-step: one step of one block with guidance and both neighbours: ours ``cached`` (two units of B frames reading
stored features) against the authors' (a batch of two of B + C frames, raw cache joined, normalised and rotated again).
"int8" and "fp8" rows: ours with self-attention in 8 bits (GPU only), against the same rivals and against ours in 16;
"fp8 linears": ours with linears in fp8, "fp8 both": with both.
Results are checked against float32 before anything is timed.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from harness.options import parser
from harness.record import record
from harness.rivals import AuthorsStep, Inputs, OursStep8, Weights, diffusers_step, fp8_linears, ours_step
from harness.shapes import CPU_SHAPES, GPU_SHAPES, Shape

from dualparal.kernels import attention_8bit, linear_8bit
from dualparal.models.keys_values import KeysValues

# Modes in 8 bits, and the most that a layer's error may be against that of diffusers in 16. Attention alone: up to 4
# (int8) and 15 (fp8) times (docs/attention-8bit.md); linears some ten times (docs/linear-8bit.md).
WORST = {"int8": 5, "fp8": 5, "fp8 linears": 20, "fp8 both": 20}
Neighbours = dict[str, list[list[KeysValues]]]  # by what: "layer" without, "step" with


def measure(functions: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, interleaved so that a noisy machine hits all alike."""
    for function in functions.values():
        for _ in range(2):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                function()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
            else:
                at = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - at))
    return {name: statistics.median(values) for name, values in times.items()}


def error(made: torch.Tensor, truth: torch.Tensor) -> float:
    return float((made.float() - truth.float()).norm() / truth.float().norm())


def with_8_bits(weights: Weights, own: Inputs, neighbours: Neighbours) -> dict[str, Callable[[], object]]:
    """A layer and a step in every mode of ``WORST`` that the card has; tells why of others."""
    device, found = weights.device, {}
    no_linears = linear_8bit.absent(device)
    narrow = weights if no_linears else fp8_linears(weights)
    for mode in WORST:
        fp8, linears = mode in ("fp8", "fp8 both"), mode in ("fp8 linears", "fp8 both")
        reason = no_linears if linears else ""
        if mode != "fp8 linears":
            reason = reason or attention_8bit.absent(device, weights.shape.head_dim, fp8)
        if reason:
            print(f"no {mode} rows: {reason}", flush=True)
            continue
        for what, lent in neighbours.items():
            some = narrow if linears else weights
            unit: Callable[[], object] = functools.partial(ours_step, some, own, lent)
            if mode != "fp8 linears":
                unit = OursStep8(some, own, lent, fp8)
            found[f"{what} {mode}"] = unit if what == "layer" else functools.partial(twice, unit)
    return found


def twice(unit: Callable[[], object]) -> list[object]:
    """Both branches of guidance."""
    return [unit() for _ in range(2)]


def bench(
    shape: Shape, device: torch.device, dtype: torch.dtype, seconds: float, compile_: bool
) -> list[dict[str, object]]:
    weights = Weights(shape, dtype, device)
    own, wide = Inputs(weights, shape.frames), Inputs(weights, shape.frames + shape.context)
    nobody: list[list[KeysValues]] = [[] for _ in range(shape.layers)]
    lent = shape.context * shape.grid.tokens
    neighbours = [
        [KeysValues(*(torch.randn(lent, shape.inner, device=device).to(dtype) for _ in range(2))) for _ in range(2)]
        for _ in range(shape.layers)
    ]
    authors = AuthorsStep(weights)
    authors(wide, use_cache=False)  # fills the cache
    functions: dict[str, Callable[[], object]] = {
        "layer ours": lambda: ours_step(weights, own, nobody),
        "layer diffusers": lambda: diffusers_step(weights, own),
        "step ours": lambda: [ours_step(weights, own, neighbours) for _ in range(2)],
        "step authors": lambda: authors(wide, use_cache=True),
    }
    eight_bit = {} if device.type == "cpu" else with_8_bits(weights, own, {"layer": nobody, "step": neighbours})
    modes = [mode for mode in WORST if f"layer {mode}" in eight_bit]
    functions |= eight_bit
    if compile_:
        blocks = [torch.compile(block) for block in weights.blocks]

        def compiled() -> torch.Tensor:
            hidden, rotary = own.hidden[None], own.diffusers_rotary
            for block in blocks:
                hidden = block(hidden, own.text_states[None], own.temb[None], rotary)
            return hidden[0]

        functions["layer compiled"] = compiled
    with torch.inference_mode():
        exact, few = Weights(shape, torch.float32, device), Inputs(weights, 1)  # one frame: float32 takes its time
        truth = diffusers_step(exact, Inputs(exact, 1))
        ours, theirs = (error(made, truth) for made in (ours_step(weights, few, nobody), diffusers_step(weights, few)))
        assert ours <= 2 * theirs + 1e-5, f"{shape.name}: error {ours:.2e} against diffusers' own {theirs:.2e}"
        made = {} if device.type == "cpu" else with_8_bits(weights, few, {"layer": nobody})
        for mode in modes:
            ours = error(made[f"layer {mode}"](), truth)  # type: ignore[arg-type]
            assert ours <= WORST[mode] * theirs, f"{shape.name}: error {ours:.2e} in {mode}, diffusers' {theirs:.2e}"
        del exact, made
        times = measure(functions, device, seconds)
    rows = []
    pairs = [("layer", "ours", "diffusers"), ("layer", "ours", "compiled"), ("step", "ours", "authors")]
    for mode in modes:
        pairs += [
            ("layer", mode, "ours"),
            ("layer", mode, "diffusers"),
            ("step", mode, "ours"),
            ("step", mode, "authors"),
        ]
    for what, which, rival in pairs:
        if f"{what} {rival}" not in times:
            continue
        ours, theirs = times[f"{what} {which}"] / shape.layers, times[f"{what} {rival}"] / shape.layers
        tokens = own.hidden.shape[0]
        keys = tokens + (2 * lent if what == "step" else 0)
        flops = shape.layer_flops(tokens, keys) * (2 if what == "step" else 1)
        ours_dtype = str(dtype).split(".")[1] + ("" if which == "ours" else f" {which}")
        rows.append({"what": what, "shape": shape.name, "dtype": ours_dtype, "rival": rival,
                     "ours_ms": round(ours, 3), "rival_ms": round(theirs, 3), "ratio": round(theirs / ours, 3),
                     "tflops": round(flops / ours / 1e9, 1)})  # fmt: skip
        print(f"{what:6s} {shape.name:16s} {which:11s} {ours:8.3f} ms per layer | {rival} {theirs:8.3f} ms | "
              f"{theirs / ours:.2f}x | {flops / ours / 1e9:.1f} TFLOP/s", flush=True)  # fmt: skip
    return rows


def main() -> None:
    options = parser(__doc__, cpu=True, seconds=3.0)
    options.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = options.parse_args()
    cpu = arguments.cpu or not torch.cuda.is_available()
    device, dtype = torch.device("cpu" if cpu else "cuda"), torch.float32 if cpu else torch.bfloat16
    if cpu:
        torch.set_num_threads(1)
    for shape in CPU_SHAPES if cpu else GPU_SHAPES:
        if arguments.only not in shape.name:
            continue
        rows = bench(shape, device, dtype, arguments.seconds, compile_=not cpu and not arguments.no_compile)
        if not cpu:
            torch.cuda.empty_cache()
        if not arguments.no_record:
            record("layer_cpu" if cpu else "layer", rows, device.type)


if __name__ == "__main__":
    main()
