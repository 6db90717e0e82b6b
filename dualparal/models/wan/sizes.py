"""Sizes of a Wan model from its config alone: parameters, arithmetic and bytes. No torch, no weights.

Counts follow ``transformer`` beside this and diffusers' AutoencoderKLWan; tests compare them with the real classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dualparal.models.json_files import ModelError, read_config
from dualparal.models.sizes import Borders, LinearSizes
from dualparal.models.transformer_header import TransformerHeader
from dualparal.models.wan.light_sizes import LightSizes, read_light_sizes
from dualparal.models.wan.shapes import LINEARS


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
    """Sizes of the decoder of diffusers' AutoencoderKLWan (Wan 2.1; the residual one is not counted).

    Attributes are keys of its config, ``temporal_upsample`` being ``temperal_downsample`` reversed.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_upsample: tuple[bool, ...] = (True, True, False)

    @property
    def spatial_factor(self) -> int:
        return int(2 ** (len(self.dim_mult) - 1))

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
            before = wide // 2 if index else wide
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
                found.append(Conv(out, out // 2, 9, frames, scale, 0))
        found.append(Conv(dims[-1], 3, 27, frames, scale, 2))
        return found

    def flops(self, pixels: int) -> int:
        """FLOPs of decoding one latent frame of ``pixels`` latent pixels, without attention's own product (1 %)."""
        return sum(2 * c.kernel * c.inputs * c.outputs * c.frames * c.scale**2 * pixels for c in self.convs)

    @property
    def parameters(self) -> int:
        """Parameters of the decoder and, as the engine loads both, of the encoder.

        The encoder mirrors the decoder with one block less a level.
        """
        decoder = sum((c.kernel * c.inputs + 1) * c.outputs for c in self.convs)
        return round(decoder * (1 + self.num_res_blocks / (self.num_res_blocks + 1)))

    def cache_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes that the decoder holds from one latent frame to the next, in numbers of ``itemsize`` bytes."""
        return sum(itemsize * c.cached * c.inputs * c.scale**2 * pixels for c in self.convs)

    def working_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes of the largest set of tensors that live at once within one latent frame.

        In the last level a residual block holds its input, the normed one, that padded and joined with two cached
        frames, and the result. At its beginning the upsampled frames are held twice and the convolved ones once; in 16
        bits diffusers upsamples in float32, and the larger copy is one of these.
        """
        last = self.convs[-1]
        frame = last.scale**2 * pixels
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


@dataclass(frozen=True)
class WanSizes:
    """Sizes of a Wan text-to-video pipeline: transformer (or two of one shape), VAE decoder, text encoder.

    Attributes:
        ffn_dim: inner width of the feed-forward.
        freq_dim: width of the sinusoids of time.
        patch: side of a token in latent pixels.
        experts: number of transformers.
        text_encoder: number of its parameters; it is loaded before the transformer and dropped.
        trained_latents: latent frames of the videos that it was trained with.
        stored_8bit: layers whose linears have 8 bits in the files, of all transformers.
    """

    name: str
    num_layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch: int = 2
    experts: int = 1
    cross_attn_norm: bool = True
    vae: WanVaeSizes = WanVaeSizes()
    text_encoder: int = 5_680_910_336  # UMT5-XXL
    trained_latents: int | None = 21
    stored_8bit: frozenset[int] = frozenset()

    def light(self, path: Path) -> LightSizes:
        """Sizes of the light decoder in a file, by its header. Raises ModelError."""
        return read_light_sizes(path, self.vae.z_dim, self.vae.spatial_factor)

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def layer_parameters(self) -> tuple[int, int]:
        """Parameters of one layer: those kept in the model's dtype, and those kept in float32."""
        h, f = self.inner, self.ffn_dim
        narrow = 8 * (h * h + h) + 4 * h + (h * f + f) + (f * h + h)
        return narrow, 6 * h + (2 * h if self.cross_attn_norm else 0)

    @property
    def condition_parameters(self) -> tuple[int, int]:
        """Parameters that every stage owns: embeddings of time and text."""
        h = self.inner
        return (h * 6 * h + 6 * h) + (self.text_dim * h + h) + (h * h + h), (self.freq_dim * h + h) + (h * h + h)

    @property
    def embed_parameters(self) -> int:
        return self.in_channels * self.patch**2 * self.inner + self.inner

    @property
    def head_parameters(self) -> tuple[int, int]:
        out = self.out_channels * self.patch**2
        return self.inner * out + out, 2 * self.inner

    @property
    def joined_parameters(self) -> int:
        """Parameters of Q, K and V of self-attention, which become one matrix."""
        return 3 * self.inner**2

    @property
    def linear_flops(self) -> int:
        """FLOPs of one layer per token, without attention.

        Counted: Q, K, V and the way out, the same for text less K and V, and the feed-forward.
        """
        return 2 * self.inner * (6 * self.inner + 2 * self.ffn_dim)

    @property
    def linears(self) -> LinearSizes:
        """Sizes of Q, K and V and the way out, the same for text less K and V, and the feed-forward."""
        h, f = self.inner, self.ffn_dim
        return LinearSizes(6 * h * h + 2 * h * f, 7 * h + f, 5 * h + f, f, h * max(3 * h, f))

    @property
    def layer_activations(self) -> int:
        """Numbers per token that a layer holds at its largest.

        Residual stream old and new, y, normed, qkv, query, attended; the feed-forward's inside twice.
        """
        return 9 * self.inner + 2 * self.ffn_dim

    @property
    def parameters(self) -> int:
        """Parameters of one transformer."""
        layers = self.num_layers * sum(self.layer_parameters)
        return layers + sum(self.condition_parameters) + self.embed_parameters + sum(self.head_parameters)


MODELS: Mapping[str, WanSizes] = {
    sizes.name: sizes
    for sizes in (
        WanSizes("wan2.1-t2v-1.3b", 30, 12, 128, 8960),
        WanSizes("wan2.1-t2v-14b", 40, 40, 128, 13824),
        WanSizes("wan2.2-t2v-a14b", 40, 40, 128, 13824, experts=2),
    )
}


def read_sizes(path: Path) -> WanSizes:
    """Sizes of the model in a directory in diffusers format. Without a VAE or a text encoder, those of Wan 2.1 count.

    Raises:
        ModelError: configs that cannot be read, are not a Wan text-to-video model's, or have no cost model.
    """
    config = read_config(path / "transformer" / "config.json")
    vae = read_config(path / "vae" / "config.json") if (path / "vae").is_dir() else {}
    text = read_config(path / "text_encoder" / "config.json") if (path / "text_encoder").is_dir() else None
    if vae.get("is_residual"):
        raise ModelError(f"{path / 'vae'}: the residual VAE of Wan2.2 5B has no cost model; use a Wan 2.1 VAE")
    try:
        downsample = vae.get("temperal_downsample", [False, True, True])
        return WanSizes(
            path.name,
            int(config["num_layers"]),
            int(config["num_attention_heads"]),
            int(config["attention_head_dim"]),
            int(config["ffn_dim"]),
            int(config["in_channels"]),
            int(config["out_channels"]),
            int(config["text_dim"]),
            int(config["freq_dim"]),
            int(config["patch_size"][1]),
            2 if (path / "transformer_2").is_dir() else 1,
            bool(config["cross_attn_norm"]),
            WanVaeSizes(
                int(vae.get("base_dim", 96)),
                int(vae.get("z_dim", 16)),
                tuple(vae.get("dim_mult", (1, 2, 4, 4))),
                int(vae.get("num_res_blocks", 2)),
                tuple(reversed(downsample)),
            ),
            _text_parameters(text) if text else WanSizes.text_encoder,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{path}: not the configs of a Wan text-to-video model ({error!r})") from None


def resized(sizes: WanSizes, headers: Sequence[TransformerHeader]) -> WanSizes:
    """Sizes with the transformers of these files, in the place of those that were counted; of one shape."""
    config = headers[0].config
    layers = range(int(config["num_layers"]))
    names = {layer: [f"blocks.{layer}.{name}.weight" for name in LINEARS] for layer in layers}
    return replace(
        sizes,
        num_layers=len(layers),
        heads=int(config["num_attention_heads"]),
        head_dim=int(config["attention_head_dim"]),
        ffn_dim=int(config["ffn_dim"]),
        in_channels=int(config["in_channels"]),
        out_channels=int(config["out_channels"]),
        text_dim=int(config["text_dim"]),
        freq_dim=int(config["freq_dim"]),
        patch=int(config["patch_size"][1]),
        cross_attn_norm=bool(config["cross_attn_norm"]),
        stored_8bit=frozenset(k for k in layers if all(h.is_8bit(name) for h in headers for name in names[k])),
    )


def _text_parameters(config: dict[str, Any]) -> int:
    """Parameters of a UMT5 encoder."""
    d, inner, heads = config["d_model"], config["num_heads"] * config["d_kv"], config["num_heads"]
    gated = 3 if str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated") else 2
    layer = 4 * d * inner + gated * d * config["d_ff"] + 2 * d + config["relative_attention_num_buckets"] * heads
    return int(config["vocab_size"] * d + config["num_layers"] * layer + d)
