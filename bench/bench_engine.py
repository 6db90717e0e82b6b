"""What the engine itself costs, and how close two processes come to the schedule's bound. CPU, minutes.

    python bench/bench_engine.py

overhead: microseconds per unit outside the layers' arithmetic, measured with layers that do nothing (their tensors
are made once), in one process with 1 and 2 stages, and over gloo with 2. "wall" is the whole unit, so everything in
it is overhead; sampler and noise, which a unit shares with its block, are in it.

efficiency: a model big enough that a unit takes some 10 ms; time of 1 process against 2 (one thread each), beside
the bound that the schedule allows: speed-up = N * (1 - bubble) at equal layer times. Cores share caches, memory and
power, so the same run is also timed with an independent copy of itself on the other core: "machine" is what two
processes that never talk reach together, and the last figure is the share of schedule bound times that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import record

from dualparal.engine import Engine
from dualparal.heartbeat import Heartbeat
from dualparal.models.base import Grid, Pending, TimeCondition
from dualparal.schedule import Schedule
from dualparal.supervisor import supervise
from dualparal.tiny import build_tiny_pipeline
from dualparal.trace import RunStats

REPEATS = 3


class NoLayers:
    """A slice that takes no time: the right shapes, made once."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _zeros(self, name: str, key: int, shape: tuple[int, ...]) -> torch.Tensor:
        if (name, key) not in self._made:
            self._made[name, key] = torch.zeros(shape, dtype=self._inner.dtype)
        return self._made[name, key]

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
        return self._zeros("hidden", tokens, (tokens, self._inner.inner_dim))

    def layer(self, index: int, hidden: torch.Tensor, pending: Any, *rest: Any) -> tuple[torch.Tensor, Pending]:
        return hidden, (hidden, None)

    def finish(self, hidden: torch.Tensor, pending: Pending | None) -> torch.Tensor:
        return hidden

    def head(self, hidden: torch.Tensor, pending: Pending | None, time: TimeCondition, grid: Grid) -> torch.Tensor:
        frames = len(hidden) // grid.tokens
        return self._zeros("velocity", frames, (1, self._inner.spec.in_channels, frames, grid.height, grid.width))


def run(model: str, stages: int | None, call: dict[str, Any], options: dict[str, Any], empty: bool) -> RunStats | None:
    """One measured run after one that warms up. Rank 0 gets the figures."""
    engine = Engine.from_pretrained(model, device="cpu", stages=stages, **options)
    engine._load()
    if empty:
        engine._slices = {k: [NoLayers(s) for s in slices] for k, slices in engine._slices.items()}  # type: ignore[misc]
    embeds = torch.zeros(1, 8, engine.source.spec.text_dim)
    prompt = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    for frames in (61, call["num_frames"]):
        for _chunk in engine.stream(**prompt, **{**call, "num_frames": frames}):
            pass
    return engine.stats


def in_processes(ranks: int, job: dict[str, Any]) -> RunStats:
    """The same in several processes; rank 0 tells its time through the supervisor's pipe."""
    heard: list[float] = []

    def listen(rank: int, message: dict[str, Any]) -> None:
        if "seconds" in message:
            heard.append(message["seconds"])

    job_text = json.dumps(job)
    result = supervise(
        [sys.executable, __file__, "--rank", job_text], ranks, env={"OMP_NUM_THREADS": "1"}, on_message=listen
    )
    assert result.exit_code == 0 and heard, result
    return RunStats(0, 0, heard[-1], None, ())


def as_rank(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    heartbeat = Heartbeat.from_env()
    rank = os.environ["RANK"]
    if job.get("apart"):
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
    stats = run(job["model"], None, job["call"], job["options"], job["empty"])
    if rank == "0":
        assert stats is not None
        heartbeat.message(seconds=stats.seconds)
    heartbeat.done()


def overhead(folder: Path, units_per_block: int = 40, blocks: int = 8) -> list[dict[str, object]]:
    model = str(build_tiny_pipeline(folder / "tiny", layers=4))
    call = {"height": 32, "width": 32, "num_frames": 4 * (8 * blocks - 1) + 1, "output_type": "latent",
            "num_inference_steps": units_per_block // 2}  # fmt: skip
    rows = []
    for name, stages, processes in (("1 stage", 1, 1), ("2 stages, 1 process", 2, 1), ("2 stages, gloo", 2, 2)):
        for policy in ("cached", "paper"):
            job = {"model": model, "call": call, "options": {"context": policy}, "empty": True}
            seconds = []
            for _ in range(REPEATS):
                if processes > 1:
                    seconds.append(in_processes(processes, job).seconds)
                else:
                    stats = run(model, stages, call, {"context": policy}, empty=True)
                    assert stats is not None
                    seconds.append(stats.seconds)
            units = blocks * units_per_block
            cost = 1e6 * statistics.median(seconds) / units
            rows.append({"what": name, "context": policy, "units": units, "us_per_unit": round(cost, 1)})
            print(f"overhead    {name:22s} {policy:7s} {cost:8.1f} us per unit (median of {REPEATS})", flush=True)
    return rows


def efficiency(folder: Path) -> list[dict[str, object]]:
    model = str(build_tiny_pipeline(folder / "larger", layers=8, heads=4, head_dim=64, ffn_dim=512))
    rows = []
    for policy, steps, blocks, guidance in (
        ("cached", 8, 6, 5.0), ("paper", 8, 6, 5.0),
    ):  # fmt: skip
        frames = 4 * (8 * blocks + (4 if policy == "paper" else 0) - 1) + 1
        call = {"height": 96, "width": 96, "num_frames": frames, "num_inference_steps": steps,
                "guidance_scale": guidance, "output_type": "latent"}  # fmt: skip
        schedule = Schedule(2, steps, blocks, policy, guidance=guidance > 1)
        job = {"model": model, "call": call, "options": {"context": policy}, "empty": False}
        ratios, ceilings, unit = [], [], 0.0
        for _ in range(REPEATS):  # side by side, so that a noisy neighbour hits all alike
            one, two = in_processes(1, job).seconds, in_processes(2, job).seconds
            ceilings.append(one / in_processes(2, {**job, "apart": True}).seconds)
            ratios.append(one / two)
            unit = 1e3 * one / (schedule.num_units or 1)
        speedup, machine = statistics.median(ratios), statistics.median(ceilings)
        bound = 2 * (1 - schedule.bubble)
        share = speedup / (bound * machine)
        rows.append({"context": policy, "steps": steps, "blocks": blocks, "guidance": guidance > 1,
                     "unit_ms": round(unit, 1), "speedup": round(speedup, 3), "bound": round(bound, 3),
                     "apart": round(machine, 3), "of_bound": round(share, 3)})  # fmt: skip
        print(f"efficiency  {policy:7s} T={steps} M={blocks} guidance={guidance > 1!s:5s} unit {unit:6.1f} ms | "
              f"speed-up of 2 processes {speedup:.2f} | schedule {bound:.2f} x machine {machine:.2f} | "
              f"{100 * share:.0f} %", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--only", choices=["overhead", "efficiency"])
    arguments = parser.parse_args()
    if arguments.rank:
        as_rank(json.loads(arguments.rank))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("overhead", overhead), ("efficiency", efficiency)):
            if arguments.only in (None, name):
                rows = measure(Path(folder) / name)
                if not arguments.no_record:
                    record(f"engine_{name}", rows)


if __name__ == "__main__":
    main()
