"""Sizes of a Wan model from its config alone: parameters, arithmetic and bytes. No torch, no weights.

Counts follow ``transformer`` beside this and diffusers' AutoencoderKLWan; tests compare them with the real classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualparal.models.json_files import ModelError, read_config, read_json
from dualparal.models.sizes import LinearSizes
from dualparal.models.wan.light_sizes import LightSizes, read_light_sizes
from dualparal.models.wan.shapes import image_counts
from dualparal.models.wan.vae_sizes import WanVaeSizes

_VAE = WanVaeSizes()  # Wan 2.1


@dataclass(frozen=True)
class WanSizes:
    """Sizes of a Wan pipeline: transformer (or two of one shape), VAE decoder, text encoder.

    Attributes:
        ffn_dim: inner width of the feed-forward.
        freq_dim: width of the sinusoids of time.
        patch: side of a token in latent pixels.
        experts: number of transformers.
        text_encoder: number of its parameters; it is loaded before the transformer and dropped.
        trained_latents: latent frames of the videos that it was trained with.
        image_counts: numbers of images that a video takes.
        condition_channels: channels that the transformer is told of images beside latents.
        image_dim, image_tokens: width and number of tokens of images that it reads before the text's; 0: none.
        positions: these tokens have positions of their own.
        image_encoder: number of parameters of what makes them; it is loaded before the transformer and dropped.
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
    vae: WanVaeSizes = _VAE
    text_encoder: int = 5_680_910_336  # UMT5-XXL
    trained_latents: int | None = 21
    image_counts: tuple[int, ...] = (0,)
    condition_channels: int = 0
    image_dim: int = 0
    image_tokens: int = 0
    positions: bool = False
    image_encoder: int = 0

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
        if self.image_dim:
            narrow += 2 * (h * h + h) + h
        return narrow, 6 * h + (2 * h if self.cross_attn_norm else 0)

    @property
    def condition_parameters(self) -> tuple[int, int]:
        """Parameters that every stage owns: embeddings of time and text, and of images' tokens."""
        h, d = self.inner, self.image_dim
        narrow, wide = (
            (h * 6 * h + 6 * h) + (self.text_dim * h + h) + (h * h + h),
            (self.freq_dim * h + h) + (h * h + h),
        )
        if d:
            narrow += (d * d + d) + (d * h + h) + d * self.image_tokens * self.positions
            wide += 2 * d + 2 * h
        return narrow, wide

    @property
    def embed_parameters(self) -> int:
        return (self.in_channels + self.condition_channels) * self.patch**2 * self.inner + self.inner

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
        return LinearSizes(6 * h * h + 2 * h * f, 7 * h + f, 5 * h + f, f)

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


# CLIP's ViT-H/14, and what it makes of one image
_CLIP = {"condition_channels": 20, "image_dim": 1280, "image_tokens": 257, "image_encoder": 630_766_080}
_VAE_5B = WanVaeSizes(256, 48, residual=True, patch=2, encoder_dim=160)
MODELS: Mapping[str, WanSizes] = {
    sizes.name: sizes
    for sizes in (
        WanSizes("wan2.1-t2v-1.3b", 30, 12, 128, 8960),
        WanSizes("wan2.1-t2v-14b", 40, 40, 128, 13824),
        WanSizes("wan2.2-t2v-a14b", 40, 40, 128, 13824, experts=2),
        *(
            WanSizes(f"wan2.1-i2v-14b-{size}p", 40, 40, 128, 13824, image_counts=(1,), **_CLIP)  # type: ignore[arg-type]
            for size in (480, 720)
        ),
        WanSizes(
            "wan2.1-flf2v-14b-720p",
            40,
            40,
            128,
            13824,
            image_counts=(2,),
            positions=True,
            **{**_CLIP, "image_tokens": 514},  # type: ignore[arg-type]
        ),
        WanSizes("wan2.2-i2v-a14b", 40, 40, 128, 13824, experts=2, image_counts=(1, 2), condition_channels=20),
        WanSizes(
            "wan2.2-ti2v-5b",
            30,
            24,
            128,
            14336,
            in_channels=48,
            out_channels=48,
            vae=_VAE_5B,
            trained_latents=31,
            image_counts=(0, 1),
        ),
    )
}


@dataclass(frozen=True)
class SkyReelsSizes(WanSizes):
    """Sizes of a SkyReels-V2-DF pipeline: a Wan2.1 one, and what tells its layers the frame rate.

    Attributes:
        tells_rate: it has that (``inject_sample_info``).
    """

    tells_rate: bool = False

    @property
    def condition_parameters(self) -> tuple[int, int]:
        narrow, wide = super().condition_parameters
        h = self.inner
        return narrow + (2 * h + (h * h + h) + (h * 6 * h + 6 * h) if self.tells_rate else 0), wide


