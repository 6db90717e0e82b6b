"""``dualparal calibrate``: which attention backend is the fastest on this card, measured once and kept.

Every backend is checked before it is timed: it may not be further from the definition than torch's own choice by more
than a factor. One that has not run on any card yet is tried on ragged shapes first, in a process of its own: a wrong
result, a crash or a hang leaves it out. The table that comes out is kept in the cache folder, and ``backend="auto"``
prefers it while card, driver and library versions stay the same (``kernels/attention/table.py``).
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dualparal.kernels.accuracy import excess, nan_filled_memory
from dualparal.kernels.attention import attention, choice, reference, table
from dualparal.kernels.attention.cases import WAN, Case, ragged

log = logging.getLogger("dualparal")

TIE = 0.02  # torch's own choice wins unless another is faster by more
ERROR_FACTOR = 2.0
AHEAD = 2_000_000  # clock cycles, about 1 ms, that a GPU waits while the host prepares: its time is not measured
CHECKED_ROWS = 256  # queries that are compared; all of them would need more memory than a card has
TRIAL_SECONDS = 120.0  # for a process that imports torch and runs a few small shapes


Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]  # of q, k, v and heads


@dataclass(frozen=True)
class Row:
    """One backend at one shape.

    Attributes:
        milliseconds: the median, or None where the backend failed.
        problem: why it was not timed; empty when it was.
    """

    case: str
    backend: str
    dtype: str
    head_dim: int
    length: str
    milliseconds: float | None
    tflops: float | None
    problem: str


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values, laid out as a layer has them."""
    generator = torch.Generator(device).manual_seed(0)
    inner = case.heads * case.head_dim
    q, k, v = (
        torch.randn(rows, inner + padding, dtype=dtype, device=device, generator=generator)[:, :inner]
        for rows, padding in ((case.q_rows, 0), (case.k_rows, case.padding), (case.k_rows, case.padding))
    )
    return q, k, v


class Check:
    """Compares the first and last queries of every head with the definition in float64.

    Args:
        plain: what torch's scaled_dot_product_attention gives for q, k, v: the measure of what is good enough.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, plain: torch.Tensor) -> None:
        half = CHECKED_ROWS // 2
        rows = torch.arange(len(q), device=q.device)
        self.rows = torch.cat([rows[:half], rows[half:][-half:]])
        head_dim = q.shape[1] // heads
        columns = [slice(head * head_dim, (head + 1) * head_dim) for head in range(heads)]
        self.truth = torch.cat(  # head by head: all the logits in float64 would be large
            [
                reference.attention(q[self.rows, own].double(), k[:, own].double(), v[:, own].double(), heads=1)
                for own in columns
            ],
            dim=1,
        )
        self.plain = plain[self.rows]

    def problem(self, out: torch.Tensor) -> str:
        """The fault of ``out`` in words, or an empty string."""
        problem = excess(out[self.rows], self.plain, self.truth, ERROR_FACTOR)
        return f"checked queries: {problem}" if problem else ""


def time_together(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that clocks and neighbours treat them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(AHEAD)
                begin.record()
                function()
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end) / 1e3
            else:
                started = time.perf_counter()
                function()
                elapsed = time.perf_counter() - started
            if turn:  # the first warms up
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    backends: dict[str, Function],
    repeats: int = 7,
) -> list[Row]:
    """Checks and times ``backends`` at one shape; a row for each."""
    q, k, v = inputs(case, dtype, device)
    problems: dict[str, str] = {}
    ready: dict[str, Callable[[], object]] = {}
    check = Check(q, k, v, case.heads, attention(q, k, v, heads=case.heads, backend="sdpa"))
    for name, function in backends.items():
        try:
            problems[name] = check.problem(function(q, k, v, case.heads))
        except torch.OutOfMemoryError:
            problems[name] = "out of memory"
        except (RuntimeError, ValueError) as error:  # a kernel that does not take this shape
            problems[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        if not problems[name]:
            ready[name] = lambda function=function: function(q, k, v, case.heads)  # type: ignore[misc]
    seconds = time_together(ready, device, repeats)
    return [
        Row(
            case.name,
            name,
            str(dtype).removeprefix("torch."),
            case.head_dim,
            table.length_class(case.k_rows),
            1e3 * seconds[name] if name in seconds else None,
            case.flops / seconds[name] / 1e12 if name in seconds else None,
            problems[name],
        )
        for name in backends
    ]


def fastest(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The choices of a table: per dtype, head dimension and length class the least time over all of its shapes.

    A backend that failed at one shape of a class is out. Times are compared by their geometric mean, so that a long
    shape has no more to say than a short one.
    """
    chosen: list[dict[str, object]] = []
    for kind in dict.fromkeys((row.dtype, row.head_dim, row.length) for row in rows):
        times: dict[str, list[float | None]] = {}
        for row in rows:
            if (row.dtype, row.head_dim, row.length) == kind:
                times.setdefault(row.backend, []).append(row.milliseconds)
        means = {
            name: math.exp(statistics.fmean(math.log(t) for t in found if t is not None))
            for name, found in times.items()
            if None not in found
        }
        if means:
            best = min(means, key=means.__getitem__)
            if means.get("sdpa", math.inf) <= (1 + TIE) * means[best]:
                best = "sdpa"
            dtype, head_dim, length = kind
            chosen.append({"dtype": dtype, "head_dim": head_dim, "length": length, "backend": best})
    return chosen


