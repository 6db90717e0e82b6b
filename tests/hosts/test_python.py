"""Ranks from a plain script and from a notebook: the bits of one process, and nothing that a killed kernel leaves."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

import dualparal

SHM = Path("/dev/shm")
SCRIPT = """\
import dualparal, hashlib
engine = dualparal.Engine.from_pretrained({model!r}, gpus=2, device="cpu", frames_per_block=2, context_frames=1)
call = dict(height=32, width=32, num_frames=25, num_inference_steps=3, output_type="uint8", seed=5)
for chunk in engine.stream("a cat", "a dog", **call):
    found = hashlib.sha256(chunk.latents.numpy().tobytes() + chunk.frames.tobytes()).hexdigest()
    print(chunk.block, chunk.start_frame, found, engine.stats is None, flush=True)
"""
ENDLESS = """\
engine = dualparal.Engine.from_pretrained({model!r}, gpus=2, device="cpu", frames_per_block=2, context_frames=1)
chunks = engine.stream("a cat", height=32, width=32, num_frames=None, num_inference_steps=3)
print(next(chunks).block)
"""


@pytest.fixture(scope="module")
def expected(wan21: Path) -> str:
    """What a script prints, by one process; every chunk comes before the end of the run."""
    engine = dualparal.Engine.from_pretrained(wan21, device="cpu", frames_per_block=2, context_frames=1)
    size = {"height": 32, "width": 32, "num_frames": 25, "num_inference_steps": 3}
    lines = []
    for chunk in engine.stream("a cat", "a dog", **size, output_type="uint8", seed=5):
        found = hashlib.sha256(chunk.latents.numpy().tobytes() + chunk.frames.tobytes()).hexdigest()
        lines.append(f"{chunk.block} {chunk.start_frame} {found} True")
    assert len(lines) == 4
    return "\n".join(lines) + "\n"


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files of what a test starts, which leaves nothing there and nothing in shared memory."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = set(SHM.iterdir()) if SHM.is_dir() else set()
    yield folder
    deadline = time.monotonic() + 20
    while (left := list(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)  # a killed process's folder is removed by another one
    assert left == [] and (set(SHM.iterdir()) if SHM.is_dir() else set()) <= before


def test_a_script_without_torchrun_has_the_bits_of_one_process(
    wan21: Path, clean: Path, tmp_path: Path, expected: str
) -> None:
    """And so those of torchrun: test_cli.py."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=str(wan21)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_a_notebook_has_the_same_bits_and_a_killed_kernel_leaves_nothing(
    wan21: Path, clean: Path, expected: str
) -> None:
    cells = [SCRIPT.format(model=str(wan21)), "engine.close()", ENDLESS.format(model=str(wan21))]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    client = NotebookClient(notebook, kernel_name="python3", timeout=240)
    with client.setup_kernel(cleanup_kc=True):
        kernel = psutil.Process(client.km.provisioner.pid)
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        texts = ["".join(o.text for o in c.outputs if o.get("name") == "stdout") for c in notebook.cells]
        assert texts == [expected, "", "0\n"]
        children = kernel.children(recursive=True)
        assert sum("RANK" in child.environ() for child in children) == 2 and list(clean.iterdir())
        os.kill(kernel.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