SKYREELS: Mapping[str, SkyReelsSizes] = {
    sizes.name: sizes
    for sizes in (
        SkyReelsSizes("skyreels-v2-df-1.3b-540p", 30, 12, 128, 8960, trained_latents=25, tells_rate=True),
        SkyReelsSizes("skyreels-v2-df-14b-540p", 40, 40, 128, 13824, trained_latents=25),
        SkyReelsSizes("skyreels-v2-df-14b-720p", 40, 40, 128, 13824, trained_latents=31),
    )
}


def read_sizes(path: Path) -> WanSizes:
    """Sizes of the model in a directory in diffusers format. Without a VAE or a text encoder, those of Wan 2.1 count.

    Raises:
        ModelError: configs that cannot be read, are not a Wan model's, or have no cost model.
    """
    config = read_config(path / "transformer" / "config.json")
    reader = read_config(path / "image_encoder" / "config.json") if (path / "image_encoder").is_dir() else None
    vae = read_config(path / "vae" / "config.json") if (path / "vae").is_dir() else {}
    text = read_config(path / "text_encoder" / "config.json") if (path / "text_encoder").is_dir() else None
    expands = bool(read_json(path / "model_index.json").get("expand_timesteps"))
    try:
        return WanSizes(
            path.name,
            int(config["num_layers"]),
            int(config["num_attention_heads"]),
            int(config["attention_head_dim"]),
            int(config["ffn_dim"]),
            int(config["out_channels"] or config["in_channels"]),
            int(config["out_channels"] or config["in_channels"]),
            int(config["text_dim"]),
            int(config["freq_dim"]),
            int(config["patch_size"][1]),
            2 if (path / "transformer_2").is_dir() else 1,
            bool(config["cross_attn_norm"]),
            _read_vae(vae),
            _text_parameters(text) if text else WanSizes.text_encoder,
            31 if vae.get("is_residual") else WanSizes.trained_latents,  # 121 frames of 24 a second
            **_image_sizes(config, reader, expands),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{path}: not the configs of a Wan model ({error!r})") from None


def read_skyreels_sizes(path: Path) -> SkyReelsSizes:
    """Sizes of the SkyReels-V2 model in a directory; argument and errors are those of ``read_sizes``."""
    tells_rate = bool(read_config(path / "transformer" / "config.json").get("inject_sample_info"))
    found = {**vars(read_sizes(path)), "trained_latents": 25, "tells_rate": tells_rate}
    return SkyReelsSizes(**found)


def _read_vae(config: dict[str, Any]) -> WanVaeSizes:
    """Sizes of the VAE of a config, or of Wan 2.1's for an empty one."""
    encoder, decoder = config.get("base_dim", 96), config.get("decoder_base_dim")
    return WanVaeSizes(
        int(decoder or encoder),
        int(config.get("z_dim", 16)),
        tuple(config.get("dim_mult", (1, 2, 4, 4))),
        int(config.get("num_res_blocks", 2)),
        tuple(reversed(config.get("temperal_downsample", [False, True, True]))),
        bool(config.get("is_residual")),
        int(config.get("patch_size") or 1),
        None if decoder is None else int(encoder),
    )


def _text_parameters(config: dict[str, Any]) -> int:
    """Parameters of a UMT5 encoder."""
    d, inner, heads = config["d_model"], config["num_heads"] * config["d_kv"], config["num_heads"]
    gated = 3 if str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated") else 2
    layer = 4 * d * inner + gated * d * config["d_ff"] + 2 * d + config["relative_attention_num_buckets"] * heads
    return int(config["vocab_size"] * d + config["num_layers"] * layer + d)


def _image_sizes(config: dict[str, Any], reader: dict[str, Any] | None, keeps_first_frame: bool) -> dict[str, Any]:
    """The fields of ``WanSizes`` on images, from the configs of the transformer and of its image encoder, if any."""
    found: dict[str, Any] = {"image_counts": image_counts(config, keeps_first_frame)}
    found["condition_channels"] = config["in_channels"] - (config["out_channels"] or config["in_channels"])
    if reader is None or config.get("image_dim") is None:
        return found
    h, f, layers, patch = (reader[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size"))
    tokens = 1 + (reader["image_size"] // patch) ** 2
    parameters = h * 3 * patch**2 + h + tokens * h + 4 * h + layers * (4 * (h * h + h) + 2 * f * h + f + h + 4 * h)
    return {
        **found,
        "image_dim": config["image_dim"],
        "image_tokens": tokens * found["image_counts"][0],
        "positions": config.get("pos_embed_seq_len") is not None,
        "image_encoder": parameters,
    }
