"""One way to keep a figure: a row in bench/results/NAME.csv with device, machine, its load, versions and commit."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "results"
# Before the bench makes its own: above 0, somebody else was at work, and timings of computing are worth little.
LOAD = round(os.getloadavg()[0], 1)


def commit() -> str:
    """The commit that is measured, with a + when the tree differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results") else ""
    )


def machine(device: str | None = None) -> str:
    """Name of the GPU, or of the processor, when "cpu" is what was measured or all there is."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return f"{model}, {os.cpu_count()} CPUs"


def record(name: str, rows: list[dict[str, object]], device: str | None = None) -> None:
    """Appends rows of one kind. Columns that the file lacks are added to it, empty in its older rows.

    device: "cpu" or "cuda"; default: cuda where there is one.
    """
    if not rows:
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    common = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": device,
        "machine": machine(device),
        "load": LOAD,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "commit": commit(),
    }
    assert not common.keys() & rows[0].keys(), "a row may not hide where it comes from"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    older: list[dict[str, str]] = []
    columns: list[str] = []
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            older, columns = list(reader), list(reader.fieldnames or [])
    columns += [column for column in [*rows[0], *common] if column not in columns]
    partial = path.with_suffix(".tmp")  # a bench that is stopped here loses no older row
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(older)
        writer.writerows({**row, **common} for row in rows)
    os.replace(partial, path)
