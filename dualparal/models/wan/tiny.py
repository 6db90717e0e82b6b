"""A tiny Wan pipeline with seeded random weights, in diffusers' layout: for tests, and to try things out.

It has every part of a real one, loads with `diffusers.WanPipeline.from_pretrained`, needs no network and is
made in a second. Its pictures mean nothing; its numbers stay sane for any number of steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

_TEXT_DIM = 32
_IMAGE_DIM, _CLIP_SIDE, _CLIP_PATCH = 24, 16, 8  # of CLIP: width, and pixels of an image and of its patches
# Of queries and keys each, in self-attention. At 1, random attention is nearly an average over all tokens,
# and which frames a block attends to would hardly show in the result.
_ATTENTION_GAIN = 1.6
# Guidance multiplies the difference of two random velocities: keep them small enough for latents near 1.
_VELOCITY_GAIN = 0.5
# Real latents_mean and latents_std differ by channel: ours too, so that a mix-up of channels shows.
_MEAN_RANGE, _STD_RANGE = (-0.9, 1.5), (1.1, 3.3)


def build_tiny_pipeline(
    directory: str | Path,
    *,
    seed: int = 0,
    layers: int = 4,
    heads: int = 2,
    head_dim: int = 24,
    ffn_dim: int = 96,
    latent_channels: int = 16,
    vae_dim: int = 4,
    wan22: bool = False,
    residual_vae: bool = False,
    expand_timesteps: bool = False,
    skyreels: bool = False,
    flow_shift: float = 3.0,
    images: str = "",
    max_shard_size: int | str | None = None,
) -> Path:
    """Writes a pipeline into ``directory``, which must be new or empty; returns its path. It makes videos of texts
    unless ``images`` are asked for.

    The same arguments give the same safetensors bytes; torch's global random state is neither read nor moved. The
    tokenizer has one token per Latin letter or sign, and takes any other text as unknown. float32, 1 MB.

    Args:
        layers, heads, head_dim, ffn_dim: sizes of the transformer, whose width is heads * head_dim.
        latent_channels: z_dim of the VAE.
        vae_dim: width of the VAE's narrowest layer.
        wan22: two experts, ``transformer`` and ``transformer_2``, and a boundary_ratio, as in Wan 2.2 A14B.
        residual_vae: the VAE of Wan 2.2 5B, 16 pixels per latent instead of 8.
        expand_timesteps: a timestep per token, as in Wan 2.2 TI2V-5B, which has 48 channels and the residual VAE.
        skyreels: a SkyReels-V2 pipeline with diffusion forcing, and a transformer that is told the frame rate.
        flow_shift: of the sampler.
        images: "condition": an image-to-video pipeline whose transformers are told of images beside latents (Wan 2.2
            I2V, with ``wan22``); "first": whose transformer reads CLIP's tokens of one image, too (Wan 2.1 I2V);
            "both": of the first and the last one (Wan 2.1 FLF2V). "": text to video.
        max_shard_size: the most bytes of a transformer per file ("100KB", or a number), with an index file.

    Raises:
        ValueError: sizes that a Wan transformer cannot have, or a directory that is not empty.
    """
    _check_sizes(layers, heads, head_dim, ffn_dim, latent_channels, vae_dim)
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty: another model's files would mix in; choose a new directory")

    transformer = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ffn_dim": ffn_dim,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "text_dim": _TEXT_DIM,
        "freq_dim": 64,
        **_image_options(images, latent_channels, heads * head_dim),
    }
    if skyreels:
        transformer["inject_sample_info"] = True
    vae = _vae_config(latent_channels, vae_dim, residual_vae)
    tokenizer = make_tokenizer(directory / "tokenizer")
    pipe = _assemble(seed, tokenizer, transformer, vae, wan22, expand_timesteps, skyreels, flow_shift, bool(images))
    pipe.save_pretrained(directory, safe_serialization=True)
    if max_shard_size is not None:
        for name in ("transformer", "transformer_2") if wan22 else ("transformer",):
            (directory / name / "diffusion_pytorch_model.safetensors").unlink()
            getattr(pipe, name).save_pretrained(directory / name, max_shard_size=max_shard_size)
    return directory


def _assemble(
    seed: int,
    tokenizer: Any,
    transformer: dict[str, Any],
    vae: dict[str, Any],
    wan22: bool,
    expand_timesteps: bool,
    skyreels: bool,
    flow_shift: float,
    images: bool,
) -> Any:
    import diffusers
    import transformers

    kind = diffusers.SkyReelsV2Transformer3DModel if skyreels else diffusers.WanTransformer3DModel
    # Constructors draw initial values from the global generator, only for us to overwrite them.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        text_encoder = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=len(tokenizer),
                d_model=_TEXT_DIM,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=32,
                dropout_rate=0.0,
            )
        )
        models: dict[str, Any] = {
            "text_encoder": text_encoder,
            "transformer": kind(**transformer),
            "transformer_2": diffusers.WanTransformer3DModel(**transformer) if wan22 else None,
            "vae": diffusers.AutoencoderKLWan(**vae),
        }
        if transformer.get("image_dim"):
            models["image_encoder"] = transformers.CLIPVisionModel(_clip_config())
    for name, model in models.items():
        if model is not None:
            _fill(model, f"{seed}/{name}")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=flow_shift,
    )
    if skyreels:
        del models["transformer_2"]
        return diffusers.SkyReelsV2DiffusionForcingPipeline(tokenizer=tokenizer, scheduler=scheduler, **models)
    if "image_encoder" in models:
        sides = {"size": {"shortest_edge": _CLIP_SIDE}, "crop_size": {"height": _CLIP_SIDE, "width": _CLIP_SIDE}}
        processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        models["image_processor"] = processor(**sides)
    pipeline: Any = diffusers.WanImageToVideoPipeline if images else diffusers.WanPipeline
    return pipeline(
        tokenizer=tokenizer,
        scheduler=scheduler,
        boundary_ratio=0.875 if wan22 else None,
        expand_timesteps=expand_timesteps,
        **models,
    )


def _image_options(images: str, channels: int, inner: int) -> dict[str, Any]:
    """The options of a transformer that is told of images. Raises ValueError."""
    if images not in ("", "condition", "first", "both"):
        raise ValueError(f"images={images!r}: use 'condition', 'first', 'both', or nothing")
    found: dict[str, Any] = {}
    if images:
        found["in_channels"] = 2 * channels + 4
    if images in ("first", "both"):
        found |= {"image_dim": _IMAGE_DIM, "added_kv_proj_dim": inner}
    if images == "both":
        found["pos_embed_seq_len"] = 2 * (1 + (_CLIP_SIDE // _CLIP_PATCH) ** 2)
    return found


def _clip_config() -> Any:
    import transformers

    return transformers.CLIPVisionConfig(
        hidden_size=_IMAGE_DIM,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=_CLIP_SIDE,
        patch_size=_CLIP_PATCH,
        projection_dim=8,
    )


def _vae_config(channels: int, base_dim: int, residual: bool) -> dict[str, Any]:
    def spread(low: float, high: float) -> list[float]:
        # Golden-ratio steps: all different, in no order.
        return [round(low + (high - low) * ((0.5 + 0.618034 * i) % 1.0), 4) for i in range(channels)]

    config: dict[str, Any] = {
        "z_dim": channels,
        "base_dim": base_dim,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": spread(*_MEAN_RANGE),
        "latents_std": spread(*_STD_RANGE),
    }
    if residual:
        config |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        config |= {"scale_factor_spatial": 16, "dim_mult": [1, 2, 4, 4]}
    return config


def make_tokenizer(directory: str | Path, words: Sequence[str] = ()) -> Any:
    """Makes a T5 tokenizer: 0 pad, 1 end, 2 unknown, then one token per word.

    Args:
        directory: made if needed; gets a ``tokenizer.json``.
        words: its vocabulary; without words every Latin character has a token.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    # Metaspace puts this sign before each word.
    tokens = [f"\u2581{word}" for word in words] or ["\u2581", *map(chr, [*range(0x21, 0x7F), *range(0xA1, 0x100)])]
    vocabulary = [(token, 0.0) for token in special] + [(token, -9.0) for token in tokens]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(directory) / "tokenizer.json"))
    # By way of a file: its constructor differs between versions of transformers, and so does its name.
    return transformers.T5TokenizerFast.from_pretrained(  # type: ignore[attr-defined]
        directory, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0, model_max_length=512
    )


