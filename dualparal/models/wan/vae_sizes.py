"""Sizes of Wan's VAE from its config alone: parameters, arithmetic and bytes. No torch, no weights.

Counts follow diffusers' AutoencoderKLWan; tests compare them with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from dualparal.models.sizes import Borders


class Conv(NamedTuple):
    """A convolution of the decoder, for one latent frame that is not the first.

    Attributes:
        inputs, outputs: channels.
        kernel: points.
        frames: output frames.
        scale: side of its output in latent pixels.
        cached: input frames that are kept for the next latent (0 or 2).
    """

    inputs: int
    outputs: int
    kernel: int
    frames: int
    scale: int
    cached: int


@dataclass(frozen=True)
class WanVaeSizes:
    """Sizes of diffusers' AutoencoderKLWan, of its decoder where not said.

    Attributes are keys of its config, ``base_dim`` being the decoder's (``decoder_base_dim``) and ``temporal_upsample``
    being ``temperal_downsample`` reversed, and besides:
        residual: the one of Wan 2.2 5B (``is_residual``), whose levels have shortcuts.
        patch: side of the patches of a frame that it makes (``patch_size``).
        encoder_dim: the encoder's ``base_dim``; None: the decoder's.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_upsample: tuple[bool, ...] = (True, True, False)
    residual: bool = False
    patch: int = 1
    encoder_dim: int | None = None

    @property
    def spatial_factor(self) -> int:
        return self.patch * int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_factor(self) -> int:
        return int(2 ** sum(self.temporal_upsample))

    @cached_property
    def convs(self) -> list[Conv]:
        """Every convolution of the decoder, in order; the attention in the middle counts as one of kernel 1."""
        dims = [self.base_dim * m for m in (self.dim_mult[-1], *reversed(self.dim_mult))]
        found = [Conv(self.z_dim, dims[0], 27, 1, 1, 2)]
        found += [Conv(dims[0], dims[0], 27, 1, 1, 2)] * 4  # the two residual blocks in the middle
        found += [Conv(dims[0], 4 * dims[0], 1, 1, 1, 0)]  # projections of the attention between them
        frames = scale = 1
        for index, (wide, out) in enumerate(pairwise(dims)):
            before = wide // 2 if index and not self.residual else wide
            for _ in range(self.num_res_blocks + 1):
                if before != out:
                    found.append(Conv(before, out, 1, frames, scale, 0))
                found += [Conv(before, out, 27, frames, scale, 2), Conv(out, out, 27, frames, scale, 2)]
                before = out
            if index < len(self.dim_mult) - 1:
                if self.temporal_upsample[index]:
                    found.append(Conv(out, 2 * out, 3, frames, scale, 2))
                    frames *= 2
                scale *= 2
                found.append(Conv(out, out if self.residual else out // 2, 9, frames, scale, 0))
        found.append(Conv(dims[-1], 3 * self.patch**2, 27, frames, scale, 2))
        return found

    @cached_property
    def encoder_convs(self) -> list[Conv]:
        """Every convolution of the encoder, in order, as ``convs``."""
        dims = [(self.encoder_dim or self.base_dim) * m for m in (1, *self.dim_mult)]
        frames, scale = self.temporal_factor, self.spatial_factor // self.patch
        found = [Conv(3 * self.patch**2, dims[0], 27, frames, scale, 2)]
        for index, (wide, out) in enumerate(pairwise(dims)):
            for before in (wide, *(out for _ in range(self.num_res_blocks - 1))):
                if before != out:
                    found.append(Conv(before, out, 1, frames, scale, 0))
                found += [Conv(before, out, 27, frames, scale, 2), Conv(out, out, 27, frames, scale, 2)]
            if index < len(self.dim_mult) - 1:
                scale //= 2
                found.append(Conv(out, out, 9, frames, scale, 0))
                if self.temporal_upsample[::-1][index]:
                    frames //= 2
                    found.append(Conv(out, out, 3, frames, scale, 1))
        found += [Conv(dims[-1], dims[-1], 27, frames, scale, 2)] * 4
        found += [Conv(dims[-1], 4 * dims[-1], 1, frames, scale, 0), Conv(dims[-1], 2 * self.z_dim, 27, 1, 1, 2)]
        return [*found, Conv(2 * self.z_dim, 2 * self.z_dim, 1, 1, 1, 0)]

    @property
    def encoder_history(self) -> int:
        """Latent frames back that an encoded one can see."""
        rates = {27: 1, 3: 2}  # input frames for one that comes out
        return math.ceil(sum(Fraction(2, c.frames * rates[c.kernel]) for c in self.encoder_convs if c.kernel in rates))

    def encode_flops(self, pixels: int) -> int:
        """FLOPs of encoding one latent frame of ``pixels`` latent pixels, as ``flops``."""
        return sum(2 * c.kernel * c.inputs * c.outputs * c.frames * c.scale**2 * pixels for c in self.encoder_convs)

    def encode_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes that the encoder holds while it encodes: for the next latent frame, and its largest set of tensors.

        In the first level a residual block holds what the last one of the decoder does; of the residual VAE the level's
        copy of its input besides.
        """
        held = sum(itemsize * c.cached * c.inputs * c.scale**2 * pixels for c in self.encoder_convs)
        frames, frame = self.temporal_factor, (self.spatial_factor // self.patch) ** 2 * pixels
        return held + itemsize * (self.encoder_dim or self.base_dim) * ((4 + self.residual) * frames + 2) * frame

    def flops(self, pixels: int) -> int:
        """FLOPs of decoding one latent frame of ``pixels`` latent pixels, without attention's own product (1 %)."""
        return sum(2 * c.kernel * c.inputs * c.outputs * c.frames * c.scale**2 * pixels for c in self.convs)

    @property
    def parameters(self) -> int:
        """Parameters of the decoder and, as the engine loads both, of the encoder.

        The encoder mirrors the decoder with one block less a level, at its own width.
        """
        decoder = sum((c.kernel * c.inputs + 1) * c.outputs for c in self.convs)
        narrower = 1.0 if self.encoder_dim is None else (self.encoder_dim / self.base_dim) ** 2
        return round(decoder * (1 + narrower * self.num_res_blocks / (self.num_res_blocks + 1)))

    def cache_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes that the decoder holds from one latent frame to the next, in numbers of ``itemsize`` bytes."""
        return sum(itemsize * c.cached * c.inputs * c.scale**2 * pixels for c in self.convs)

    def working_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes of the largest set of tensors that live at once within one latent frame.

        In the last level a residual block holds its input, the normed one, that padded and joined with two cached
        frames, and the result. At its beginning the upsampled frames are held twice and the convolved ones once; in 16
        bits diffusers upsamples in float32, and the larger copy is one of these.

        The residual VAE halves its channels in that level only, so its first block holds more than all of this: the
        input, the level's copy of it, the normed one, that joined and then padded, what it will keep, and the shortcut.
        """
        last = self.convs[-1]
        frame = last.scale**2 * pixels
        if self.residual:
            into = next(c for c in self.convs if c.scale == last.scale and c.kernel == 27).inputs
            wide = into * (3 * last.frames + 2 + 2 * (last.frames + 2))
            return frame * itemsize * (wide + last.inputs * last.frames)
        narrow, wide = last.inputs, self.convs[-1].inputs
        for c in self.convs:
            if c.kernel == 9 and c.scale == last.scale:
                wide = c.inputs
        block = itemsize * narrow * (3 * last.frames + last.frames + 2)
        upsample = wide * last.frames * (4 + itemsize) + narrow * last.frames * itemsize
        return frame * max(block, upsample)

    def borders(self, width: int) -> Borders:
        """A row of the input of every convolution over space, new frames only; keys and values of the attention."""
        spatial = [c for c in self.convs if c.kernel in (9, 27)]
        numbers = sum(c.inputs * c.frames * c.scale * width for c in spatial)
        return Borders(numbers, len(spatial), 2 * self.base_dim * self.dim_mult[-1])
