"""Prompts to embeddings, as WanPipeline encodes them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


class PromptEncoder:
    """Encodes prompts as WanPipeline does. The text encoder is loaded when it is needed and dropped by ``free``.

    Args:
        load: () -> (tokenizer, text encoder).
        device: the device on which the encoder runs.
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device) -> None:
        self._load = load
        self._device = device
        self._pipeline: Any = None

    @torch.inference_mode()
    def encode(
        self, prompt: str, negative_prompt: str | None, guidance: bool, max_sequence_length: int
    ) -> torch.Tensor:
        """Embeddings [1 or 2, max_sequence_length, text_dim], by ``WanPipeline.encode_prompt``, the conditional row
        first.
        """
        if self._pipeline is None:
            from diffusers import WanPipeline

            tokenizer, text_encoder = self._load()
            self._pipeline = WanPipeline(
                tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None, transformer=None
            )
        positive, negative = self._pipeline.encode_prompt(
            prompt,
            negative_prompt,
            do_classifier_free_guidance=guidance,
            max_sequence_length=max_sequence_length,
            device=self._device,
        )
        return torch.cat([positive, negative]) if guidance else positive

    def free(self) -> None:
        """Drops the encoder and gives its memory back."""
        if self._pipeline is None:
            return
        self._pipeline = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
