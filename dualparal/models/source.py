"""Sources of an engine's model: files, or a loaded pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from dualparal.config.eight_bit import LINEAR_OFF, LinearPolicy
from dualparal.config.lora import Lora
from dualparal.config.transformer_file import TransformerFile
from dualparal.config.video import VideoConfig
from dualparal.models.base import ModelSpec, Slice
from dualparal.models.family import Family
from dualparal.models.files import ModelFiles
from dualparal.models.folder import folder_of


class ModelSource(Protocol):
    """The source of an engine's model: files (``ModelFiles``), or a pipeline that the user has loaded."""

    @property
    def family(self) -> Family:
        """The family of the model's pipeline class."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """Facts of the model."""
        ...

    @property
    def defaults(self) -> VideoConfig:
        """A request as the model has it where nothing was asked for. Raises ModelError."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short text that differs between models of other sizes or LoRAs, for ranks to compare."""
        ...

    def load_slices(
        self, layers: range, dtype: torch.dtype, device: torch.device, linear_8bit: LinearPolicy = LINEAR_OFF
    ) -> list[Slice]:
        """One slice of these layers per expert, on ``device`` in ``dtype``.

        Some tensors stay in float32, and the linears that ``linear_8bit`` covers are in 8 bits.
        """
        ...

    def load_scheduler(self) -> Any:
        """The pipeline's diffusers scheduler."""
        ...

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline's VAE on ``device`` in ``dtype``."""
        ...

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """Returns (tokenizer, text encoder on ``device``)."""
        ...

    def load_image_encoder(self, device: torch.device) -> tuple[Any, Any]:
        """Returns (image processor, image encoder on ``device``)."""
        ...


def resolve_model(
    model: str | Path, loras: tuple[Lora, ...] = (), transformers: tuple[TransformerFile, ...] = ()
) -> ModelFiles:
    """The files of a model, which ``folder_of`` finds, with the LoRAs and in the place of the transformers given.

    Raises:
        ModelError: there is none, or its files are none of a supported pipeline.
    """
    return ModelFiles(folder_of(model, transformers), loras, transformers)
