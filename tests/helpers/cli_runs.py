"""Runs of ``dualparal generate`` and what they leave."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import av
import psutil


def decode(path: Path) -> int:
    """Decodes every frame; the header alone would believe a file that is cut."""
    with av.open(str(path)) as container:
        return sum(1 for frame in container.decode(video=0) if frame.width == frame.height and frame.width in (32, 64))


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Run:
    """``dualparal generate`` as a process."""

    def __init__(self, folder: Path, *arguments: object, launcher: tuple[str, ...] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "stderr.txt"
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "dualparal.cli", "generate", *map(str, arguments)],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**clean, "COLUMNS": "200"},
            )
        self.ranks: dict[int, psutil.Process] = {}

    @property
    def stderr(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def segments(self) -> list[Path]:
        return sorted(self.folder.glob("*.mp4.blocks/block-*.mp4"))

    def wait_for_segments(self, count: int, seconds: float = 120) -> list[Path]:
        """Until so many blocks are finished while it runs; notes its ranks."""
        deadline = time.monotonic() + seconds
        while len(found := self.segments()) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.stderr
            time.sleep(0.02)
        self.ranks = {
            int(child.environ()["RANK"]): child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "RANK" in child.environ()
        }
        return found

    def end(self, seconds: float = 120) -> int:
        """The exit code; afterwards no process of this run is left."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.stderr}") from None
        assert not [rank for rank in self.ranks.values() if rank.is_running()]
        assert not [p.pid for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(self.folder)]
        return code

    def playable_frames(self) -> int:
        """Frames of the video, or of its blocks where it was not joined."""
        video = self.folder / "a.mp4"
        return decode(video) if video.exists() else sum(map(decode, self.segments()))


def generate_here(folder: Path, *arguments: object) -> Outcome:
    """``dualparal generate`` in this process, in a folder; its handlers of signals do not stay."""
    from dualparal.cli import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before, argv, said, code = Path.cwd(), sys.argv, io.StringIO(), 0
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    sys.argv = ["dualparal", "generate", *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(said):
            main.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = argv
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(code, "", said.getvalue())
