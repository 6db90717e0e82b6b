"""Memory does not grow with the length of the video, on any rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from steady_heap import STEADY

SIZE = 128


def peaks(model: Path, out: Path, frames: int) -> list[float]:
    """Peak memory per rank in GiB, from the closing line of a run over two processes."""
    command = [
        *(sys.executable, "-m", "dualparal.cli", "generate", "--prompt", "a cat", "--model", str(model)),
        *("--device", "cpu", "--stages", "2", "--num-frames", str(frames), "--steps", "1", "--guidance-scale", "1"),
        *("--height", str(SIZE), "--width", str(SIZE), "--out", str(out), "--frames-per-block", "2"),
        *("--context-frames", "1"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **STEADY}
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak memory per rank ([0-9., ]+) GiB", done.stderr)
    assert found, done.stderr
    return [float(value) for value in found[1].split(",")]


def test_a_four_times_longer_video_needs_no_more_memory(wan21: Path, tmp_path: Path) -> None:
    short = peaks(wan21, tmp_path / "short.mp4", 61)
    long = peaks(wan21, tmp_path / "long.mp4", 241)
    for rank, (before, after) in enumerate(zip(short, long, strict=True)):
        # Frames that somebody holds on to would weigh 34 MiB (as floats), some 7 % of a rank's own size.
        assert after <= before + 0.02, f"rank {rank}: {before} -> {after} GiB"
