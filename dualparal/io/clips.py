"""The last frames of a video file, for a video that goes on from it."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dualparal.io.video import VideoInfo, probe

_PART = 1 << 20  # bytes read at a time


def probe_clip(path: Path) -> VideoInfo:
    """Frame count, size and frame rate of a clip. Raises ValueError when it is not a complete mp4 file."""
    if not os.path.isfile(path):
        raise ValueError(f"video {path}: there is no such file")
    return probe(path)


def last_frames(path: Path, count: int) -> npt.NDArray[np.uint8]:
    """The last ``count`` frames [count, H, W, 3] of an mp4 file, or all that it has. Raises ValueError, OSError."""
    import av

    kept: deque[npt.NDArray[np.uint8]] = deque(maxlen=count)
    with av.open(str(path)) as source:
        for frame in source.decode(video=0):
            kept.append(frame.to_ndarray(format="rgb24"))
    if not kept:
        raise ValueError(f"video {path} has no frames")
    return np.stack(list(kept))


def fingerprint(path: Path) -> str:
    """A checksum of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_PART):
            found.update(part)
    return found.hexdigest()[:32]
