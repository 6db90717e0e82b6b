"""One rank of bench_simulate.py: the real executor and transport over gloo, with a stage that sleeps.

Reads cases from a JSON file; writes what this rank did, and when, to ``rank<k>.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dualparal.config.blocks import BlockConfig
from dualparal.config.reuse import REUSE_OFF
from dualparal.distributed.mesh import Mesh
from dualparal.distributed.messages import Lengths
from dualparal.distributed.prompts import PromptChannel
from dualparal.distributed.remote import ReceiveEdge, SendEdge, make_groups, warm_up
from dualparal.launch.heartbeat import Heartbeat
from dualparal.runtime.executor import FirstStage, Links, StageExecutor, run_together
from dualparal.runtime.latents import LatentQueue
from dualparal.runtime.stage import UnitPlan
from dualparal.schedule.actions import Unit
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule
from dualparal.trace.clock import BusyClock

CHANNELS, SIDE, INNER = 1, 2, 4


class SleepingStage:
    """Stands in for ``Stage``: a unit takes a known time, and its numbers mean nothing."""

    inner_dim = INNER

    def __init__(self, seconds: float, first: bool, last: bool) -> None:
        self.seconds, self.first, self.last = seconds, first, last
        self._prompts: set[int] = set()

    def knows_prompt(self, prompt: int) -> bool:
        return prompt in self._prompts

    def add_prompt(self, prompt: int, embeds: torch.Tensor) -> None:
        self._prompts.add(prompt)

    def keep_prompts(self, used: set[int]) -> None:
        self._prompts &= used

    def run(self, hidden: torch.Tensor, plan: UnitPlan) -> torch.Tensor:
        time.sleep(self.seconds)
        frames = len(plan.window)
        if self.last:
            return torch.zeros(1, CHANNELS, frames - plan.fed_context, SIDE, SIDE)
        return torch.zeros(frames * SIDE * SIDE, INNER)


class PlainSampler:
    """Stands in for ``Sampler``: adds the velocity."""

    def __init__(self, steps: int) -> None:
        self.timesteps = torch.arange(steps)

    def start(self, block: int) -> PlainSampler:
        return self

    def step(self, velocity: torch.Tensor, step: int, latents: torch.Tensor) -> torch.Tensor:
        return latents + velocity


def run(case: dict[str, Any], mesh: Mesh, groups: Sequence[Any]) -> dict[str, Any]:
    schedule = Schedule(**case["schedule"])
    layout = Layout(BlockConfig(2, schedule.context_frames, schedule.context), case["latents"])
    assert layout.num_blocks == schedule.num_blocks
    rank, n, before, after = mesh.rank, mesh.world_size, mesh.before, mesh.after
    hidden = layout.max_window_frames * SIDE * SIDE * INNER + 1
    most = [hidden] * (n - 1) + [layout.first_frames * CHANNELS * SIDE * SIDE + 1]

    def length(velocity: bool, unit: Unit) -> int:
        frames = layout.frames(unit.block) if velocity else len(layout.window(unit.block, schedule.refreshes(unit)))
        return frames * SIDE * SIDE * (CHANNELS if velocity else INNER) + 1

    sizes = [Lengths(elements, partial(length, edge == n - 1)) for edge, elements in enumerate(most)]
    common = schedule.depth, schedule.num_units, torch.float32, mesh.device

    def queue(video: int) -> LatentQueue:
        return LatentQueue(
            schedule,
            layout,
            PlainSampler(schedule.num_steps),  # type: ignore[arg-type]
            lambda block: torch.zeros(1, CHANNELS, layout.frames(block), SIDE, SIDE),
            lambda block: 0,
            lambda prompt: torch.zeros(schedule.branches, 1, 1),
            REUSE_OFF.plan([0.0] * schedule.num_steps, schedule.guidance),
            [1.0] * schedule.num_steps,
            mesh.device,
        )

    log: list[tuple[Any, ...]] = []

    def report(phase: str, unit: Unit) -> None:
        log.append((phase, *unit, time.monotonic()))

    leading = None
    if mesh.is_leader:
        leading = FirstStage([queue(video) for video in range(schedule.num_videos)], lambda video, block, latents: None)
    clock = BusyClock(mesh.device)
    executor = StageExecutor(
        schedule,
        layout,
        rank,
        SleepingStage(case["seconds"][rank], rank == 0, rank == n - 1),  # type: ignore[arg-type]
        Links(
            PromptChannel((schedule.branches, 1, 1), torch.float32, rank, n),
            ReceiveEdge(f"edge {before}", before, groups[before], sizes[before], *common),
            SendEdge(f"edge {rank}", after, groups[rank], sizes[rank], *common),
        ),
        clock,
        leading,
        report,
    )
    for _ in run_together([executor]):
        pass
    return {"log": log, "end": time.monotonic(), "busy": clock.seconds}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    heartbeat = Heartbeat.from_env()
    mesh = Mesh.join("cpu")
    groups = make_groups(mesh.world_size, mesh.device)
    warm_up(groups, mesh.rank, mesh.device)
    results = []
    for number, case in enumerate(json.loads((path / "cases.json").read_text())):
        heartbeat.phase("run", stage=mesh.rank, block=number)
        mesh.clock_offset()  # waits for all
        results.append(run(case, mesh, groups))
    (path / f"rank{mesh.rank}.json").write_text(json.dumps(results))
    heartbeat.done()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
