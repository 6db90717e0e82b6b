"""Draws docs/scaling.png: how the pipeline scales over stages, steps, blocks and length.

    python bench/bench_pipeline.py && python bench/draw.py

From the newest rows of bench/results/pipeline.csv, one per case; dashed is what the schedule allows. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness.record import RESULTS

Row = dict[str, Any]
TARGET = Path(__file__).resolve().parents[1] / "docs" / "scaling.png"
KEY = ("context", "stages", "steps", "blocks", "guidance")
TEXT = {"context", "guidance", "date", "device", "machine", "torch", "diffusers", "commit"}


def newest(path: Path) -> list[Row]:
    """The last row of each case, with numbers for numbers.

    Raises:
        SystemExit: there are none.
    """
    if not path.exists():
        raise SystemExit(f"{path} is not there: run bench/bench_pipeline.py first")
    found: dict[tuple[str, ...], Row] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            found[tuple(row[key] for key in KEY)] = {k: v if k in TEXT else float(v) for k, v in row.items()}
    return list(found.values())


def curves(axes: Any, rows: list[Row], x: str, family: str, ours: Callable[[Row], float],
           schedule: Callable[[Row], float] | None, label: str) -> None:  # fmt: skip
    """A curve over ``x`` for every value of ``family``."""
    for number, value in enumerate(sorted({row[family] for row in rows})):
        members = sorted((row for row in rows if row[family] == value), key=lambda row: row[x])
        at = [row[x] for row in members]
        name = f"{label}{value:g}" if isinstance(value, float) else str(value)
        axes.plot(at, [ours(row) for row in members], "o-", color=f"C{number}", markersize=4, label=name)
        if schedule is not None:
            axes.plot(at, [schedule(row) for row in members], "--", color=f"C{number}", linewidth=1)
    if rows:
        axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)


def draw(rows: list[Row], target: Path) -> None:
    def speedup(row: Row) -> float:
        return float(row["speedup"])

    def allowed(row: Row) -> float:
        return float(row["speedup"] * row["seconds"] / row["schedule_s"])

    figure, ((stages, steps), (blocks, length)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    plain = [row for row in rows if row["context"] == "cached" and row["guidance"] == "False"]
    several = [row for row in plain if row["stages"] > 1]

    kinds = [
        {**row, "kind": row["context"] + (", guidance" if row["guidance"] == "True" else "")}
        for row in rows
        if (row["steps"], row["blocks"]) == (8, 8)
    ]
    curves(stages, kinds, "stages", "kind", speedup, allowed, "")
    stages.set(title="speed-up over one process, T = 8, M = 8", xlabel="stages N", xticks=[1, 2, 4, 8])

    curves(steps, [row for row in several if row["blocks"] == 8], "steps", "stages", speedup, allowed, "N = ")
    steps.set(title="speed-up, M = 8, no guidance", xlabel="steps T")
    steps.set_xscale("log", base=2)

    of_length = [row for row in several if row["steps"] == 8]
    curves(blocks, of_length, "blocks", "stages", speedup, allowed, "N = ")
    blocks.set(title="speed-up, T = 8, no guidance", xlabel="blocks M")
    blocks.set_xscale("log", base=2)

    curves(length, of_length, "frames", "stages", lambda row: row["seconds"], lambda row: row["schedule_s"], "N = ")
    for number, value in enumerate(sorted({row["stages"] for row in of_length})):
        members = sorted((row for row in of_length if row["stages"] == value), key=lambda row: row["frames"])
        length.plot([r["frames"] for r in members], [r["first_s"] for r in members], ":", color=f"C{number}")
    length.set(title="seconds: the whole video, and (dotted) its first frames; T = 8", xlabel="frames")

    origin = rows[-1]
    unit = min(row["unit_ms"] * row["stages"] for row in rows)
    figure.suptitle(
        f"Layers that only sleep ({unit:g} ms per unit through all stages), {origin['device'].upper()}, real engine, "
        f"gloo between processes; dashed: the schedule.\n{origin['machine']}, load of others {origin['load']:g}, "
        f"{origin['date']}, commit {origin['commit']}",
        fontsize=9,
    )
    figure.savefig(target, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=TARGET, help="the picture (default: %(default)s)")
    arguments = options.parse_args()
    draw(newest(RESULTS / "pipeline.csv"), arguments.out)


if __name__ == "__main__":
    main()
