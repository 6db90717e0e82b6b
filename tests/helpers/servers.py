"""A server as a process of its own, on a port that is free, and one in this process, without an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from fastapi.testclient import TestClient

from dualparal.config.engine import EngineConfig
from dualparal.server.app import make_app
from dualparal.server.jobs import Jobs
from dualparal.server.metrics import Metrics
from dualparal.server.settings import Settings
from dualparal.server.store import Store

PROGRAM = "from dualparal.cli.main import main; main()"
BLOCKS = ["--frames-per-block", "2", "--context-frames", "1", "--refresh-every", "2"]


URL = "http://127.0.0.1"


def settings(folder: Path, **more: Any) -> Settings:
    given = {"model": "moving-shapes", "height": 64, "width": 64, "steps": 2, "max_queue": 3, "max_seconds": 10.0}
    return Settings(**{**given, "gpus": 1, "engine": EngineConfig(), "folder": folder, **more})


def made(folder: Path, **more: Any) -> tuple[TestClient, Jobs]:
    jobs = Jobs(Store(folder), settings(folder, **more), Metrics())
    runner: Any = SimpleNamespace(is_up=True)
    return TestClient(make_app(jobs, runner), base_url=URL, raise_server_exceptions=False), jobs


class Served:
    """A running ``dualparal serve`` with one rank on the CPU; ``url`` is its address. A context manager.

    Args:
        folder: of its videos.
        flags: further ones.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, "-c", PROGRAM, "serve", "--device", "cpu", "--port", "0", "--out-dir", str(folder)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--steps", "2", *BLOCKS, *flags], stdout=subprocess.PIPE, text=True, env=env
        )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        assert found, "the server did not start"
        self.url = found[0]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def ranks(self) -> list[psutil.Process]:
        """Its rank processes."""
        return [child for child in psutil.Process(self.process.pid).children() if "RANK" in child.environ()]

    def end(self) -> None:
        """Ends it as a service manager does; its ranks are gone when this returns."""
        if self.process.poll() is None:
            ranks = self.ranks()
            self.process.terminate()
            self.process.wait(60)
            assert not psutil.wait_procs(ranks, timeout=5)[1], "ranks are left"
        assert self.process.stdout is not None
        self.process.stdout.close()
