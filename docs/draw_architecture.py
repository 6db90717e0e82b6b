"""Draws docs/architecture.png from the imports of the tree: a box per package, an arrow to each that it imports.

An arrow is left out where a chain of others leads to the same package: else there would be some fifty.

python docs/draw_architecture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(next((ROOT / "tests").rglob("test_architecture.py")).parent))
from test_architecture import imports, modules, package  # noqa: E402

PLACES = {  # column, row
    "cli": (5.0, -2),
    "hosts": (2.4, -1),
    "server": (6.6, -1),
    "workers": (4.2, 0),
    "engine": (4.2, 1),
    "planning": (6.6, 2),
    "runtime": (2.9, 2),
    "reference": (9.0, 2),
    "decoding": (4.2, 3),
    "checkpoint": (0.8, 2),
    "models": (7.6, 4),
    "sampling": (6.8, 5),
    "distributed": (2.7, 5),
    "trace": (4.6, 5),
    "kernels": (9.0, 5),
    "launch": (2.8, 6),
    "schedule": (5.4, 6),
    "io": (1.2, 7),
    "config": (6.0, 7),
    "_C": (9.0, 7),
}
APART = {"device", "dualparal", "from_source", "version"}  # small files at the top, used from anywhere
HOLDS = {
    "cli": "flags, ranks, progress",
    "hosts": "inside a stock pipeline",
    "server": "HTTP, queue, page",
    "workers": "ranks from Python",
    "engine": "public calls, one run",
    "launch": "processes, whose fault",
    "planning": "cost, memory, search",
    "runtime": "walks the schedule",
    "reference": "the oracle",
    "decoding": "latents to frames",
    "checkpoint": "snapshots",
    "models": "families, weights",
    "distributed": "ranks, messages",
    "trace": "times, timeline",
    "sampling": "noise, one update",
    "kernels": "fused ops",
    "schedule": "the order of work",
    "io": "files, video",
    "_C": "csrc/",
    "config": "checked values",
}


def reach(start: str, pairs: set[tuple[str, str]]) -> set[str]:
    below = {end for begin, end in pairs if begin == start}
    return below.union(*(reach(name, pairs) for name in below))


def main() -> None:
    known = modules(ROOT)
    pairs = {(package(m), package(name)) for m, path in known.items() for _, name in imports(m, path, known)}
    if missing := {package(m) for m in known} - PLACES.keys() - APART:
        raise SystemExit(f"no place for {', '.join(sorted(missing))}: give them one in PLACES")
    places = {name: (column, -row) for name, (column, row) in PLACES.items()}
    pairs = {(start, end) for start, end in pairs if start != end and start in places and end in places}
    direct = {(a, b) for a, b in pairs if not any(b in reach(c, pairs) for start, c in pairs if start == a)}
    figure, axes = plt.subplots(figsize=(10, 8), layout="constrained")
    for start, end in sorted(direct):
        (x, y), (to, below) = places[start], places[end]
        arrow = {"arrowstyle": "-|>", "color": "tab:blue", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (to, below + 0.27), (x, y - 0.27), arrowprops=arrow)
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "black"}
        axes.text(x, y, f"{name}\n{HOLDS[name]}", ha="center", va="center", fontsize=9, bbox=box)
    axes.set_xlim(0, 10)
    axes.set_ylim(-7.4, 2.4)
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("architecture.png"), dpi=110)


if __name__ == "__main__":
    main()