def with_backend(name: str) -> Function:
    return lambda q, k, v, heads: attention(q, k, v, heads=heads, backend=name)


def callable_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Function]:
    """Every backend that can run there, as ``measure`` wants them; of the untried those that pass their trial."""
    names = choice.available(device, dtype, head_dim)
    for name in choice.UNTRIED:
        if not choice.absent(name, device, dtype, head_dim) and not trial(name, device, dtype, head_dim):
            names.append(name)
    return {name: with_backend(name) for name in names}


def ragged_problem(function: Function, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The fault of ``function`` at small ragged shapes in words, or an empty string.

    New memory is full of NaN, and so is an arena behind its last key: neither may show in a result.
    """
    for case in ragged(head_dim):
        q, k, v = inputs(case, dtype, device)
        check = Check(q, k, v, case.heads, with_backend("sdpa")(q, k, v, case.heads))
        arenas = torch.full((2, len(k) + 130, k.shape[1] + case.padding), math.nan, dtype=dtype, device=device)
        for arena, x in zip(arenas, (k, v)):
            arena[: len(x), : x.shape[1]] = x
        k, v = arenas[:, : len(k), : k.shape[1]]
        with nan_filled_memory():
            out = function(q, k, v, case.heads)
        if problem := check.problem(out):
            return f"{case.name}: {problem}"
    return ""


@functools.cache
def trial(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The fault of a backend that may give anything, crash or hang: ``ragged_problem`` in a process of its own.

    Empty when nothing is; logged when something is. On one device, at most once per process.
    """
    code = (
        "import torch; from dualparal.kernels.attention.calibrate import ragged_problem, with_backend\n"
        "with torch.inference_mode():\n"
        f"    print(ragged_problem(with_backend({backend!r}), torch.device({str(device)!r}), {dtype}, {head_dim}))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        problem = f"it did not end within {TRIAL_SECONDS:g} s"
    else:
        said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
        said = [line for line in said if "Error" in line] or said  # CUDA's errors end in advice
        problem = said[-1] if said else f"exit code {done.returncode}" if done.returncode else ""
    if problem:
        log.warning("attention: %s is left out, its trial failed: %s", backend, problem)
    return problem


def calibrate(
    device: torch.device | None = None,
    cases: Sequence[Case] = WAN,
    dtype: torch.dtype = torch.bfloat16,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measures, keeps the table, and returns where it lies.

    Args:
        device: a CUDA device; default: the current one.
        report: takes a line of text per measurement.

    Raises:
        ValueError: there is no GPU, or no place for the table.
    """
    if device is None:
        if not torch.cuda.is_available():
            raise ValueError(
                "calibrate: torch sees no GPU, and on a CPU there is nothing to choose; run it on the machine that "
                "makes the video ('dualparal doctor' says what is there)"
            )
        device = torch.device("cuda", torch.cuda.current_device())
    facts = table.machine(device)
    path = table.measured_path(facts["card"])
    rows: list[Row] = []
    for case in cases:
        try:
            with torch.inference_mode():
                found = measure(case, dtype, device, callable_backends(device, dtype, case.head_dim))
        except torch.OutOfMemoryError:
            report(f"{case.name:24s} left out: it does not fit this card")
            continue
        for row in found:
            report(describe(row))
        rows += found
    choices = fastest(rows)
    if not choices:
        raise ValueError("calibrate: no backend ran at any shape; nothing was kept")
    table.write_measured(path, facts, choices, map(asdict, rows))
    choice.forget()
    for chosen in choices:
        report(f"{chosen['dtype']}, head dimension {chosen['head_dim']}, {chosen['length']}: {chosen['backend']}")
    return path


def describe(row: Row) -> str:
    """One line for people."""
    head = f"{row.case:24s} {row.backend:12s}"
    if row.milliseconds is None:
        return f"{head} not timed: {row.problem}"
    return f"{head} {row.milliseconds:10.3f} ms {row.tflops:8.1f} TFLOP/s"
