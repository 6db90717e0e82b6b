"""Streaming video decoder: push finished latents, get their frames, never hold the whole video.

The causal Wan VAE carries 32 small tensors from one latent frame to the next. A ``StreamingDecoder`` owns them, so that
several videos can share one VAE. Requests and the way of the frames are left to others.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from dualparal.models.base import RowExchange
from dualparal.models.wan.convolutions import STEADY
from dualparal.models.wan.cpu_ops import CpuOps
from dualparal.models.wan.pushed import check_pushed
from dualparal.models.wan.rows import OverRows


class StreamingDecoder:
    """Decodes one video with a diffusers ``AutoencoderKLWan`` (Wan 2.1, or the residual one of Wan 2.2).

    However the latents are cut, the frames are the same, and those of ``vae.decode`` on the whole: bit for bit from
    twelve points a latent frame on (3x4), and within rounding below, where a convolution of one point may add in
    another order on some CPUs. The VAE is only read: its own cache is not touched, and other decoders may use it
    between two pushes. ``vae.use_slicing`` has no effect: it splits batches, and here the batch is one video.

    Args:
        vae: is shared.
        rows: the way to other parts of the picture, each with a decoder; ``push`` gives this part's rows of the
            frames. On the CPU they are those of a decoder of the whole, bit for bit. None, or one part: all rows.

    Raises:
        ValueError: ``vae`` is not a causal Wan VAE, tiles its frames, or is under CPU offload.
    """

    def __init__(self, vae: Any, rows: RowExchange | None = None) -> None:
        check_vae(vae)
        self._vae = vae
        self._rows = OverRows(rows) if rows is not None and rows.count > 1 else None
        self._scale: tuple[torch.Tensor, torch.Tensor] | None = None  # see ``latent_scale``; made at the first push
        self._size: torch.Size | None = None  # latent [H, W] of the video being decoded
        self.reset()

    def reset(self) -> None:
        """Forgets the video: the next latent pushed is the first one of a new video, of any size."""
        # One slot per Conv3d is an upper bound: 1x1 shortcuts use none. A slot holds None, a tensor or, in a
        # temporal upsampler that has seen the first latent only, the string "Rep".
        slots = sum(isinstance(module, nn.Conv3d) for module in self._vae.decoder.modules())
        self._caches: list[torch.Tensor | str | None] = [None] * slots
        self._first = True
        self._torn = False
        self._size = None

    @property
    def history(self) -> int:
        """Number of latents back that a frame can see: 38 for Wan 2.1.

        A fresh decoder fed that many latents before latent l, their frames thrown away, gives the frames of l bit for
        bit. To resume, keep these: the caches are gigabytes, as wide as the decoder's layers.
        """
        decoder = self._vae.decoder
        frames_per_latent, latents = 1, Fraction(0)
        for part in (decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_out):
            convs = [module for module in part.modules() if isinstance(module, nn.Conv3d)]
            latents += Fraction(sum(conv.kernel_size[0] - 1 for conv in convs), frames_per_latent)
            if any(name.endswith("time_conv") for name, _ in part.named_modules()):
                frames_per_latent *= 2
        return math.ceil(latents)

    @property
    def state_bytes(self) -> int:
        """Bytes held between two pushes; constant from the second latent on."""
        return sum(cache.nbytes for cache in self._caches if isinstance(cache, torch.Tensor))

    @torch.no_grad()  # not inference_mode: a caller may want to edit the frames in place
    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes the next latent frames of the video.

        Args:
            latents: [1, C, f, H, W], normalised as the transformer makes them, any float dtype, any device.

        Returns:
            Frames [F, 3, H * scale, W * scale] in [-1, 1] in the VAE's dtype on the VAE's device. The first latent of a
            video gives one frame, each further one four (``scale_factor_temporal``). Of several parts of the picture
            this one's rows.

        Raises:
            ValueError: a wrong shape, or more parts than latent rows.
            RuntimeError: an earlier push failed half way, and ``reset`` was not called since.
        """
        check_vae(self._vae)  # again: tiling may have been switched on since
        check_pushed(latents, self._vae.config.z_dim, self._size, self._torn, self.history)
        if self._rows is not None:
            self._rows.begin(latents.shape[3])
        self._size = latents.shape[3:]
        if self._scale is None or self._scale[0].device != self._vae.device or self._scale[0].dtype != self._vae.dtype:
            self._scale = latent_scale(self._vae)
        self._torn = True
        with STEADY, CpuOps():
            frames = [self._decode_one(latent) for latent in latents.split(1, dim=2)]
        self._torn = False
        return torch.cat(frames)

    def _decode_one(self, latent: torch.Tensor) -> torch.Tensor:
        # One latent at a time and in one memory layout, whatever came in together: a convolution may pick its
        # algorithm by shape and stride, and the frames must not depend on how the latents were cut.
        hidden = self._vae.post_quant_conv(self._denormalize(latent).contiguous())
        if self._rows is not None:
            hidden = hidden[..., self._rows.part.start : self._rows.part.stop, :].contiguous()
        with self._rows or nullcontext():
            pixels = self._vae.decoder(hidden, feat_cache=self._caches, feat_idx=[0], first_chunk=self._first)
        self._first = False
        if self._vae.config.patch_size is not None:
            pixels = _unpatchify(pixels, self._vae.config.patch_size)
        return pixels.clamp(min=-1.0, max=1.0)[0].transpose(0, 1)  # [3, F, H, W] -> [F, 3, H, W]

    def _denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The transformer's latents as the VAE's: [1, C, f, H, W] in and out; device and dtype of the VAE."""
        assert self._scale is not None, "made by push"
        mean, reciprocal_std = self._scale
        return latents.to(mean) / reciprocal_std + mean


def latent_scale(vae: Any, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal standard deviation of a VAE's latents, [1, C, 1, 1, 1] each, in its dtype (or ``dtype``) on
    its device.

    The VAE's latents are the transformer's / reciprocal + mean. The arithmetic, double reciprocal and all, is
    ``WanPipeline``'s: anything tidier rounds differently.
    """
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean, std = (
        torch.tensor(values).view(shape).to(vae.device, dtype or vae.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, 1.0 / std


def _unpatchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Folds patches back into pixels: [1, 3 * patch * patch, F, H, W] to [1, 3, F, H * patch, W * patch]."""
    # Column offset before row offset: that is the order in which the Wan 2.2 VAE packs a patch.
    split = pixels.unflatten(1, (-1, patch, patch))  # [1, 3, column, row, F, H, W]
    return split.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def check_vae(vae: Any) -> None:
    """Raises ValueError when ``vae`` is not a causal Wan VAE, tiles its frames, or is under CPU offload."""
    if not all(hasattr(vae, name) for name in ("decoder", "post_quant_conv", "config")) or not hasattr(
        vae.config, "latents_mean"
    ):
        raise ValueError(f"{type(vae).__name__} cannot be decoded as a stream: use a causal Wan VAE (AutoencoderKLWan)")
    if getattr(vae, "use_tiling", False):
        raise ValueError(
            "vae.use_tiling=True: tiles are blended over the whole length and cannot be streamed; call "
            "vae.disable_tiling(). One latent is decoded at a time, so memory does not grow with the video"
        )
    if hasattr(vae, "_hf_hook"):
        raise ValueError(
            "the VAE is under CPU offload, whose hooks only see whole calls of vae.decode: call "
            "pipe.remove_all_hooks() and move the VAE to the device that shall decode"
        )
