"""Kills runs at random moments, their last second included, and goes on each time until the video is whole.

    python bench/kill_and_resume.py --kills 50 --ends 20 [--context cached] [--frames 161] [--seed 0]

The ranks are processes over gloo (``dualparal generate --device cpu``), the model is tiny with random weights; SIGKILL
goes to the parent or to one rank, and the run goes on with 1 to 3 stages. Kills of the end come within half a second
after the last block was written: latents, join, the last snapshots and the removal of what nobody needs. Each
video and its latents must be those of an unbroken run, byte for byte, no process may be left, nor any file. Prints a
line per kill and a summary; exit code 1 when anything differs.
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
from collections.abc import Callable
from pathlib import Path

import psutil

from dualparal.models.wan.tiny import build_tiny_pipeline

GENERATE = [sys.executable, "-m", "dualparal.cli", "generate"]
_MIDDLE = 3  # most kills of one run before its end
_HANGS = 900.0  # seconds


class Run:
    """A run in a folder, started and gone on with as often as it is killed."""

    def __init__(self, job: list[str], folder: Path, blocks: int, rng: random.Random) -> None:
        folder.mkdir()
        self.folder, self.rng, self.count, self.done = folder, rng, blocks, False
        self.outputs = [folder / "a.mp4", folder / "a.safetensors"]
        out, latents = map(str, self.outputs)
        self.fresh = [*job, "--out", out, "--latents-out", latents, "--checkpoint", str(folder / "kept")]
        self.log = folder / "said"
        self.process = start([*self.fresh, "--checkpoint-every", "1"], self.log)
        self.began = time.monotonic()

    def segments(self) -> int:
        return len(list((self.folder / "a.mp4.blocks").glob("block-*.mp4")))

    def over(self) -> bool:
        """True once the process has ended. Raises RuntimeError when it hangs."""
        if time.monotonic() > self.began + _HANGS:
            raise RuntimeError(f"no end after {_HANGS:.0f} s: {self.log.read_text()[-3000:]}")
        return self.process.poll() is not None

    def wait(self, until: Callable[[], bool]) -> bool:
        """Waits for a condition; False: the process ended before."""
        while not self.over():
            if until():
                return True
            time.sleep(0.003)
        return False

    def kill(self, after: float) -> str | None:
        """SIGKILL to the parent or one of its ranks after so many seconds. Returns which; None: it had ended."""
        due = time.monotonic() + after
        if not self.wait(lambda: time.monotonic() >= due):
            return None
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        victim = self.rng.choice([self.process.pid, *(rank.pid for rank in ranks)])
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return None  # a rank that is done
        if self.process.wait(_HANGS) == 0:
            return None
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive, f"{len(alive)} processes survive"
        return "the only process" if not ranks else "the parent" if victim == self.process.pid else "a rank"

    def go_on(self) -> str:
        """Starts the command which the folder needs. Returns it in words; empty: there is nothing left to do."""
        stages, self.began = self.rng.randint(1, 3), time.monotonic()
        if any((self.folder / "kept").glob("snapshot-*")):
            again = ["--resume", str(self.folder / "kept"), "--stages", str(stages), "--checkpoint-every", "1"]
            self.process = start(again, self.log)
            return f"going on with {stages}"
        assert not self.segments(), "finished blocks, and no snapshot to go on from"
        if all(path.exists() for path in self.outputs):
            self.done = True  # the kill came after everything
            return ""
        self.process = start([*self.fresh, "--checkpoint-every", "1", "--overwrite"], self.log)
        return "starting anew"

    def end(self, whole: list[bytes]) -> str:
        """Waits for the end of the run. Returns what is wrong with what it left; empty: nothing."""
        while not self.over():
            time.sleep(0.05)
        if self.process.returncode and not self.done:
            return f"exit code {self.process.returncode}: {self.log.read_text()[-3000:]}"
        # Where the last kill came after everything, a lock file may be left, which locks nobody out, and word of it.
        told = (".lock", ".error.json") if self.done else ()
        left = sorted(path.name for path in self.folder.iterdir() if not path.name.endswith(told))
        if left != ["a.mp4", "a.safetensors", "said"]:
            return f"left: {left}"
        return "" if [path.read_bytes() for path in self.outputs] == whole else "other bytes"


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*GENERATE, *arguments], stdout=file, stderr=file, env=environment)


def kills_of(run: Run, middle: int, at_end: int) -> list[str]:
    """Kills a run so often while it is under way, and so often at its end. Returns the moments that hit."""
    hit = []
    for number in range(middle + at_end):
        ending = number >= middle
        if ending:
            # A run that goes on after its last block has no moment to wait for: any of its life will do.
            later = run.segments() == run.count or not (run.folder / "a.mp4.blocks").exists()
            late = run.rng.uniform(0, 6) if later and hit else run.rng.uniform(0, 0.5)
            seen = run.wait(lambda: run.segments() >= run.count)
        else:
            before, more = run.segments(), run.rng.choice([0, 1, 3, 6])
            late = run.rng.uniform(0, 8 if more == 0 else 0.3)
            seen = run.wait(lambda wanted=before + more: run.segments() >= min(wanted, run.count - 1))  # type: ignore[misc]
        who = run.kill(late) if seen else None
        if who is None:
            break
        at = "the end" if ending else "under way"
        segments, then = run.segments(), run.go_on()
        print(f"  {at}, {late:.2f} s: {who}, {segments} segments; {then or 'all was done'}", flush=True)
        hit.append(at)
        if not then:
            break
    return hit


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--ends", type=int, default=20, help="of them at the end (default: %(default)s)")
    options.add_argument("--context", default="cached")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--frames", type=int, default=161, help="of a video (default: %(default)s)")
    given = options.parse_args()
    rng, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as name:
        folder = Path(name)
        model = build_tiny_pipeline(folder / "model", layers=3)
        job = [
            *("--model", str(model), "--prompt", "a cat", "--num-frames", str(given.frames), "--height", "32"),
            *("--width", "32", "--steps", "4", "--frames-per-block", "2", "--context-frames", "1", "--device", "cpu"),
            *("--context", given.context, "--threads", "1"),
            *([] if given.context == "paper" else ["--refresh-every", "3"]),
        ]
        kept = ["--out", str(folder / "whole.mp4"), "--latents-out", str(folder / "whole.safetensors"), "--keep-blocks"]
        assert start([*job, *kept], folder / "log").wait() == 0, (folder / "log").read_text()
        whole = [(folder / f"whole{ending}").read_bytes() for ending in (".mp4", ".safetensors")]
        blocks = len(list((folder / "whole.mp4.blocks").glob("block-*.mp4")))
        print(f"unbroken run of {blocks} blocks: {time.monotonic() - began:.0f} s", flush=True)
        hit: list[str] = []
        runs = wrong = late = 0
        while len(hit) < given.kills:
            ends = given.ends - hit.count("the end")
            middle = min(rng.randint(0, _MIDDLE), given.kills - len(hit) - ends)
            run = Run(job, folder / f"run-{runs}", blocks, rng)
            hit += kills_of(run, middle, min(rng.randint(1, 2), ends))
            fault, runs = run.end(whole), runs + 1
            wrong, late = wrong + bool(fault), late + run.done
            print(f"run {runs}: {fault or 'equal to the unbroken run'}; {len(hit)} kills", flush=True)
    print(
        f"{len(hit)} kills in {runs} runs, {hit.count('the end')} of them at the end ({late} when all was done); "
        f"{runs - wrong} runs are equal to the unbroken one; {time.monotonic() - began:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
