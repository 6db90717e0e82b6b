"""Prompts: text to embeddings through the pipeline's own tokenizer and encoder, and which block uses which.

A prompt's id is the block from which it holds. Blocks ask for their prompt once, when they enter, so a change never
touches a block in flight.
"""

from __future__ import annotations

import gc
import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch


class PromptEncoder:
    """Encodes as WanPipeline does. The text encoder is loaded when it is needed and dropped by ``free``.

    Args:
        load: () -> (tokenizer, text encoder).
        device: where the encoder runs.
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device) -> None:
        self._load = load
        self._device = device
        self._pipeline: Any = None

    @torch.inference_mode()
    def encode(
        self, prompt: str, negative_prompt: str | None, guidance: bool, max_sequence_length: int
    ) -> torch.Tensor:
        """Embeddings [1 or 2, max_sequence_length, text_dim], the conditional row first."""
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


class Prompts:
    """Which embeddings a block uses. ``change`` may be called from any thread while blocks are entering."""

    def __init__(self, embeds: dict[int, torch.Tensor]) -> None:
        """embeds: first block -> embeddings; there is one for the first block that will be asked for."""
        self._embeds = dict(embeds)
        self._entered = -1
        self._lock = threading.Lock()

    def of(self, block: int) -> int:
        """The prompt of a block that is under way from now on."""
        with self._lock:
            self._entered = max(self._entered, block)
            return self._current(block)

    def _current(self, block: int) -> int:
        starts = sorted(self._embeds)
        return starts[bisect_right(starts, block) - 1]

    def embeds(self, prompt: int) -> torch.Tensor:
        return self._embeds[prompt]

    def forget(self, before: int) -> None:
        """Drops the prompts that only blocks before one have used."""
        with self._lock:
            current = self._current(before)
            self._embeds = {start: embeds for start, embeds in self._embeds.items() if start >= current}

    def state(self) -> dict[int, torch.Tensor]:
        """First block -> embeddings, of all that blocks under way and later ones use."""
        with self._lock:
            return dict(self._embeds)

    def change(self, embeds: torch.Tensor) -> int:
        """New blocks take ``embeds`` from now on, later changes that were planned before are dropped.

        Returns the first block that takes them.
        """
        with self._lock:
            first = self._entered + 1
            self._embeds = {start: e for start, e in self._embeds.items() if start < first}
            self._embeds[first] = embeds
            return first
