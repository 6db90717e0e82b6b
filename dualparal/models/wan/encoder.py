"""Streaming video encoder: push frames, get their latents, never hold the whole video."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from dualparal.models.wan.convolutions import STEADY
from dualparal.models.wan.cpu_ops import CpuOps
from dualparal.models.wan.vae import check_vae, latent_scale


class StreamingEncoder:
    """Encodes one video with a diffusers ``AutoencoderKLWan`` (Wan 2.1, or the residual one of Wan 2.2).

    However the frames are cut, the latents are those of ``vae.encode`` on the whole, of whose distribution the mode is
    taken, as diffusers' image-to-video pipelines do. Four frames are in work at a time. The VAE is only read.

    Args:
        vae: is shared.

    Raises:
        ValueError: ``vae`` is not a causal Wan VAE, tiles its frames, or is under CPU offload.
    """

    def __init__(self, vae: Any) -> None:
        check_vae(vae)
        self._vae = vae
        self.reset()

    def reset(self) -> None:
        """Forgets the video: the next frame pushed is the first one of another, of any size."""
        slots = sum(isinstance(module, nn.Conv3d) for module in self._vae.encoder.modules())  # as in StreamingDecoder
        self._caches: list[torch.Tensor | str | None] = [None] * slots
        self._first = True

    @property
    def history(self) -> int:
        """Number of latents back that a latent can see. After so many of frames that are alike, all others are one."""
        encoder = self._vae.encoder
        frames_per_latent, latents = int(self._vae.config.scale_factor_temporal), Fraction(0)
        for part in (encoder.conv_in, *encoder.down_blocks, encoder.mid_block, encoder.conv_out):
            convs = [module for module in part.modules() if isinstance(module, nn.Conv3d)]
            latents += Fraction(sum(conv.kernel_size[0] - 1 for conv in convs), frames_per_latent)
            if any(name.endswith("time_conv") for name, _ in part.named_modules()):
                frames_per_latent //= 2
        return math.ceil(latents)

    @torch.no_grad()
    def push(self, frames: torch.Tensor) -> torch.Tensor:
        """Encodes the next frames of the video.

        Args:
            frames: [F, 3, H, W] in [-1, 1], any device; at first 1, 5, 9 ... of them, later 4, 8 ...
                (``scale_factor_temporal`` more each time).

        Returns:
            Latents [1, C, f, h, w], normalised as the transformer takes them, float32 on the VAE's device.

        Raises:
            ValueError: frames that are not whole latents, or not of that shape.
        """
        vae, step = self._vae, int(self._vae.config.scale_factor_temporal)
        if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) % step != self._first or len(frames) < 1:
            raise ValueError(
                f"frames of shape {list(frames.shape)}: an encoder takes [frames, 3, height, width], "
                + (f"{step}k + 1 of them at first" if self._first else f"a multiple of {step} of them after the first")
            )
        mean, reciprocal_std = latent_scale(vae, torch.float32)
        sizes = [1] * self._first + [step] * (len(frames) // step)
        found = []
        with STEADY, CpuOps():
            for part in frames.split(sizes):
                pixels = part.to(vae.device, vae.dtype).transpose(0, 1).unsqueeze(0).contiguous()
                if vae.config.patch_size is not None:
                    pixels = _patchify(pixels, vae.config.patch_size)
                moments = vae.quant_conv(vae.encoder(pixels, feat_cache=self._caches, feat_idx=[0]))
                mode, _ = moments.chunk(2, dim=1)
                found.append((mode.float() - mean) * reciprocal_std)
                self._first = False
        return torch.cat(found, dim=2)


def _patchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Folds pixels into patches: [1, 3, F, H * patch, W * patch] to [1, 3 * patch * patch, F, H, W]."""
    split = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [1, 3, F, H, row, W, column]
    return split.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
