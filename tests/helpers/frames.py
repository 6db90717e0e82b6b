"""Pictures to write into a video."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]


def make_frames(count: int, *, seed: int = 0, height: int = 48, width: int = 64) -> Frames:
    """A moving smooth picture with a little noise: [count, height, width, 3]."""
    noise = np.random.default_rng(seed).integers(-6, 7, (count, height, width, 3))
    y, x = np.mgrid[:height, :width]
    shift = np.arange(count)[:, None, None] + 7 * seed
    planes = [128 + 90 * np.sin((x + shift) / 9), 128 + 90 * np.cos((y - shift) / 11), (x + y + 2 * shift) % 256]
    return np.clip(np.stack([np.broadcast_to(p, (count, height, width)) for p in planes], -1) + noise, 0, 255).astype(
        np.uint8
    )
