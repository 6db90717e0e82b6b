"""Kills a run at random moments and resumes it, with another number of stages each time, until the video is whole.

    python bench/kill_and_resume.py --kills 50 [--context cached] [--seed 0]

The ranks are processes over gloo (``dualparal generate --device cpu``), the model is tiny with random weights; SIGKILL
goes to the parent or to one rank. At the end, latents and video must be those of an unbroken run, byte for byte. Prints
a line per kill and a summary; exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from dualparal.models.wan.tiny import build_tiny_pipeline

GENERATE = [sys.executable, "-m", "dualparal.cli", "generate"]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*GENERATE, *arguments], stdout=file, stderr=file, env=environment)


def kill(process: subprocess.Popen[bytes], rng: random.Random) -> str:
    """SIGKILL to the parent or to one of its ranks. Returns which."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    victim = rng.choice([process.pid, *(rank.pid for rank in ranks)])
    os.kill(victim, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive, f"{len(alive)} processes survive"
    return "the only process" if not ranks else "the parent" if victim == process.pid else "a rank"


def segments(folder: Path) -> int:
    return len(list(folder.glob("block-*.mp4")))


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--context", default="cached")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--frames", type=int, default=4001, help="of the video (default: %(default)s)")
    given = options.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as name:
        folder = Path(name)
        model = build_tiny_pipeline(folder / "model", layers=4)
        job = [
            *("--model", str(model), "--prompt", "a cat", "--num-frames", str(given.frames), "--height", "32"),
            *("--width", "32", "--steps", "4", "--frames-per-block", "2", "--context-frames", "1", "--device", "cpu"),
            *("--context", given.context, "--threads", "1"),
            *([] if given.context == "paper" else ["--refresh-every", "3"]),
        ]
        whole, broken, kept = folder / "whole.mp4", folder / "broken.mp4", folder / "kept"
        outputs = ["--out", str(whole), "--latents-out", str(folder / "whole.safetensors")]
        began = time.time()
        assert start([*job, *outputs], folder / "whole.log").wait() == 0, (folder / "whole.log").read_text()
        print(f"unbroken run: {time.time() - began:.0f} s", flush=True)
        outputs = ["--out", str(broken), "--latents-out", str(folder / "broken.safetensors")]
        log = folder / "broken.log"
        process = start([*job, *outputs, "--checkpoint", str(kept), "--checkpoint-every", "1"], log)
        kills = 0
        blocks = Path(f"{broken}.blocks")
        while process.poll() is None and kills < given.kills:
            # Most kills while blocks are made, some while it starts.
            before, least = segments(blocks), rng.choice([0, 1, 3, 6])
            deadline = time.time() + 60
            while process.poll() is None and segments(blocks) < before + least and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 8 if least == 0 else 0.3))
            if process.poll() is not None:
                break
            who = kill(process, rng)
            kills += 1
            stages = rng.randint(1, 4)
            print(f"kill {kills}: {who}, {segments(blocks)} segments; going on with {stages}", flush=True)
            if any(kept.glob("snapshot-*")):
                process = start(["--resume", str(kept), "--stages", str(stages), "--checkpoint-every", "1"], log)
            else:
                again = ["--checkpoint", str(kept), "--checkpoint-every", "1", "--overwrite"]
                process = start([*job, *outputs, *again], log)
        code = process.wait()
        same = {
            suffix: whole.with_suffix(suffix).read_bytes() == broken.with_suffix(suffix).read_bytes()
            for suffix in (".mp4", ".safetensors")
            if broken.with_suffix(suffix).exists()
        }
        print(f"{kills} kills, exit code {code}, {time.time() - began:.0f} s, equal to the unbroken run: {same}")
        if code or len(same) < 2 or not all(same.values()):
            print(log.read_text()[-3000:])
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
