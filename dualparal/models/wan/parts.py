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
