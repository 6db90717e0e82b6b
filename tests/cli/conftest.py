"""Fixtures: the command line inside this process and in processes of its own."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from cli_runs import Outcome, Run
from dualparal.cli import main as cli


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A run sets signal handlers and threads for its process; this one has other tests to run."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def dualparal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Calls the entry point with these arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dualparal", *map(str, arguments)])
        capfd.readouterr()
        with _undisturbed(), pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs, each in its own folder, and leaves none behind."""
    runs: list[Run] = []

    def begin(*arguments: object, launcher: tuple[str, ...] = ()) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", *arguments, launcher=launcher))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            for process in psutil.Process(run.process.pid).children(recursive=True):
                process.kill()
            run.process.kill()
            run.process.wait()
