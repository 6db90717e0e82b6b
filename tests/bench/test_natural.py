"""What bench/natural.py says of the seam figure: nothing of even motion, and something of a picture that jumps."""

from __future__ import annotations

from pathlib import Path

import av
import natural
import numpy as np
import pytest


def moving(frames: int) -> np.ndarray:
    """A soft pattern that moves evenly: [frames, 24, 32] uint8."""
    x, y = np.arange(32)[None, None], np.arange(24)[None, :, None]
    wave = np.sin(x / 5 + np.arange(frames)[:, None, None] / 9) * np.cos(y / 6)
    return np.rint(127 + 100 * wave).astype(np.uint8)


def test_even_motion_is_no_seam_and_a_jump_is() -> None:
    video = moving(100)
    medians = {name: np.median(natural.figures(video, step)) for name, step in natural.STEPS.items()}
    assert 0.8 < medians["as it is"] < 1.25
    assert medians["moved by a pixel"] > 5 and medians["3 % brighter"] > 2
    assert medians["a frame left out"] > 1.2


def test_clips_are_read_gray_and_narrow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 656, 16, "yuv420p"
        for shade in range(3):
            frame = np.full((16, 656, 3), 80 * shade, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    video = natural.read(tmp_path / "clip.mp4")
    assert video.shape == (3, 8, 328) and (np.diff(video[:, 0, 0].astype(int)) > 60).all()