@torch.no_grad()
def _fill(model: nn.Module, seed: str) -> None:
    """Fills every parameter from a generator of its own, seeded by its name: the order does not matter."""
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
        mean, std = _mean_and_std(name, parameter)
        parameter.data = mean + std * noise
    model.eval()


def _mean_and_std(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and deviation that keep every layer's output near 1, and let every weight matter in the result."""
    if name.endswith("bias"):
        return 0.0, 0.02
    if name.endswith(("attn1.norm_q.weight", "attn1.norm_k.weight")):
        return _ATTENTION_GAIN, 0.1
    if name.endswith("gamma") or parameter.ndim == 1:  # the other norms
        return 1.0, 0.1
    if name.endswith("scale_shift_table"):
        return 0.0, 0.3
    if name.endswith(("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")):
        return 0.0, 1.0
    gain = _VELOCITY_GAIN if name == "proj_out.weight" else 1.0
    return 0.0, gain / math.sqrt(math.prod(parameter.shape[1:]))


def _check_sizes(layers: int, heads: int, head_dim: int, ffn_dim: int, latent_channels: int, vae_dim: int) -> None:
    sizes = {
        "layers": layers,
        "heads": heads,
        "ffn_dim": ffn_dim,
        "latent_channels": latent_channels,
        "vae_dim": vae_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: give at least 1")
    if head_dim < 6 or head_dim % 2:
        raise ValueError(
            f"head_dim={head_dim}: rotary positions share the pairs of numbers of a head between time, "
            "height and width; give an even number from 6"
        )
