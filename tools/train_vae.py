"""Trains the video autoencoder of the model in the box: diffusers' AutoencoderKLWan, small, on tools/scenes.py.

    python tools/train_vae.py --out build/train

L1 and squared error, a little Kullback-Leibler; no adversary. Every batch is a function of --seed and its number:
the same command gives the same weights on the same machine, and one that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import checkpoint
import numpy as np
import parallel
import scenes
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import nn

CONFIG = {"base_dim": 24, "decoder_base_dim": 24, "z_dim": 12, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
LINEAR = ("conv_in", "conv_out", "conv_shortcut", "quant_conv")  # with the samplers' convolutions: the trunk
KL_WEIGHT = 1e-4  # of the mean per latent number, beside the mean per pixel
GUIDED = 1000  # steps, with less and less weight
# Single frames first, for colours and edges, then motion, then length: what lies many latents back still reaches a
# frame, through the caches of both halves, and a model of short clips falls apart behind them.
SCHEDULE = "900:1x16,2600:9x4,4800:33x1,5600:33x3"
OBJECTS = 4  # times more does a pixel of an object count: most of a picture is background


def stages(text: str) -> list[tuple[int, int, int]]:
    """ "900:1x16,4800:33x1" to [(until which step, frames, batch), ...]."""
    found = []
    for part in text.split(","):
        until, _, shape = part.partition(":")
        frames, _, batch = shape.partition("x")
        found.append((int(until), int(frames), int(batch)))
    return found


def make_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * CONFIG["z_dim"], latents_std=[1.0] * CONFIG["z_dim"])
    begin_linear(vae)
    # A posterior as wide as the prior drowns what an untrained encoder has to say: begin narrow.
    nn.init.zeros_(vae.quant_conv.weight[CONFIG["z_dim"] :])
    nn.init.constant_(vae.quant_conv.bias[CONFIG["z_dim"] :], -4.0)
    return vae


def begin_linear(part_of_vae: nn.Module) -> None:
    """Gives the whole autoencoder, its encoder or its decoder first weights with which it learns.

    With PyTorch's own the trunk fades against the residual branches, whose norms keep only the direction of a pixel's
    channels. For the last norm of encoder and decoder, which is left, large biases: without them the direction of a
    flat colour says its sign and no more.
    """
    for name, part in part_of_vae.named_modules():
        if isinstance(part, WanResidualBlock):
            nn.init.zeros_(part.conv2.weight)
            nn.init.zeros_(part.conv2.bias)
        elif isinstance(part, nn.Conv2d) or (isinstance(part, nn.Conv3d) and name.endswith(LINEAR)):
            seen = part.weight[0] if part.weight.ndim == 4 else part.weight[0, :, -1]  # of a first frame, by one output
            nn.init.normal_(part.weight, std=seen.numel() ** -0.5)
        if name.endswith("conv_in"):
            nn.init.normal_(part.bias, std=0.5)


def picture_loss(error: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """L1 and squared ``error`` of [batch, 3, frames, height, width]; pixels of an object in ``video`` count more."""
    ground = video.flatten(2).median(2).values[..., None, None, None]
    weight = 1 + OBJECTS * ((video - ground).abs().amax(1, keepdim=True) > 0.2)
    return (weight * (error.abs() + error.square())).mean()


class Guide:
    """Principal components of patches of 8 x 8 pixels and four frames: what latents look like in early training.

    They show the encoder what is worth telling long before the decoder could.
    """

    def __init__(self, seed: int, components: int) -> None:
        patches = self._patches(clips(seed, 1 << 31, range(64), 9)[:, :, 1:])
        self.mean = patches.mean(0)
        _, scale, basis = torch.linalg.svd(
            patches[torch.randperm(len(patches))[:8192]] - self.mean, full_matrices=False
        )
        self.basis = basis[:components] * (8192**0.5 / scale[:components, None])

    @staticmethod
    def _patches(video: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, height, width = video.shape
        cut = video.reshape(batch, channels, frames // 4, 4, height // 8, 8, width // 8, 8)
        return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(0, 3)

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """Latents [batch, components, latent frames, height, width] of [-1, 1] pixels; the first frame counts four."""
        video = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)
        batch, _, frames, height, width = video.shape
        latents = (self._patches(video) - self.mean) @ self.basis.T
        return latents.view(batch, frames // 4, height // 8, width // 8, -1).permute(0, 4, 1, 2, 3)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """``vae.decode`` without its clamp to [-1, 1], through which a picture that is too bright would never learn."""
    vae.clear_cache()
    hidden, frames = vae.post_quant_conv(latents), []
    for index in range(latents.shape[2]):
        part = hidden[:, :, index : index + 1]
        frames.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=index == 0))
    vae.clear_cache()
    return torch.cat(frames, dim=2)


def clips(seed: int, step: int, items: Iterable[int], frames: int) -> torch.Tensor:
    """[items, 3, frames, SIZE, SIZE] in [-1, 1]: these of the step's batch."""
    found = []
    for item in items:
        rng = np.random.default_rng([seed, 0, step, item])
        scene = scenes.sample_scene(rng)
        positions, angles = scenes.trajectories(scene, frames, rng)
        found.append(scenes.render(scene, positions, angles))
    return torch.from_numpy(np.stack(found)).permute(0, 4, 1, 2, 3) * 2 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for vae.safetensors and vae.jsonl")
    parser.add_argument("--schedule", type=stages, default=stages(SCHEDULE), help="until step:FRAMESxBATCH,...")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parallel.add_flags(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rank, ranks = parallel.start()
    device = torch.device(options.device)
    vae = make_vae().to(device)
    guide = Guide(options.seed, CONFIG["z_dim"])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "vae.safetensors"
    start = checkpoint.load(path, {"vae": vae}, [optimizer])
    steps = options.schedule[-1][0]
    log = (path.parent / "vae.jsonl").open("a")
    began = time.perf_counter()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min((step + 1) / 100, 1.0) * max(0.02, 1 - step / steps)
        _, frames, batch = next(stage for stage in options.schedule if step < stage[0])
        video = clips(options.seed, step, range(rank, batch, ranks), frames).to(device)
        torch.manual_seed(step * ranks + rank)
        with torch.autocast(device.type, torch.bfloat16, enabled=not options.float32):
            posterior = vae.encode(video).latent_dist
            restored = decode(vae, posterior.sample())
        error = restored.float() - video
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = picture_loss(error, video) + KL_WEIGHT * kl
        if step < GUIDED:
            guided = (posterior.mean.float() - guide(video)).square().mean()
            loss = loss + (1 - step / GUIDED) * guided
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(vae.parameters())
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if rank == 0 and (step % 50 == 0 or step + 1 == steps):
            row = {
                "step": step,
                "l1": error.abs().mean().item(),
                "psnr": -10 * np.log10(error.square().mean().item() / 4),
                "kl": kl.item(),
                "std": posterior.mean.float().std().item(),
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(json.dumps(row), file=log, flush=True)
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            checkpoint.save(path, step + 1, {"vae": vae}, [optimizer])


if __name__ == "__main__":
    main()
