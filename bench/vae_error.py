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
from dualparal.models.registry import BUILT_IN
from dualparal.models.wan.light_decoder import LightDecoder, LightFile
from dualparal.models.wan.light_sizes import LightSizes
from dualparal.models.wan.vae import StreamingDecoder

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPTS = ["a red circle moves to the right", "a blue square moves up"]
DTYPES = (torch.bfloat16, torch.float16)


class Sample(NamedTuple):
    """A name, a VAE in float32 (or sizes and tensors of a light decoder), and latents [V, C, f, h, w]."""

    name: str
    module: Any
    latents: torch.Tensor


class Distance(NamedTuple):
    """Levels of 255 between the frames of two decoders: the most, the mean, and the share of values above three."""

    most: int
    mean: float
    above_three: float


def trained(frames: int, steps: int, model: str = BUILT_IN) -> Sample:
    """The VAE of a model, the package's or one in a directory, and two videos of the model."""
    from dualparal.engine.engine import Engine

    engine = Engine.from_pretrained(model, device="cpu", frames_per_block=4, context_frames=2)
    latents = engine(PROMPTS, num_frames=frames, num_inference_steps=steps, output_type="latent").frames
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
    yield light()


def decoder_of(sample: Sample, dtype: torch.dtype) -> Decoder:
    if isinstance(sample.module, tuple):
        sizes, tensors = sample.module
        return LightDecoder(sizes, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return StreamingDecoder(copy.deepcopy(sample.module).to(dtype))


def light() -> Sample:
    """A random light decoder of the published widths, and noise."""
    sizes = LightSizes((256, 128, 64, 64), 16, 1)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * torch.Size(shape[1:] or (16,)).numel() ** -0.5
        for name, shape in sizes.shapes.items()
    }
    return Sample("light decoder, random, on noise", (sizes, tensors), torch.randn(1, 16, 4, 6, 6, generator=generator))


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

- float16 is within a level. bfloat16 is within three after six steps and not after three: latents that still hold
  noise are harder to decode. What "auto" makes of that is `dualparal/config/decoding.py`'s: bfloat16 on a card where
  at most three levels are measured in all rows of the package's VAE, else float32; so float32 today.
- float16 ends at 65,504. Whether the activations of Wan's own VAE stay below has not been tried here, so it is no
  default.
- The residual VAE and the light decoder have random weights: their rows say that nothing in the architecture is worse
  in 16 bits, and nothing of trained ones.
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


def light_error(model: str, path: Path, frames: int, steps: int) -> Distance:
    """Levels between the frames of a light decoder and of the model's VAE, both in float32, on latents of the model."""
    sample = trained(frames, steps, model)
    file = LightFile(path, sample.latents.shape[1], sample.module.config.scale_factor_spatial)
    own = Sample(str(path), (file.sizes, file.load(torch.device("cpu"), torch.float32)), sample.latents)
    return distance(own, torch.float32, levels(sample, torch.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=33, help="of each video (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to (default: %(default)s)")
    parser.add_argument("--model", default=BUILT_IN, help="whose VAE --decoder is compared with (default: %(default)s)")
    parser.add_argument("--decoder", type=Path, help="print how far this light decoder is from the VAE, write nothing")
    arguments = parser.parse_args()
    if arguments.decoder is not None:
        print(light_error(arguments.model, arguments.decoder, arguments.frames, arguments.steps))
        return
    header = HEADER.format(torch=torch.__version__, commit=commit())
    (arguments.out / "vae-dtype.md").write_text(header + table(arguments.frames, arguments.steps) + NOTES)


if __name__ == "__main__":
    main()
