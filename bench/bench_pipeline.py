"""How the pipeline scales over stages N, steps T and blocks M (the length), with layers that only take time. CPU.

    python bench/bench_pipeline.py              # minutes: N = 1, 2, 4, 8 processes of this machine
    python bench/bench_pipeline.py --sequence-parallel 2 --stages 2 4 --only T=4    # two processes a stage
    python bench/draw.py                        # its rows as docs/scaling.png

The engine, the schedule, the sampler and the gloo transport are real; a unit is a sleep of --model-ms / N on every
stage (of several processes a stage, divided by these too, and they swap tensors in every layer), so there may be more
processes than cores, and the bench says nothing about computing. Side by side, for the same video:

ours       the whole pipeline, without guidance (one unit per block-step) and with it (two)
one block  the same processes with one block in flight at a time: a stock model split by layers, which is what
           ``device_map`` or a plain pipeline does. Measured for one block, times the number of blocks.
schedule   what the schedule allows when units take exactly so long and everything else takes no time

"excess" is our time over the schedule's: what engine, transport, processes and the inexact sleep cost. Of --repeats
runs the fastest counts: it is the least disturbed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness.options import parser
from harness.ranks import as_rank, in_processes
from harness.record import record
from harness.synthetic import embeds, synthetic_engine

from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.schedule.replay import bubble, makespan
from dualparal.schedule.schedule import Schedule

STAGES = (1, 2, 4, 8)


class Case(NamedTuple):
    steps: int  # T
    blocks: int  # M
    context: str = "cached"
    guidance: bool = False

    @property
    def name(self) -> str:
        return f"{self.context} T={self.steps} M={self.blocks}" + (" guidance" if self.guidance else "")

    @property
    def frames(self) -> int:
        """Pixel frames of so many blocks of 8 latent ones; of ``paper`` the first has 4 more."""
        return 4 * (8 * self.blocks + (4 if self.context == "paper" else 0) - 1) + 1


CASES = [
    *(Case(steps, 8) for steps in (2, 4, 8, 16, 32)),
    *(Case(8, blocks) for blocks in (1, 2, 4, 16, 32)),
    Case(8, 8, guidance=True),
    Case(8, 8, "prior"),
    Case(8, 8, "paper"),
]


def work(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """All cases in these processes, one after the other."""
    for steps, blocks, context, guidance in job["cases"]:
        places = job["places"]
        engine = synthetic_engine(job["model"], job["stage_seconds"], context=context, sequence_parallel=places)
        side = 32 if places == 1 else 16 * math.ceil(math.sqrt(8 * places))  # 64 tokens for each place
        call = {**embeds(engine), "height": side, "width": side, "num_inference_steps": steps,
                "guidance_scale": 5.0 if guidance else 1.0, "output_type": "latent"}  # fmt: skip
        for frames in (Case(steps, 1, context).frames, Case(steps, blocks, context).frames) * job["repeats"]:
            for _chunk in engine.stream(**call, num_frames=frames):
                pass
            if engine.stats is not None:
                tell({"seconds": engine.stats.seconds, "first": engine.stats.first_frame,
                      "bubble": engine.stats.bubble})  # fmt: skip


def measure(
    model: str, stages: int, places: int, cases: list[Case], model_seconds: float, repeats: int
) -> Iterator[dict[str, object]]:
    """A row per case with so many stages of so many processes."""
    unit = model_seconds / (stages * places)
    job = {"model": model, "cases": cases, "stage_seconds": unit, "repeats": repeats, "places": places}
    heard = iter(in_processes(__file__, stages * places, job))
    for case in cases:
        runs = [(next(heard), next(heard)) for _ in range(repeats)]
        alone, whole = (min(of_one_kind, key=lambda run: run["seconds"]) for of_one_kind in zip(*runs))
        schedule = Schedule(stages, case.steps, case.blocks, case.context, guidance=case.guidance, decode=False)
        ideal = makespan(schedule) * unit
        one_block = alone["seconds"] * case.blocks
        yield {
            "context": case.context,
            "stages": stages,
            **({"places": places} if places > 1 else {}),
            "steps": case.steps,
            "blocks": case.blocks,
            "guidance": case.guidance,
            "frames": case.frames,
            "unit_ms": round(1e3 * unit, 3),
            "seconds": round(whole["seconds"], 3),
            "first_s": round(whole["first"], 3),
            "schedule_s": round(ideal, 3),
            "excess": round(whole["seconds"] / ideal - 1, 4),
            "one_block_s": round(one_block, 3),
            "times_one_block": round(one_block / whole["seconds"], 3),
            "speedup": round(case.blocks * case.steps * (2 if case.guidance else 1) * model_seconds
                             / whole["seconds"], 3),
            "bubble": round(whole["bubble"], 4),
            "schedule_bubble": round(bubble(schedule), 4),
        }  # fmt: skip


def main() -> None:
    if as_rank(work):
        return
    options = parser(__doc__, repeats=3)
    options.add_argument("--model-ms", type=float, default=160.0, help="of a unit through all stages")
    options.add_argument("--stages", type=int, nargs="+", default=STAGES, help="numbers of stages")
    options.add_argument("--sequence-parallel", type=int, default=1, help="processes of each stage")
    arguments = options.parse_args()
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        options.error(f"--only {arguments.only!r}: no case has this in its name: {', '.join(c.name for c in CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        places = arguments.sequence_parallel
        model = str(build_tiny_pipeline(Path(folder) / "tiny", layers=max(arguments.stages), heads=max(2, places)))
        for stages in arguments.stages:
            rows = []
            # One process takes as long as its sleeps, whatever T and M.
            some = [case for case in cases if stages > 1 or (case.steps, case.blocks) == (8, 8)]
            for case, row in zip(
                some, measure(model, stages, places, some, arguments.model_ms / 1e3, arguments.repeats)
            ):
                rows.append(row)
                name = f"N={stages}" + (f" P={places}" if places > 1 else "")
                print(f"pipeline {name} {case.name:22s} ours {row['seconds']:7.2f} s, "
                      f"first frames {row['first_s']:6.2f} s | one block at a time {row['one_block_s']:7.2f} s, "
                      f"{row['times_one_block']:.2f}x | schedule {row['schedule_s']:7.2f} s, "
                      f"excess {100 * row['excess']:.1f} % | "  # type: ignore[operator]
                      f"speed-up {row['speedup']:.2f} of {stages * places}", flush=True)  # fmt: skip
            if not arguments.no_record:
                record("pipeline", rows, "cpu")


if __name__ == "__main__":
    main()
