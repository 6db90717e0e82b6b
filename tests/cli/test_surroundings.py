"""What a run survives around it: the loss of its stderr and of its folder, a silent rank under torchrun, odd paths."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_runs import Run, decode
from places import ROOT

SMALL = ["--prompt", "a cat", "--device", "cpu", "--height", "32", "--width", "32", "--steps", "2", "--threads", "1"]


def test_a_run_survives_its_stderr_and_its_folder(wan21: Path, tmp_path: Path) -> None:
    """`2>&1 | head -1` reads one line; a cleaner of temporary files takes the folder in which the ranks have met."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = ["generate", *SMALL, "--model", wan21, "--num-frames", "257", "--stages", "2", "--out", "a.mp4"]
    run = subprocess.Popen(
        [sys.executable, "-m", "dualparal.cli", *map(str, command)],
        cwd=tmp_path,
        env={**clean, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
    )
    try:
        assert run.stderr is not None and run.stderr.readline()
        run.stderr.close()
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("a.mp4.blocks/block-*.mp4")):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.01)
        (folder,) = temporary.glob("dualparal-run-*")
        shutil.rmtree(folder)
        assert run.wait(60) == 0
    finally:
        run.kill()
        run.wait()
    assert decode(tmp_path / "a.mp4") == 257
    assert not (tmp_path / "a.mp4.blocks").exists() and not list(tmp_path.glob("*.json"))


@pytest.mark.alone  # who was heard when
def test_a_silent_rank_under_torchrun_is_named(start: Callable[..., Run], wan21: Path) -> None:
    run = start(
        *SMALL, "--num-frames", "8001", "--out", "a.mp4", "--model", wan21, "--heartbeat-limit", "4",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    )  # fmt: skip
    run.wait_for_segments(1)
    time.sleep(3)  # a beat a second: until the others have heard that it works, it is given the time of a start
    run.ranks[1].send_signal(signal.SIGSTOP)
    run.ranks[0].wait(60)
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 (stage 1) failed at ") and "no heartbeat for " in line
    told = json.loads((run.folder / "a.mp4.error.json").read_text())
    assert (told["rank"], told["stage"], told["exit_code"]) == (1, 1, 4)
    run.ranks[1].kill()  # torchrun would try SIGTERM for 30 s
    assert run.end() != 0


def test_an_empty_element_of_pythonpath_runs_nothing_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise SystemExit('code of the current folder')")
    program = "import sys; sys.path[0] = '/'; from dualparal.cli.main import main; main()"  # as the installed script
    for given, expected in ((f":{ROOT}", 0), (f"{ROOT}:", 0), (f":.:{ROOT}", 1), (f"{ROOT}", 0)):
        done = subprocess.run(
            [sys.executable, "-c", program, "--version"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": given}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == expected, (given, done)


def test_words_to_a_closed_pipe_or_a_full_disk_are_dropped() -> None:
    program = (
        "import logging, sys\nimport typer\nfrom dualparal.cli.progress import Display\n"
        "from dualparal.cli.stderr import keep_stderr\nkeep_stderr()\n"
        "state = dict(frames=1, seconds=1.0, blocks=1, total_blocks=2, first=1.0, bubble=0.5)\n"
        "with Display(2) as display:\n    display.units(1, 2)\n    display.update(state)\n"
        "typer.echo('x' * 100_000, err=True)\nlogging.warning('a warning')\nprint('done', flush=True)\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        for stderr in (writing, full):
            done = subprocess.run(
                [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=stderr, text=True, check=False,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            assert (done.returncode, done.stdout) == (0, "done\n")
    os.close(writing)
