"""What the engine itself costs, and how close two processes come to the schedule's bound. CPU, minutes.

    python bench/bench_engine.py

overhead: microseconds per unit outside the layers' arithmetic, measured with layers that do nothing (their tensors
are made once), in one process with 1 and 2 stages, and over gloo with 2, each also with a timeline. "wall" is the whole
unit, so everything in it is overhead; sampler and noise, which a unit shares with its block, are in it.

efficiency: a model big enough that a unit takes some 10 ms; time of 1 process against 2 (one thread each), beside
the bound that the schedule allows: speed-up = N * (1 - bubble) at equal layer times. Cores share caches, memory and
power, so the same run is also timed with an independent copy of itself on the other core: "machine" is what two
processes that never talk reach together, and the last figure is the share of schedule bound times that.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.options import parser
from harness.ranks import as_rank, in_processes
from harness.record import record
from harness.synthetic import embeds, synthetic_engine

from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.schedule.replay import bubble
from dualparal.schedule.schedule import Schedule


def run(job: dict[str, Any], stages: int | None = None) -> float:
    """Seconds of one measured run after one that warms up."""
    build = Engine.from_pretrained if not job["empty"] else synthetic_engine
    more = {"seconds": 0.0} if job["empty"] else {"device": "cpu"}
    engine = build(job["model"], stages=stages, **more, **job["options"])  # type: ignore[operator]
    call = {**embeds(engine), **job["call"]}
    for frames in (61, call["num_frames"]):
        for _chunk in engine.stream(**{**call, "num_frames": frames}):
            pass
    return engine.stats.seconds if engine.stats is not None else 0.0


def as_one_of_several(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    tell({"seconds": run(job)})


def seconds_of(ranks: int, job: dict[str, Any]) -> float:
    return float(in_processes(__file__, ranks, job)[-1]["seconds"])


def overhead(folder: Path, repeats: int, units_per_block: int = 40, blocks: int = 8) -> list[dict[str, object]]:
    model = str(build_tiny_pipeline(folder / "tiny", layers=4))
    call = {"height": 32, "width": 32, "num_frames": 4 * (8 * blocks - 1) + 1, "output_type": "latent",
            "num_inference_steps": units_per_block // 2}  # fmt: skip
    rows: list[dict[str, object]] = []
    for name, stages, processes in (("1 stage", 1, 1), ("2 stages, 1 process", 2, 1), ("2 stages, gloo", 2, 2)):
        for policy in ("cached", "paper"):
            seconds: dict[str, list[float]] = {"": [], ", timeline": []}
            for _ in range(repeats):  # in turn, so that a noisy machine hits both alike
                for timeline, found in seconds.items():
                    traced = {**call, "timeline": str(folder / "tiny" / "run.json")} if timeline else call
                    job = {"model": model, "call": traced, "options": {"context": policy}, "empty": True}
                    found.append(seconds_of(processes, job) if processes > 1 else run(job, stages))
            units = blocks * units_per_block
            for timeline, found in seconds.items():
                cost = 1e6 * statistics.median(found) / units
                rows.append({"what": name + timeline, "context": policy, "units": units, "us_per_unit": round(cost, 1)})
                print(f"overhead    {name + timeline:30s} {policy:7s} {cost:8.1f} us per unit (median of {repeats})",
                      flush=True)  # fmt: skip
    return rows


def efficiency(folder: Path, repeats: int) -> list[dict[str, object]]:
    model = str(build_tiny_pipeline(folder / "larger", layers=8, heads=4, head_dim=64, ffn_dim=512))
    rows: list[dict[str, object]] = []
    for policy, steps, blocks, guidance in (
        ("cached", 8, 6, 5.0), ("paper", 8, 6, 5.0),
    ):  # fmt: skip
        frames = 4 * (8 * blocks + (4 if policy == "paper" else 0) - 1) + 1
        call = {"height": 96, "width": 96, "num_frames": frames, "num_inference_steps": steps,
                "guidance_scale": guidance, "output_type": "latent"}  # fmt: skip
        schedule = Schedule(2, steps, blocks, policy, guidance=guidance > 1)
        job = {"model": model, "call": call, "options": {"context": policy}, "empty": False}
        ratios, ceilings, unit = [], [], 0.0
        for _ in range(repeats):  # side by side, so that a noisy neighbour hits all alike
            one, two = seconds_of(1, job), seconds_of(2, job)
            ceilings.append(one / seconds_of(2, {**job, "apart": True}))
            ratios.append(one / two)
            unit = 1e3 * one / (schedule.num_units or 1)
        speedup, machine = statistics.median(ratios), statistics.median(ceilings)
        bound = 2 * (1 - bubble(schedule))
        share = speedup / (bound * machine)
        rows.append({"context": policy, "steps": steps, "blocks": blocks, "guidance": guidance > 1,
                     "unit_ms": round(unit, 1), "speedup": round(speedup, 3), "bound": round(bound, 3),
                     "apart": round(machine, 3), "of_bound": round(share, 3)})  # fmt: skip
        print(f"efficiency  {policy:7s} T={steps} M={blocks} guidance={guidance > 1!s:5s} unit {unit:6.1f} ms | "
              f"speed-up of 2 processes {speedup:.2f} | schedule {bound:.2f} x machine {machine:.2f} | "
              f"{100 * share:.0f} %", flush=True)  # fmt: skip
    return rows


def main() -> None:
    if as_rank(as_one_of_several):
        return
    arguments = parser(__doc__, repeats=3).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("overhead", overhead), ("efficiency", efficiency)):
            if arguments.only in name:
                rows = measure(Path(folder) / name, arguments.repeats)
                if not arguments.no_record:
                    record(f"engine_{name}", rows, "cpu")


if __name__ == "__main__":
    main()
