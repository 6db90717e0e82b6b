"""Images to the tokens that Wan 2.1's image-to-video models attend to, as WanImageToVideoPipeline encodes them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch


class ImageEncoder:
    """Encodes images by CLIP. It is loaded when it is needed and dropped by ``free``.

    Args:
        load: () -> (image processor, CLIP's vision model).
        device: the device on which the model runs.
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device) -> None:
        self._load, self._device = load, device
        self._loaded: tuple[Any, Any] | None = None

    @torch.inference_mode()
    def encode(self, images: Sequence[Any]) -> torch.Tensor:
        """Tokens of all images one after another, [tokens, width], by the last layer but one.

        Args:
            images: as PIL has them.
        """
        if self._loaded is None:
            self._loaded = self._load()
        processor, model = self._loaded
        pixels = processor(images=list(images), return_tensors="pt").pixel_values
        dtype = next(model.parameters()).dtype
        hidden = model(pixel_values=pixels.to(self._device, dtype), output_hidden_states=True).hidden_states[-2]
        return hidden.flatten(0, 1)

    def free(self) -> None:
        """Drops the model and gives its memory back."""
        if self._loaded is None:
            return
        self._loaded = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
