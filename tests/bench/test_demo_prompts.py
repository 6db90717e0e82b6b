"""The demo's command, as bench/demo_prompts.py reads it, and what it makes."""

from __future__ import annotations

import demo_prompts
import numpy as np
import scenes

from places import ROOT


def test_the_demos_command_is_read_from_the_makefile() -> None:
    flags = demo_prompts.flags()
    assert flags[flags.index("--num-frames") + 1] == "257" and "--prompt" not in flags and "--out" not in flags
    assert demo_prompts.scenes()[0].caption() in (ROOT / "Makefile").read_text()


def test_its_frames_are_those_that_are_counted() -> None:
    scene = demo_prompts.scenes()[1]
    video = demo_prompts.frames(scene.caption(), 0, ["--num-frames", "9", "--stages", "1", "--steps", "2"])
    assert video.shape == (9, scenes.SIZE, scenes.SIZE, 3) and video.dtype == np.uint8 and np.ptp(video) > 50
