"""Every script of examples/ runs, with small settings, and makes the video that it promises."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dualparal.io.video import count_frames

EXAMPLES = next(parent for parent in Path(__file__).parents if (parent / "examples").is_dir()) / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SCRIPTS = {
    "stream.py": "block 3: frames 45 to 48",
    "storyboard.py": "on: a green triangle",
    "loaded_pipeline.py": "frames (1, 49, 64, 64, 3)",
    "torchrun.py": "out.mp4 49 frames in 4 blocks",
    "resume.py": "goes on with block ",
}


def test_each_has_its_settings_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], script: str
) -> None:
    """Those of one process in this one: a new one imports for seconds."""
    path, arguments = str(EXAMPLES / script), ["--num-frames", "49", "--steps", "3"]
    if script != "loaded_pipeline.py":
        arguments += ["--out", "out.mp4"]
    if script == "torchrun.py":
        subprocess.run([sys.executable, *TORCHRUN, path, *arguments], cwd=tmp_path, timeout=240, check=True)
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
    assert SCRIPTS[script] in capfd.readouterr().out
    if script != "loaded_pipeline.py":
        assert count_frames(tmp_path / "out.mp4") == 49
