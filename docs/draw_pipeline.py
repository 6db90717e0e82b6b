"""Draws docs/pipeline.png from a real schedule: which block each stage runs, tick by tick.

python docs/draw_pipeline.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dualparal.schedule.actions import Op
from dualparal.schedule.replay import makespan, replay
from dualparal.schedule.schedule import Schedule

STAGES, STEPS, BLOCKS = 4, 5, 7
DECODE = 3  # ticks that the picture gives the VAE for a block


def main() -> None:
    schedule = Schedule(STAGES, STEPS, BLOCKS, "cached", guidance=False)
    events = replay(schedule)[0]
    at = 0
    colours = plt.get_cmap("tab10").colors
    figure, (axes, below) = plt.subplots(2, 1, figsize=(11, 4.2), height_ratios=[4, 2.2], layout="constrained")
    for event in events:
        action = event.action
        if action.op is Op.RUN:
            colour = colours[action.unit.block % 10]
            axes.barh(action.stage, 1, left=event.start, color=colour, alpha=0.35 + 0.13 * action.unit.step, ec="white")
            axes.text(event.start + 0.5, action.stage, f"{action.unit.block}·{action.unit.step}", ha="center",
                      va="center", fontsize=7)  # fmt: skip
        elif action.op is Op.DECODE:
            at = max(at, event.end)
            below.barh(0, DECODE, left=at, color=colours[action.unit.block % 10], ec="white")
            below.text(at + DECODE / 2, 0, f"block {action.unit.block}", ha="center", va="center",
                       fontsize=7)  # fmt: skip
            at += DECODE
    axes.set_yticks(range(STAGES), [f"GPU {k}" for k in range(STAGES)])
    axes.invert_yaxis()
    axes.set_title(f"block·step on {STAGES} GPUs, {STEPS} steps, {BLOCKS} blocks; darker: less noise", fontsize=9)
    below.set_yticks([0], ["VAE"])
    below.set_xlabel("tick")
    for part in (axes, below):
        part.set_xlim(0, makespan(schedule) + DECODE)
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("pipeline.png"), dpi=120)


if __name__ == "__main__":
    main()
