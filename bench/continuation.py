"""How well does a video join the clip that it goes on from? The seam of ``quality.py``, where the clip ends.

    python bench/continuation.py --prompts 6 --contexts cached paper prior --record

Per caption a video is made and cut behind block 3, its file written (H.264). Then four videos are compared at the cut:

uncut      the video itself: what the model and the block boundary give
encoding   the video's own latents, decoded behind the clip's file, encoded: what encoding costs
latents    a video with another seed that goes on from the clip's last latents
file       the same from the clip's file

In the first and third the clip's frames are decoded latents, in the others those of its file. Intervals are 95 %,
Student's t over captions of the logarithm. ``count`` is the share of new frames with the objects of the caption.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import quality
import torch
from harness.record import record
from meter.scene_metrics import measure, seam_energy
from scenes import SIZE

from dualparal import Engine
from dualparal.io.clips import last_frames
from dualparal.io.video import SegmentWriter
from dualparal.models.wan.encoder import StreamingEncoder

KINDS = ("uncut", "encoding", "latents", "file")
NEAR = 6  # latent frames behind the cut that are decoded for the seam
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)  # Student's t, 97.5 %, from one degree on


@torch.inference_mode()
def figures(context: str, prompt: int, frames: int, new: int) -> dict[str, float]:
    """The seam of each kind of one caption, and of those that go on the share of new frames with the right counts.

    Args:
        frames: of the video that is cut.
        new: frames that are made behind the cut.
    """
    variant = quality.Variant(context, context=context)
    scene = quality.Job(variant, 0, prompt, 0).scene()
    pipe = quality.load_pipe(quality.MODEL)
    engine = Engine.from_pretrained(
        quality.MODEL, frames_per_block=8, context_frames=4, context=context, device="cpu"
    )  # fmt: skip
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "latent"}
    uncut = engine(scene.caption(), num_frames=frames, seed=0, **call).frames
    cut = variant.layout(10**6).start(4)
    begun = quality.decode(pipe.vae, uncut[:, :, :cut])
    with tempfile.TemporaryDirectory() as folder:
        path = SegmentWriter(Path(folder), 16).write(0, begun)
        of_file = last_frames(path, len(begun))
        encoder = StreamingEncoder(pipe.vae)
        encoded = encoder.push(torch.from_numpy(of_file).permute(0, 3, 1, 2).float() / 127.5 - 1)
        going_on = {"num_frames": new, "seed": 100, **call}
        behind = {
            "uncut": uncut[:, :, cut:],
            "encoding": uncut[:, :, cut:],
            "latents": engine(scene.caption(), video=uncut[:, :, :cut], **going_on).frames,
            "file": engine(scene.caption(), video=path, **going_on).frames,
        }
    found = {}
    for kind, latents in behind.items():
        from_file = kind in ("encoding", "file")
        made = quality.decode(
            pipe.vae, torch.cat([encoded if from_file else uncut[:, :, :cut], latents[:, :, : new // 4]], 2)
        )
        whole = np.concatenate([of_file if from_file else begun, made[len(begun) :]])
        found[kind] = seam_energy(whole[: 4 * (cut + NEAR) - 3], [cut])
        found[f"{kind} count"] = measure(made[len(begun) :], scene, [])[0]["right"]
    return found


def interval(values: Sequence[float]) -> str:
    """The geometric mean of seams, and its interval."""
    logs = np.log(values)
    if len(logs) < 2:
        return f"{math.exp(logs.mean()):.2f}"
    half = _T95[min(len(logs) - 2, len(_T95) - 1)] * logs.std(ddof=1) / math.sqrt(len(logs))
    low, middle, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contexts", nargs="+", default=["cached"], choices=quality.POLICIES)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--frames", type=int, default=257)
    parser.add_argument("--new", type=int, default=64, help="frames behind the clip, a multiple of four")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for context in options.contexts:
        found = []
        for prompt in range(options.prompts):
            found.append(figures(context, prompt, options.frames, options.new))
            print(context, prompt, *(f"{kind} {found[-1][kind]:.2f}" for kind in KINDS), flush=True)
        row: dict[str, Any] = {"context": context, "captions": options.prompts}
        for kind in KINDS:
            seams = [each[kind] for each in found]
            row |= {
                kind: interval(seams),
                f"{kind} count": round(float(np.mean([e[f"{kind} count"] for e in found])), 2),
            }
        row["latents over uncut"] = interval([each["latents"] / each["uncut"] for each in found])
        row["file over encoding"] = interval([each["file"] / each["encoding"] for each in found])
        rows.append(row)
        print(row, flush=True)
    if options.record:
        record("continuation", rows)


if __name__ == "__main__":
    main()
