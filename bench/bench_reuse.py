"""What steps that are not run save: two processes against the ratio of units, and core-seconds against the paper. CPU.

    python bench/bench_reuse.py

wall: seconds of two processes over gloo with a preset over those without, beside the ratio of the units that they run.
Layers only sleep, so that it can be told on a machine where others are at work; engine and transport are the real ones.
All are measured in turn, and the row has the median of the ratios.

cores: core-seconds of the latents of a finished frame, in one process, with the package's own model: ours against the
``paper`` policy with every step run, in turn in one run (of its last block 4 of 52 latents are trimmed); and what the
planner predicts for eight RTX 4090 and Wan2.1-1.3B at the same settings. Quality is another matter: docs/quality.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.options import parser
from harness.ranks import as_rank, in_processes
from harness.record import record
from harness.synthetic import embeds, synthetic_engine

import dualparal
from dualparal.config.reuse import PRESETS, Reuse
from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.planning.planner import plan

MODEL = str(Path(dualparal.__file__).with_name("moving_shapes"))
UNIT = 0.04  # seconds in which a stage sleeps
WALL = {"height": 32, "width": 32, "num_frames": 253, "num_inference_steps": 20, "output_type": "latent"}
CORES = {"height": 128, "width": 128, "num_frames": 189, "num_inference_steps": 50, "guidance_scale": 4.0}
WAYS = {  # name: options of the engine
    "paper": {"context": "paper"},
    "cached": {},
    "cached, mild": {"reuse": "mild"},
    "cached, strong": {"reuse": "strong"},
}


def as_one_of_two(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    engine = synthetic_engine(job["model"], UNIT, reuse=job["reuse"])
    for chunk in engine.stream(**embeds(engine), **WALL):
        del chunk
    tell({"seconds": engine.stats.seconds if engine.stats else 0.0})


def units(reuse: str, steps: int) -> int:
    """Units of a block with guidance."""
    found = Reuse.of(reuse).plan([1 - step / steps for step in range(steps)], guidance=True)
    return 2 * len(found.runs) - len(found.conditional_only)


def wall(repeats: int) -> list[dict[str, object]]:
    found: dict[str, list[float]] = {name: [] for name in PRESETS}
    with tempfile.TemporaryDirectory() as folder:
        model = str(build_tiny_pipeline(Path(folder), layers=4))
        for _ in range(repeats):
            for name in found:
                job = {"model": model, "reuse": name}
                found[name].append(float(in_processes(__file__, 2, job)[-1]["seconds"]))
                print(f"wall   {name:16s} {found[name][-1]:7.2f} s", flush=True)
    rows: list[dict[str, object]] = []
    steps = int(WALL["num_inference_steps"])  # type: ignore[call-overload]
    for name, seconds in found.items():
        ratio = statistics.median(own / whole for own, whole in zip(seconds, found["off"], strict=True))
        share = units(name, steps) / units("off", steps)
        rows.append(
            {
                "what": "wall, 2 processes",
                "way": name,
                "steps": steps,
                "seconds": round(min(seconds), 2),
                "ratio": round(ratio, 3),
                "units": round(share, 3),
                "off_by": round(ratio / share - 1, 3),
            }
        )
        print(f"wall   {name:16s} {min(seconds):7.2f} s | {ratio:.3f} of off | units {share:.3f} | "
              f"{100 * (ratio / share - 1):+.1f} %", flush=True)  # fmt: skip
    return rows


def core_seconds(options: dict[str, Any]) -> float:
    """Of the latents of a frame, once the model is loaded; padded frames of the last block are not counted."""
    engine = Engine.from_pretrained(MODEL, device="cpu", **options)
    call = {"seed": 1, "output_type": "latent", **CORES}
    prompt = "a red circle moves left on white"
    engine(prompt, **{**call, "num_frames": 33, "num_inference_steps": 2})
    begin = time.process_time()
    engine(prompt, **call)
    return (time.process_time() - begin) / int(CORES["num_frames"])


def predicted(options: dict[str, Any]) -> float:
    """Seconds of 1,025 frames at 480p on eight RTX 4090, by the planner."""
    return plan("wan2.1-t2v-1.3b", "8xrtx4090", num_frames=1025, num_inference_steps=50, **options).seconds


def cores(repeats: int) -> list[dict[str, object]]:
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, options in WAYS.items():
            found[name].append(core_seconds(options))
            print(f"cores  {name:16s} {found[name][-1]:7.4f} s", flush=True)
    cards = {name: predicted(options) for name, options in WAYS.items()}
    rows: list[dict[str, object]] = []
    for name, seconds in found.items():
        ratio = statistics.median(own / paper for own, paper in zip(seconds, found["paper"], strict=True))
        predicted_ratio = cards[name] / cards["paper"]
        rows.append(
            {
                "what": "core-seconds of a frame",
                "way": name,
                "steps": CORES["num_inference_steps"],
                "seconds": round(min(seconds), 4),
                "ratio": round(ratio, 3),
                "predicted_8x4090_seconds": round(cards[name], 1),
                "predicted_ratio": round(predicted_ratio, 3),
            }
        )
        print(f"cores  {name:16s} {min(seconds):7.4f} s | {ratio:.3f} of paper | predicted on 8 x RTX 4090 "
              f"{cards[name]:6.1f} s, {predicted_ratio:.3f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    if as_rank(as_one_of_two):
        return
    arguments = parser(__doc__, repeats=3).parse_args()
    torch.set_num_threads(1)
    for name, measure in (("wall", wall), ("cores", cores)):
        if arguments.only in name:
            rows = measure(arguments.repeats)
            if not arguments.no_record:
                record("reuse", rows, "cpu")


if __name__ == "__main__":
    main()
