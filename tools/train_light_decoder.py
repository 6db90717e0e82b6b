"""Trains the light decoder of the model in the box, TAEHV's architecture, on the latents of its autoencoder.

    python tools/train_light_decoder.py --out build/train

It learns the rendered clips themselves, from latents that the trained autoencoder (vae.safetensors in --out, or the
package's) makes of them, with a little noise on top: what a transformer makes is not quite what an encoder makes.
Every batch is a function of --seed and its number, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import checkpoint
import parallel
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import nn
from train_vae import OBJECTS, clips, stages

from dualparal.models.wan.light_sizes import (
    BLOCKS,
    FIRST,
    GROWTH,
    LAST,
    LightSizes,
    block_name,
    growth_name,
    way_out_name,
)

WIDTHS = (64, 48, 32, 16)
SCHEDULE = "800:5x8,1900:9x6"
NOISE = 0.15  # of the noisiest latents, whose own deviation is 1
EMA = 0.995
PACKAGED = Path(__file__).resolve().parents[1] / "dualparal/moving_shapes/vae"


class LightNet(nn.Module):
    """The light decoder over whole videos at once; `dualparal.models.wan.light_decoder` takes latent after latent."""

    def __init__(self, sizes: LightSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.weights = nn.ParameterDict()
        for name, shape in sizes.shapes.items():
            value = torch.zeros(shape)
            if len(shape) == 4:
                nn.init.kaiming_normal_(value, nonlinearity="relu")
            if name.endswith("conv.4.weight"):
                value *= 0.1  # begin near the identity
            self.weights[name.replace(".", "/")] = nn.Parameter(value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by the names of a file."""
        return {name.replace("/", "."): value.detach() for name, value in self.weights.items()}

    def _conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        name = name.replace(".", "/")
        weight = self.weights[f"{name}/weight"]
        bias = self.weights.get(f"{name}/bias", None)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [batch, channels, f, h, w] to pixels [batch, 4 f - 3, 3, 8 h, 8 w], near [0, 1]."""
        batch = len(latents)
        x = torch.tanh(latents.transpose(1, 2).flatten(0, 1) / 3) * 3
        x = self._conv(FIRST, x).relu()
        for level, growth in enumerate(GROWTH):
            for block in range(BLOCKS):
                video = x.unflatten(0, (batch, -1))
                before = F.pad(video, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].flatten(0, 1)
                name = block_name(level, block)
                inner = self._conv(f"{name}.conv.0", torch.cat([x, before], 1)).relu()
                inner = self._conv(f"{name}.conv.2", inner).relu()
                x = (self._conv(f"{name}.conv.4", inner) + x).relu()
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = self._conv(growth_name(level), x).unflatten(1, (growth, -1)).flatten(0, 1)
            x = self._conv(way_out_name(level), x)
        pixels = F.pixel_shuffle(self._conv(LAST, x.relu()), self.sizes.patch)
        return pixels.unflatten(0, (batch, -1))[:, 3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for light_decoder.safetensors and its log")
    parser.add_argument("--vae", type=Path, default=PACKAGED, help="folder of the autoencoder, in diffusers' layout")
    parser.add_argument("--schedule", type=stages, default=stages(SCHEDULE), help="until step:FRAMESxBATCH,...")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on another time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rank, ranks = parallel.start()
    vae = AutoencoderKLWan.from_pretrained(options.vae, torch_dtype=torch.float32).eval()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    sizes = LightSizes(WIDTHS, vae.config.z_dim, 1)
    model, average = LightNet(sizes), LightNet(sizes)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "light_training.safetensors"
    state = {"model": model, "average": average}
    start = checkpoint.load(path, state, [optimizer])
    steps = options.schedule[-1][0]
    log = (options.out / "light_decoder.jsonl").open("a")
    began = time.perf_counter()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            warm = min((step + 1) / 50, 1.0)
            group["lr"] = options.lr * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        _, frames, batch = next(stage for stage in options.schedule if step < stage[0])
        video = clips(options.seed, step, range(rank, batch, ranks), frames)
        generator = torch.Generator().manual_seed(step * ranks + rank)
        with torch.no_grad():
            latents = (vae.encode(video).latent_dist.mean - mean) / std
            level = NOISE * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
            latents = latents + level * torch.randn(latents.shape, generator=generator)
        video = (video.transpose(1, 2) + 1) / 2
        error = model(latents) - video
        ground = video.flatten(3).transpose(1, 2).flatten(2).median(2).values[:, None, :, None, None]
        weight = 1 + OBJECTS * ((video - ground).abs().amax(2, keepdim=True) > 0.1)
        loss = (weight * (error.abs() + 2 * error.square())).mean()
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(EMA, (step + 1) / (step + 10))
            for mine, new in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(new, 1 - keep)
        last = step + 1 == steps or parallel.any_rank(time.perf_counter() - began > 60 * options.minutes)
        if rank == 0 and ((step + 1) % 50 == 0 or last):
            psnr = -10 * math.log10(error.square().mean().item())
            row = {"step": step + 1, "l1": error.abs().mean().item(), "psnr": psnr}
            print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}), file=log, flush=True)
        if rank == 0 and ((step + 1) % 250 == 0 or last):
            checkpoint.save(path, step + 1, state, [optimizer])
            halves = {name: value.half().contiguous() for name, value in average.tensors().items()}
            save_file(halves, options.out / "light_decoder.safetensors")
        if last:
            break


if __name__ == "__main__":
    main()
