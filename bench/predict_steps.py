"""Prediction: few and many steps on one to eight cards, by the best plan there is for each. No GPU.

    python bench/predict_steps.py                     # the table of docs/plan.md

1,025 frames of 832x480. Every number is ``dualparal.plan``'s: a replay of the schedule that the engine walks. "Lanes"
are two half pipelines, one for each branch of guidance, which the engine does not have: half of the cards without
guidance, as if the other half and the exchange of velocities cost nothing.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from dualparal.planning.plan import NoPlan, Plan
from dualparal.planning.planner import plan

FRAMES = 1025
MODELS = (("wan2.1-t2v-14b", "h100"), ("wan2.1-t2v-1.3b", "rtx4090"))
COUNTS = (1, 2, 4, 8)


class Task(NamedTuple):
    """guidance_scale: 1: none. reuse: steps that are not run."""

    name: str
    steps: int
    guidance_scale: float
    reuse: str = "off"


TASKS = (
    Task("T = 4", 4, 1.0),
    Task("T = 8", 8, 1.0),
    Task("T = 50, guidance", 50, 5.0),
    Task("T = 50, guidance, mild", 50, 5.0, "mild"),
)


def fastest(model: str, card: str, count: int, task: Task, guidance_scale: float) -> Plan | None:
    """The fastest plan for a task, or None."""
    steps = {"num_inference_steps": task.steps, "guidance_scale": guidance_scale, "reuse": task.reuse}
    try:
        return plan(model, f"{count}x{card}", num_frames=FRAMES, **steps)
    except NoPlan:
        return None


def cell(found: Plan | None) -> str:
    """The seconds of a plan, those to its first frames, and its N x P + D."""
    if found is None:
        return "-"
    engine = found.work.engine
    way = f"{len(found.split)}x{engine.sequence_parallel}"
    way += f"+{engine.decode_ranks}" if engine.decode_ranks else ""
    limit = f", K {engine.blocks.max_blocks_in_flight}" if engine.blocks.max_blocks_in_flight else ""
    return f"{found.seconds:.0f} ({found.first_frame:.0f}) <sub>{way}{limit}</sub>"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for model, card in MODELS:
        print(f"\n| {model}, {card} | {' | '.join(map(str, COUNTS))} | lanes, 8 |")
        print("|---" * (len(COUNTS) + 2) + "|")
        for task in TASKS:
            cells = [cell(fastest(model, card, count, task, task.guidance_scale)) for count in COUNTS]
            lanes = fastest(model, card, COUNTS[-1] // 2, task, 1.0) if task.guidance_scale > 1 else None
            print(f"| {task.name} | {' | '.join(cells)} | {'' if task.guidance_scale == 1 else cell(lanes)} |")


if __name__ == "__main__":
    main()
