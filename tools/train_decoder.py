"""Trains a decoder for latents that stay what they are: slimmer than the one that they were made with.

    python tools/train_decoder.py --out build/train --vae dualparal/moving_shapes/vae --base-dim 12

Reads the clips of make_latents.py in --out (whose videos are drawn again, so the truth is what it learns), writes
decoder.safetensors there, and at the end the autoencoder in diffusers' layout, in float16, to decoder/: the encoder of
--vae, and the average of the decoders of the last steps. It learns to begin at any latent, because what the
transformer begins with has little of a video's start.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import checkpoint
import numpy as np
import parallel
import scenes
import torch
from diffusers import AutoencoderKLWan
from make_latents import PER_FILE, scene_of
from torch import nn
from train_vae import begin_linear, decode, picture_loss, stages

SCHEDULE = "500:1x16,1500:3x5,3000:8x2"  # latent frames: colours and edges, then motion, then length
NOISE = 0.05  # of a channel's deviation, added to latents: those of a transformer are never exact
EMA = 0.998


def with_decoder(folder: Path, base_dim: int) -> AutoencoderKLWan:
    """The autoencoder of ``folder`` with a new decoder whose full size has ``base_dim`` channels."""
    old = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
    vae = AutoencoderKLWan.from_config({**old.config, "decoder_base_dim": base_dim})
    begin_linear(vae.decoder)
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        getattr(vae, name).load_state_dict(getattr(old, name).state_dict())
    return vae.requires_grad_(False)


class Clips:
    """Latents as make_latents.py left them, and the videos that they are of."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.files = sorted(folder.glob("*.npy"))
        if not self.files:
            raise SystemExit(f"{folder} has no latents: run tools/make_latents.py first")
        self.latents, self.seed = np.concatenate([np.load(file) for file in self.files]), seed

    def window(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """[frames, C, h, w] latents of a clip from anywhere, or its start, and their pixels [F, 3, SIZE, SIZE]."""
        index = int(rng.integers(len(self.latents)))
        start = int(rng.integers(self.latents.shape[1] - frames + 1)) if rng.random() < 0.75 else 0
        number = int(self.files[index // PER_FILE].stem) * PER_FILE + index % PER_FILE
        scene, of_scene = scene_of(self.seed, number)
        positions, angles = scenes.trajectories(scene, 4 * self.latents.shape[1] - 3, of_scene)
        shown = slice(4 * start, 4 * (start + frames) - 3)  # a decoder's first latent gives one frame, the last of four
        pixels = scenes.render(scene, positions[shown], angles[shown])
        return self.latents[index, start : start + frames].astype(np.float32), pixels.transpose(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--vae", type=Path, required=True, help="folder of an autoencoder in diffusers' layout")
    parser.add_argument("--base-dim", type=int, required=True, help="channels of the decoder's full size")
    parser.add_argument("--schedule", type=stages, default=stages(SCHEDULE), help="until step:LATENTSxBATCH,...")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0, help="with which the latents were made")
    parser.add_argument("--float32", action="store_true", help="for processors that have no bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rank, ranks = parallel.start()
    vae = with_decoder(options.vae, options.base_dim)
    decoder: nn.Module = vae.decoder.requires_grad_(True)
    average = copy.deepcopy(decoder)
    clips = Clips(options.out / "latents", options.seed)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    path, steps = options.out / "decoder.safetensors", options.schedule[-1][0]
    state = {"decoder": decoder, "average": average}
    start = checkpoint.load(path, state, [optimizer])
    log = (options.out / "decoder.jsonl").open("a")
    began, errors = time.perf_counter(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min((step + 1) / 100, 1.0) * min(1.0, 2 * max(0.01, 1 - step / steps))
        _, frames, batch = next(stage for stage in options.schedule if step < stage[0])
        rng = np.random.default_rng([options.seed, 3, step])
        pairs = [clips.window(rng, frames) for _ in range(batch)][rank::ranks]
        latents, pixels = (torch.from_numpy(np.stack(part)).transpose(1, 2) for part in zip(*pairs, strict=True))
        video = 2 * pixels - 1
        generator = torch.Generator().manual_seed(step * ranks + rank)
        latents = latents + NOISE * std * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            error = decode(vae, latents).float() - video
        optimizer.zero_grad()
        picture_loss(error, video).backward()
        parallel.average_gradients(decoder.parameters())
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mine, new in zip(average.parameters(), decoder.parameters(), strict=True):
                mine.lerp_(new, 1 - min(EMA, (step + 1) / (step + 10)))
        errors.append(error.square().mean().item())
        last = step + 1 == steps
        if rank == 0 and ((step + 1) % 50 == 0 or last):
            row = {"step": step + 1, "latents": frames, "psnr": -10 * np.log10(np.mean(errors) / 4)}
            print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}), file=log, flush=True)
            errors = []
        if rank == 0 and ((step + 1) % 250 == 0 or last):
            checkpoint.save(path, step + 1, state, [optimizer])
    if rank == 0:
        decoder.load_state_dict(average.state_dict())
        vae.half().save_pretrained(options.out / "decoder", safe_serialization=True)


if __name__ == "__main__":
    main()
