"""Encodes procedural videos with the trained autoencoder: the data set of tools/train_transformer.py.

    python tools/make_latents.py --out build/train --clips 3072     (or torchrun --nproc-per-node 3 tools/...)

Reads vae.safetensors of tools/train_vae.py from --out, or the autoencoder in --vae, and writes latents/000000.npy ...
there: float16 [PER_FILE, latent frames, channels, height, width], as the encoder's mean, not normalised. Clip i is a
function of --seed and i alone: files that are there are kept, and --clips may grow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import checkpoint
import numpy as np
import parallel
import scenes
import torch
from diffusers import AutoencoderKLWan
from train_vae import make_vae

from dualparal.models.wan.cpu_ops import CpuOps

FRAMES = 81  # 21 latent frames, as Wan
LATENTS = (21, 12, 8, 8)  # of one clip: frames, channels, height, width
PER_FILE = 16
BATCH = 8


def scene_of(seed: int, index: int) -> tuple[scenes.Scene, np.random.Generator]:
    """The scene of a clip, and the generator that goes on to make its video."""
    rng = np.random.default_rng([seed, 1, index])
    return scenes.sample_scene(rng), rng


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of a clip")
    parser.add_argument("--latents", default="latents", help="name of the folder")
    parser.add_argument("--vae", type=Path, help="folder in diffusers' layout")
    parallel.add_flags(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rank, ranks = parallel.start()
    device = torch.device(options.device)
    if options.vae is None:
        vae = make_vae()
        checkpoint.load(options.out / "vae.safetensors", {"vae": vae}, [])
    else:
        vae = AutoencoderKLWan.from_pretrained(options.vae, torch_dtype=torch.float32)
    vae = vae.to(device).eval()
    folder = options.out / options.latents
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rank, -(-options.clips // PER_FILE), ranks):
        path = folder / f"{number:06}.npy"
        if path.exists():
            continue
        found = []
        for first in range(number * PER_FILE, (number + 1) * PER_FILE, BATCH):
            made = (scene_of(options.seed, index) for index in range(first, first + BATCH))
            clips = np.stack([scenes.video(scene, options.frames, rng) for scene, rng in made])
            video = torch.from_numpy(clips).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=not options.float32), CpuOps():
                found.append(vae.encode(video).latent_dist.mean.transpose(1, 2).half().cpu())
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, torch.cat(found).numpy())
        path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main()
