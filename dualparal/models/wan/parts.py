"""VAE and text encoder as diffusers and transformers build them: empty, to check files by, and from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def empty_vae(config: Mapping[str, Any]) -> Any:
    """An ``AutoencoderKLWan`` that has not read any weights."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(config)


def load_vae(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Loads a VAE; returns (``AutoencoderKLWan``, loading info of ``from_pretrained``)."""
    from diffusers import AutoencoderKLWan

    vae, info = AutoencoderKLWan.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    return vae, info


def empty_text_encoder(config: Mapping[str, Any]) -> Any:
    """A ``UMT5EncoderModel`` that has not read any weights."""
    import transformers

    return transformers.UMT5EncoderModel(transformers.UMT5Config.from_dict(dict(config)))


def load_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Loads a text encoder; returns (``UMT5EncoderModel``, loading info of ``from_pretrained``)."""
    import transformers

    loaded: Any = transformers.UMT5EncoderModel.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    encoder, info = loaded
    return encoder, info


def empty_image_encoder(config: Mapping[str, Any]) -> Any:
    """A ``CLIPVisionModel`` that has not read any weights. A projection behind it, if there is one, is not used."""
    import transformers

    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig.from_dict(dict(config)))


def load_image_encoder(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Loads CLIP's vision model; returns (``CLIPVisionModel``, loading info of ``from_pretrained``)."""
    import transformers

    loaded: Any = transformers.CLIPVisionModel.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    encoder, info = loaded
    return encoder, info


def load_image_processor(folder: Path) -> Any:
    """Loads CLIP's image processor, the one that resizes with PIL: it needs no torchvision."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind.from_pretrained(folder)
