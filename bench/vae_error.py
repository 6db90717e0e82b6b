"""Writes docs/vae-dtype.md: how far frames decoded in 16 bits lie from those in float32, in levels of 255.

Run from anywhere: ``python bench/vae_error.py``, some minutes on two cores; it needs no GPU. The decoders are the
engine's: the trained one of the package's model on latents that the model makes, and a random residual one of
Wan2.2's kind on noise.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness.record import commit

from dualparal.decoding.frames import to_uint8
from dualparal.models.base import Decoder
from dualparal.models.registry import BUILT_IN, BUILT_IN_SIZE
from dualparal.models.wan.vae import StreamingDecoder

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPTS = ["a red circle moves to the right", "a blue square moves up"]
DTYPES = (torch.bfloat16, torch.float16)


class Sample(NamedTuple):
    """A name, a decoder's module in float32, and latents [V, C, f, h, w]."""

    name: str
    module: Any
    latents: torch.Tensor


class Distance(NamedTuple):
    """Levels of 255 between the frames of two decoders: the most, the mean, and the share of values above three."""

    most: int
    mean: float
    above_three: float


def trained(frames: int, steps: int) -> Sample:
    """The package's VAE, and two videos of the package's model."""
    from dualparal.engine.engine import Engine

    height, width = BUILT_IN_SIZE
    engine = Engine.from_pretrained(BUILT_IN, device="cpu", frames_per_block=4, context_frames=2)
    latents = engine(
        PROMPTS, height=height, width=width, num_frames=frames, num_inference_steps=steps, output_type="latent"
    ).frames
    return Sample(
        f"the package's VAE, trained, on latents of its model, {frames} frames, {steps} steps", engine.vae(), latents
    )


def residual(frames: int) -> Sample:
    """A random VAE of Wan2.2's residual kind, and noise."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, is_residual=True, patch_size=2,
        in_channels=12, out_channels=12, scale_factor_spatial=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip
    latents = torch.randn(1, 16, (frames + 3) // 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return Sample("residual VAE of Wan2.2's kind, random, on noise", vae.eval(), latents)


def samples(frames: int, steps: int) -> Iterator[Sample]:
    yield trained(frames, steps)
    yield trained(9, 3)  # a few steps leave noise, which is the harder to decode
    yield residual(frames)


def decoder_of(sample: Sample, dtype: torch.dtype) -> Decoder:
    return StreamingDecoder(copy.deepcopy(sample.module).to(dtype))


def levels(sample: Sample, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Frames [V, F, H, W, 3] in levels of 255, as whole numbers that may be subtracted."""
    return np.stack([to_uint8(decoder_of(sample, dtype).push(row)).astype(int) for row in sample.latents.split(1)])


def distance(sample: Sample, dtype: torch.dtype, truth: np.ndarray[Any, Any]) -> Distance:
    apart = np.abs(levels(sample, dtype) - truth)
    return Distance(int(apart.max()), float(apart.mean()), float((apart > 3).mean()))


HEADER = """\
# A VAE in 16 bits: what it costs

Levels of 255 between frames decoded in 16 bits and in float32, over all pixels and channels: the most and, in brackets,
the mean. Written by `python bench/vae_error.py` (torch {torch}, commit {commit}) on a CPU, frame by frame as the engine
decodes; on a card sums have another order.

"""

NOTES = """
What it says:

- float16 is within a level, bfloat16 within four; three are left by few values in 100,000, most of them where a video
  has had few steps. What "auto" makes of that is `dualparal/config/decoding.py`'s: bfloat16 on a card where at most
  three levels are measured, else float32.
- float16 ends at 65,504. Whether the activations of Wan's own VAE stay below has not been tried here, so it is no
  default.
- The random VAE has random weights: its row shows that nothing in the residual kind is worse in 16 bits.
"""


def table(frames: int, steps: int) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    lines = [["decoder", *names], ["---"] * 3]
    for sample in samples(frames, steps):
        truth = levels(sample, torch.float32)
        found = [distance(sample, dtype, truth) for dtype in DTYPES]
        lines.append([sample.name, *(f"{each.most} ({each.mean:.3f})" for each in found)])
        print(sample.name, *map(str, found), sep=" | ", flush=True)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=33, help="of each video (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    header = HEADER.format(torch=torch.__version__, commit=commit())
    (arguments.out / "vae-dtype.md").write_text(header + table(arguments.frames, arguments.steps) + NOTES)


if __name__ == "__main__":
    main()
