"""From prompt to frames: diffusers' own pipeline against ours with one process and with two. CPU, minutes.

    python bench/bench_end_to_end.py

A small Wan with random weights, 96 x 96 pixels, guidance, every process on one thread, each run after one that warms
up; text encoder and VAE are in the time, reading the weights is not. Side by side, for the same prompt and length:

WanPipeline  diffusers, the whole video at once: every frame attends to all, and frames appear at the end
ours, N=1    blocks of 8 latent frames with 4 of context, in one process
ours, N=2    the same over two processes and gloo

The two videos differ (ours sees its neighbours through the context), so this compares what a user waits for, not equal
arithmetic; bench_layer.py does that.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.options import parser
from harness.ranks import as_rank, in_processes
from harness.record import record

from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.trace.stats import peak_rss

SIDE = 96  # pixels, of a square
WARM_FRAMES = 33
RIVALS = (("WanPipeline", 1), ("ours, N=1", 1), ("ours, N=2", 2))
CASES = {"81 frames": 81, "257 frames": 257}

Frames = Callable[[int], float]  # makes so many frames, returns when the first were there, on the clock of now()
now = time.perf_counter


def stock(job: dict[str, Any]) -> Frames:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(job["model"])
    pipeline.set_progress_bar_config(disable=True)

    def make(frames: int) -> float:
        pipeline(prompt="a cat", num_frames=frames, num_inference_steps=job["steps"], **job["size"])
        return now()

    return make


def ours(job: dict[str, Any]) -> Frames:
    engine = Engine.from_pretrained(job["model"], device="cpu")

    def make(frames: int) -> float:
        call = {"num_frames": frames, "num_inference_steps": job["steps"], **job["size"]}
        times = [now() for _ in engine.stream("a cat", **call)]
        return times[0] if times else now()  # ranks other than 0 get none

    return make


def work(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    make = (stock if job["rival"] == "WanPipeline" else ours)(job)
    make(job["warm"])
    begin = now()
    first = make(job["frames"])
    tell({"seconds": now() - begin, "first": first - begin, "gb": peak_rss() / 1e9})


def main() -> None:
    if as_rank(work):
        return
    options = parser(__doc__, repeats=3)
    options.add_argument("--steps", type=int, default=8)
    arguments = options.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(build_tiny_pipeline(Path(folder) / "model", layers=8, heads=4, head_dim=64, ffn_dim=512))
        for name, frames in CASES.items():
            if arguments.only not in name:
                continue
            runs: dict[str, list[dict[str, Any]]] = {rival: [] for rival, _ in RIVALS}
            for _ in range(arguments.repeats):  # in turn, so that a noisy machine hits all alike
                for rival, ranks in RIVALS:
                    job = {"model": model, "rival": rival, "frames": frames, "steps": arguments.steps,
                           "size": {"height": SIDE, "width": SIDE}, "warm": WARM_FRAMES}  # fmt: skip
                    runs[rival] += in_processes(__file__, ranks, job)
            base = statistics.median(run["seconds"] for run in runs["WanPipeline"])
            for rival, found in runs.items():
                seconds, first, memory = (statistics.median(run[key] for run in found) for key in found[0])
                rows.append({"what": rival, "frames": frames, "steps": arguments.steps, "seconds": round(seconds, 2),
                             "frames_per_s": round(frames / seconds, 2), "first_s": round(first, 2),
                             "rank0_gb": round(memory, 2), "times_stock": round(base / seconds, 3)})  # fmt: skip
                print(f"end to end {name:10s} {rival:11s} {seconds:7.2f} s, {frames / seconds:6.2f} frames/s, first "
                      f"frames after {first:6.2f} s, {memory:.2f} GB on rank 0 | {base / seconds:.2f}x WanPipeline",
                      flush=True)  # fmt: skip
    if not arguments.no_record:
        record("end_to_end", rows, "cpu")


if __name__ == "__main__":
    main()
