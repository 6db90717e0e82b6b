"""A light decoder for Wan's latents: TAEHV's architecture, streaming, from a safetensors file.

For users of few steps, where the VAE takes longer than the transformer. Its frames are near the VAE's and not the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from dualparal.models.base import RowExchange
from dualparal.models.wan.convolutions import STEADY
from dualparal.models.wan.light_sizes import (
    BLOCKS,
    FIRST,
    GROWTH,
    LAST,
    LightSizes,
    block_name,
    growth_name,
    read_light_sizes,
    way_out_name,
)
from dualparal.models.wan.pushed import check_pushed
from dualparal.models.wan.rows import OverRows

Tensors = Mapping[str, torch.Tensor]


class LightFile:
    """The file of a light decoder, checked by its header.

    Args:
        path: a safetensors file.
        channels, spatial_factor: as ``read_light_sizes`` takes them.

    Attributes:
        sizes: its sizes.
        fingerprint: of its bytes (SHA-256), for ranks and snapshots to compare.

    Raises:
        ModelError: as ``read_light_sizes`` raises it.
        OSError: a file that cannot be read.
    """

    def __init__(self, path: Path, channels: int, spatial_factor: int) -> None:
        self.path = path
        self.sizes: LightSizes = read_light_sizes(path, channels, spatial_factor)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    def load(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Reads the decoder's tensors, to ``device`` and ``dtype``; those of the encoder are left out."""
        tensors = load_file(self.path)
        return {name: tensors[name].to(device, dtype) for name in self.sizes.shapes}

    def decoder(self, tensors: Tensors, rows: RowExchange | None = None) -> LightDecoder:
        """Makes the decoder of one video, or of some of its rows; several may share the tensors."""
        return LightDecoder(self.sizes, tensors, rows)


class LightDecoder:
    """Decodes one video, latent by latent.

    However the latents are cut, the frames are the same. Every block sees its input's frame before, zeros at first.
    Of the four frames of the first latent the last one is given out, as Wan's VAE makes one there.

    Args:
        sizes, tensors: of a ``LightFile``; they are shared.
        rows: the way to other parts of the picture, as ``StreamingDecoder`` has it.
    """

    def __init__(self, sizes: LightSizes, tensors: Tensors, rows: RowExchange | None = None) -> None:
        self._sizes, self._tensors = sizes, tensors
        self._rows = OverRows(rows) if rows is not None and rows.count > 1 else None
        self.reset()

    def reset(self) -> None:
        """Forgets the video: the next latent pushed is the first one of another, of any size."""
        self._last: dict[str, torch.Tensor] = {}  # by block: the frame [1, C, h, w] before the next one
        self._first = True
        self._torn = False
        self._size: torch.Size | None = None

    @property
    def history(self) -> int:
        """Number of latents back that a frame can see: 8. A fresh decoder fed so many goes on with the same bits."""
        latents, frames = 0, 1
        for growth in GROWTH:
            latents += -(-BLOCKS // frames)
            frames *= growth
        return latents

    @property
    def state_bytes(self) -> int:
        """Bytes held between two pushes; constant from the first latent on."""
        return sum(frame.nbytes for frame in self._last.values())

    @torch.no_grad()
    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes the next latent frames of the video.

        Args:
            latents: [1, C, f, H, W], normalised as the transformer makes them, any float dtype, any device.

        Returns:
            Frames [F, 3, H * scale, W * scale] in [-1, 1] in the decoder's dtype on its device. Of several parts of the
            picture this one's rows.

        Raises:
            ValueError: a wrong shape, or more parts than latent rows.
            RuntimeError: an earlier push failed half way, and ``reset`` was not called since.
        """
        check_pushed(latents, self._sizes.channels, self._size, self._torn, self.history)
        if self._rows is not None:
            self._rows.begin(latents.shape[3])
        self._size, self._torn = latents.shape[3:], True
        with STEADY:
            frames = [self._decode_one(latent) for latent in latents[0].split(1, dim=1)]
        self._torn = False
        return torch.cat(frames)

    def _decode_one(self, latent: torch.Tensor) -> torch.Tensor:
        hidden = latent.transpose(0, 1).to(self._tensors[f"{FIRST}.weight"]).contiguous()  # [1, C, H, W]
        hidden = torch.tanh(hidden / 3) * 3
        if self._rows is None:
            return self._frames(hidden)
        with self._rows:
            return self._frames(hidden[..., self._rows.part.start : self._rows.part.stop, :].contiguous())

    def _frames(self, hidden: torch.Tensor) -> torch.Tensor:
        """Frames of a bounded latent [1, C, h, w], or of some of its rows."""
        hidden = self._conv(FIRST, hidden).relu_()
        for level in range(len(GROWTH)):
            for block in range(BLOCKS):
                hidden = self._block(block_name(level, block), hidden)
            hidden = F.interpolate(hidden, scale_factor=2, mode="nearest")
            grown = self._conv(growth_name(level), hidden)  # [f, growth * C, h, w]
            hidden = self._conv(way_out_name(level), grown.unflatten(1, (GROWTH[level], -1)).flatten(0, 1))
        pixels = F.pixel_shuffle(self._conv(LAST, hidden.relu_()), self._sizes.patch)
        kept = pixels[-1:] if self._first else pixels
        self._first = False
        return kept.clamp(0, 1) * 2 - 1

    def _block(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """A block over frames [f, C, h, w], each of which sees the one before it."""
        last = self._last.get(name)
        before = torch.cat([torch.zeros_like(hidden[:1]) if last is None else last, hidden[:-1]])
        self._last[name] = hidden[-1:].clone()
        inner = self._conv(f"{name}.conv.0", torch.cat([hidden, before], dim=1)).relu_()
        inner = self._conv(f"{name}.conv.2", inner).relu_()
        return (self._conv(f"{name}.conv.4", inner) + hidden).relu_()

    def _conv(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight = self._tensors[f"{name}.weight"]
        return F.conv2d(hidden, weight, self._tensors.get(f"{name}.bias"), padding=weight.shape[-1] // 2)
