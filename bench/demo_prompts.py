"""Does the demo show what it is asked for? ``make demo``'s command with five prompts: frames with the right objects.

    python bench/demo_prompts.py --seeds 3
    python bench/demo_prompts.py -- --model build/rewarded

The command is read from the Makefile, and writes PNG files, so that the frames are what the decoder gave. An object too
many, too few or in another colour makes a frame wrong (``counts_right`` of meter/scene_metrics.py). CPU, ten seconds a
video.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from meter.scene_metrics import counts_right, track
from PIL import Image
from scenes import Scene, Thing  # of tools/, which the meter makes known

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    ((("red", "circle"), ("red", "circle"), ("blue", "square")), "drifting left", "dark", False),
    ((("red", "circle"),), "bouncing", "gray", False),
    ((("yellow", "triangle"), ("blue", "circle")), "drifting up", "gray", True),
    ((("red", "square"),) * 3, "swinging", "dark", False),
    ((("green", "square"),) * 2, "circling clockwise", "dark", False),
)
BAR = 95  # percent of a video's frames


def scenes() -> list[Scene]:
    return [
        Scene(tuple(Thing(shape, colour, 9.0) for colour, shape in things), motion, ground, checkered, spinning=False)
        for things, motion, ground, checkered in PROMPTS
    ]


def flags() -> list[str]:
    """Of the demo's ``dualparal generate``, without prompt and output."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    words = shlex.split(recipe.replace("\\\n", " "))
    words = words[words.index("generate") + 1 :]
    for name in ("--prompt", "--out"):
        place = words.index(name)
        del words[place : place + 2]
    return words


def frames(prompt: str, seed: int, more: list[str]) -> np.ndarray:
    """The video that the demo's command makes, uint8 [frames, height, width, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "frames")
        command = [sys.executable, "-m", "dualparal.cli", "generate", "--prompt", prompt, "--out", str(out)]
        done = subprocess.run(
            [*command, "--seed", str(seed), *flags(), *more], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(out.glob("*.png"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("generate", nargs="*", help="after --: flags of dualparal generate that replace the demo's")
    options = parser.parse_args()
    above = []
    for scene in scenes():
        right = []
        for seed in range(options.seeds):
            video = frames(scene.caption(), seed, options.generate)
            right.append(100 * counts_right(track(video), scene).mean())
        above += [share >= BAR for share in right]
        print(f"{scene.caption()}: {', '.join(f'{share:.0f}' for share in right)} %", flush=True)
    print(f"{sum(above)} of {len(above)} videos are right in at least {BAR} % of their frames")


if __name__ == "__main__":
    main()
